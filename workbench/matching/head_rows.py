"""The rows that a head is compared by: `hook_z`, what it writes to the residual stream, or its attention pattern, at
chosen tokens.

m, the number of rows, is the number of prompts times the tokens of the position.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.matching.config import Activation, Compared
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.similarity.measures import Measure
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head, Position

ROOM = 2**30
"""Bytes of a model's activations that are kept at most."""


class Readings:
    """A model's activations on one set of prompts, kept for as long as its weights stay what they are: the arms of a
    run compare their students with one teacher on the same prompts."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._prompts: tuple[Tensor, Tensor] | None = None
        self._activations: dict[str, Tensor] = {}

    def read(self, prompts: PromptPairs, names: Sequence[str]) -> dict[str, Tensor]:
        """Activations by hook name on the clean prompts, of a forward that is not made again."""
        same = self._prompts is not None and all(
            torch.equal(*each) for each in zip(self._prompts, (prompts.clean, prompts.mask), strict=True)
        )
        missing = [name for name in names if not same or name not in self._activations]
        if missing or not names:
            activations = self.model.early_activations(prompts.clean, prompts.mask, names)
            if sum(value.numel() * value.element_size() for value in activations.values()) > ROOM:
                return activations
            self._prompts, self._activations = (
                (prompts.clean, prompts.mask),
                {**(self._activations if same else {}), **activations},
            )
        return {name: self._activations[name] for name in names}


_READINGS: ContextVar[tuple[Readings, ...]] = ContextVar("readings that are kept", default=())


@contextmanager
def reading_once(*readings: Readings) -> Iterator[None]:
    """Inside, heads of these models are read from what is kept. Their weights must not change."""
    token = _READINGS.set(readings)
    try:
        yield
    finally:
        _READINGS.reset(token)


def read(model: HookedModel, prompts: PromptPairs, names: Sequence[str]) -> dict[str, Tensor]:
    """A model's activations by hook name on the clean prompts of its own reading."""
    readings = next((each for each in _READINGS.get() if each.model is model), None)
    return (
        model.early_activations(prompts.clean, prompts.mask, names)
        if readings is None
        else readings.read(prompts, names)
    )


def require_fitting(
    measure: Measure, activation: Activation, prompts: PromptPairs, compared: Compared = "activations"
) -> None:
    """Refuse attention KL on anything but attention patterns, and these where the models read different tokens."""
    if measure == "attention_kl" and compared == "differences":
        raise InputError(
            "measure attention_kl compares attention patterns, and a difference of two is none; set `compared: "
            "activations`, or another measure."
        )
    if activation == "pattern" and prompts.teacher is not None:
        raise InputError(
            "attention patterns are over the tokens of a prompt, which differ with the tokenizer; align z or result."
        )
    if measure == "attention_kl" and activation != "pattern":
        raise InputError(
            f"measure attention_kl compares attention patterns, not activation {activation}; set `activation: pattern`."
        )


@runtime_checkable
class HasPositions(Protocol):
    """Prompts whose tokens are known by named positions: `PromptPairs`, or a trainer's batch."""

    def position(self, name: str) -> Tensor: ...


def place(prompts: HasPositions, positions: Sequence[Position]) -> Tensor:
    """The mask of several named positions together: [batch pos]."""
    masks = [prompts.position(position) for position in positions]
    return torch.stack(masks).any(0)


def hook_names(heads: Sequence[Head], activation: Activation = "z") -> list[str]:
    """The hooks that heads are read from, in layer order."""
    name = hooks.pattern if activation == "pattern" else hooks.z
    return [name(layer) for layer in sorted({head.layer for head in heads})]


def difference(clean: Mapping[str, Tensor], corrupt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """h(clean) - h(corrupt) by hook name: whatever both runs hold alike drops out."""
    return {name: value - corrupt[name] for name, value in clean.items()}


def head_rows(
    model_weights: Mapping[int, Float[Tensor, "head d_head d_model"]] | None,
    activations: Mapping[str, Tensor],
    head: Head,
    where: Tensor,
) -> Float[Tensor, "m features"]:
    """A head's rows at the chosen tokens, prompt by prompt; with `model_weights` (layer -> W_O) as written to the
    residual stream. Where attention patterns were captured, the rows are those of the chosen query tokens, over all
    keys."""
    pattern = activations.get(hooks.pattern(head.layer))
    rows = (
        activations[hooks.z(head.layer)][:, :, head.index][where] if pattern is None else pattern[:, head.index][where]
    )
    return rows if model_weights is None else rows @ model_weights[head.layer][head.index]


def rows_at(
    model_weights: Mapping[int, Float[Tensor, "head d_head d_model"]] | None,
    activations: Mapping[str, Tensor],
    sites: Iterable[tuple[Head, Sequence[Position]]],
    prompts: HasPositions,
) -> list[Float[Tensor, "_ _"]]:
    """The rows of several heads, each at its own positions of the same prompts."""
    return [head_rows(model_weights, activations, head, place(prompts, positions)) for head, positions in sites]


def output_weights(model: HookedModel, heads: Sequence[Head], activation: Activation) -> dict[int, Tensor] | None:
    """W_O of the layers of some heads for activation `result`; None for the others, which need none."""
    return (
        None
        if activation != "result"
        else {layer: model.output_weights(layer) for layer in {head.layer for head in heads}}
    )
