"""What is trained: the slices of the parameters that belong to some heads, or everything.

Each slice becomes a leaf of its own that the optimizer holds: gradients are copied into it after backward, and its new
value is written back into the model after the step. So weight decay, momentum and clipping see the slices alone, and
nothing outside them changes by a bit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from workbench.distillation.processes import is_sharded, keep_own, whole, whole_gradient
from workbench.errors import InputError
from workbench.models.hooked_model import Matrix, WeightSlice
from workbench.values.refs import Head


@runtime_checkable
class HasHeadSlices(Protocol):
    """A model whose heads' own parts of the parameters are known: a `Student`, or `PlainHeads` of a transformers
    model."""

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def head_slices(self, head: Head, matrices: Sequence[Matrix] = ...) -> list[WeightSlice]: ...


class TrainedSlices:
    """Leaves for the trained parts of a student, by name. Only their parameters take gradients while `gradients()` is
    open."""

    def __init__(self, student: HasHeadSlices, slices: Iterable[WeightSlice]) -> None:
        self._parameters = student.parameters()
        self.slices: dict[str, WeightSlice] = {}
        for part in slices:
            if part.parameter not in self._parameters:
                raise InputError(
                    f"the student has no parameter {part.parameter!r}; take slices from `student.head_slices`."
                )
            self.slices[_key(part)] = part
        self.leaves = {key: nn.Parameter(self._view(part).detach().clone()) for key, part in self.slices.items()}

    def _view(self, part: WeightSlice) -> Tensor:
        return self._parameters[part.parameter][part.index]

    @property
    def count(self) -> int:
        """Number of trained scalars."""
        return sum(leaf.numel() for leaf in self.leaves.values())

    @property
    def total(self) -> int:
        """Number of scalars in all of the student's parameters."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def fraction(self) -> float:
        """Trained scalars as a share of all."""
        return self.count / self.total

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Let exactly the touched parameters take gradients; the former flags come back on exit and gradients are
        dropped."""
        touched = {part.parameter for part in self.slices.values()}
        flags = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(name in touched)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(flags[name])
                parameter.grad = None

    @property
    def sharded(self) -> bool:
        """Whether the student's parameters are: gradients are then summed over the processes when they are
        collected."""
        return any(is_sharded(self._parameters[part.parameter]) for part in self.slices.values())

    @torch.no_grad()
    def onto(self, student: HasHeadSlices) -> None:
        """Go on with the same weights in other tensors: the same student once it is sharded, or a fresh one, which
        takes the leaves' values."""
        self._parameters = student.parameters()
        if not self.sharded:
            self.write_back()

    @contextmanager
    def masked_gradients(self) -> Iterator[None]:
        """As `gradients`, and what is outside the slices takes a gradient of zero, so that a norm over the touched
        parameters is the slices' own: for a loop that clips by the model's parameters."""
        masks: dict[str, Tensor] = {}
        for part in self.slices.values():
            parameter = self._parameters[part.parameter]
            masks.setdefault(part.parameter, torch.zeros_like(parameter, dtype=torch.bool))[part.index] = True
        with self.gradients():
            handles = [
                self._parameters[name].register_hook(lambda gradient, mask=mask: gradient * mask)
                for name, mask in masks.items()
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def collect_gradients(self) -> None:
        """Move the model's gradients into the leaves and clear the model's."""
        gradients = self._take_gradients()
        for key, part in self.slices.items():
            gradient = gradients[part.parameter]
            self.leaves[key].grad = None if gradient is None else gradient[part.index].clone()

    def _take_gradients(self) -> dict[str, Tensor | None]:
        """The whole gradient of each touched parameter; the model's are cleared."""
        names = {
            part.parameter: None for part in self.slices.values()
        }  # in order: gathering is a step that all processes take together
        gradients = {name: whole_gradient(self._parameters[name]) for name in names}
        for name in names:
            self._parameters[name].grad = None
        return gradients

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the leaves' values into the model."""
        self._write({key: self.leaves[key] for key in self.slices})

    def _write(self, values: Mapping[str, Tensor]) -> None:
        """Slices by key into the model, a sharded parameter once for all of its slices."""
        gathered = {
            part.parameter: None for part in self.slices.values() if is_sharded(self._parameters[part.parameter])
        }
        full = {name: whole(self._parameters[name]) for name in gathered}
        for key, part in self.slices.items():
            full.get(part.parameter, self._parameters[part.parameter])[part.index].copy_(values[key])
        for name, value in full.items():
            keep_own(self._parameters[name], value)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Set leaves and model to saved values. Errors: `InputError` when they belong to other slices."""
        if set(values) != set(self.leaves):
            raise InputError(
                "this checkpoint trains other slices than this run; start afresh, or resume with the configuration "
                "that wrote it."
            )
        for key, leaf in self.leaves.items():
            leaf.copy_(values[key])
        self.write_back()


def _key(part: WeightSlice) -> str:
    index = ",".join(f"{i.start}:{i.stop}" if isinstance(i, slice) else str(i) for i in part.index)
    return f"{part.parameter}[{index}]"


def slices_of_heads(student: HasHeadSlices, heads: Sequence[Head], *, train_kv: bool = True) -> list[WeightSlice]:
    """The slices of these heads. With grouped-query attention `train_kv` says whether the shared key-value group is
    trained too."""
    matrices: tuple[Matrix, ...] = ("q", "k", "v", "o") if train_kv else ("q", "o")
    return [part for head in heads for part in student.head_slices(head, matrices)]


def slices_of_everything(student: HasHeadSlices) -> list[WeightSlice]:
    """Every parameter, whole."""
    return [WeightSlice(parameter=name, index=()) for name in student.parameters()]
