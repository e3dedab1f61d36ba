"""Low-rank training of heads (LoRA, Hu et al. 2021): each trained matrix of a head is W + (alpha / rank) B A, and only
A and B train.

    A [rank in], B [out rank]; B starts at 0, A as in peft.
    Of W_Q, W_K, W_V a head owns output rows, of W_O input columns.

peft adapts whole matrices, so an adapter of its own would write into every head of a layer. Here each head has its own
factors over its own slice, and nothing outside it moves. All of them together are an ordinary LoRA adapter in which
most of B (of W_O: of A) is zero: `save_adapter` writes it as peft's directory, which `transformers`, peft and
`Student.load` read.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from workbench import seeds, storage
from workbench.distillation.masks import TrainedSlices
from workbench.errors import InputError
from workbench.models import sources
from workbench.models.export import WRAPPER
from workbench.models.hooked_model import Student, WeightSlice


class LowRankSlices(TrainedSlices):
    """Leaves are the two factors of each matrix slice (`...|A`, `...|B`); biases do not train."""

    def __init__(
        self, student: Student, slices: Iterable[WeightSlice], *, rank: int, alpha: float = 16.0, seed: int = 0
    ) -> None:
        parts = list(slices)
        parameters = student.parameters()
        super().__init__(
            student,
            [
                part
                for part in parts
                if part.parameter not in parameters or parameters[part.parameter][part.index].ndim == 2
            ],
        )
        self.rank, self.alpha, self.student = rank, alpha, student
        self._base = {key: leaf.detach() for key, leaf in self.leaves.items()}
        self.leaves = {
            f"{key}|{name}": nn.Parameter(value)
            for key in self._base
            for name, value in self._initial(key, seed).items()
        }

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def _initial(self, key: str, seed: int) -> dict[str, Tensor]:
        """A uniform in +-1/sqrt(in), which is peft's kaiming_uniform with a = sqrt(5); B zero."""
        out, inner = self._oriented(key, self._base[key]).shape
        down = (2 * torch.rand(self.rank, inner, generator=seeds.generator(seed, "lora", key)) - 1) / math.sqrt(inner)
        return {"A": down.to(self._base[key]), "B": self._base[key].new_zeros(out, self.rank)}

    def _oriented(self, key: str, matrix: Float[Tensor, "_ _"]) -> Float[Tensor, "_ _"]:
        """A slice as [out in], and back."""
        return matrix.T if self.slices[key].inputs_first else matrix

    def factors(self, key: str) -> tuple[Float[Tensor, "rank inner"], Float[Tensor, "out rank"]]:
        """(A, B) of a slice."""
        return self.leaves[f"{key}|A"], self.leaves[f"{key}|B"]

    def collect_gradients(self) -> None:
        """The chain rule from each slice's gradient G [out in]: dA = scale B^T G, dB = scale G A^T; clears the model's
        gradients."""
        gradients = self._take_gradients()
        for key, part in self.slices.items():
            gradient, (down, up) = gradients[part.parameter], self.factors(key)
            if gradient is None:
                down.grad = up.grad = None
                continue
            along = self.scale * self._oriented(key, gradient[part.index])
            down.grad, up.grad = up.detach().T @ along, along @ down.detach().T

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the merged slices into the model."""
        merged = {}
        for key in self.slices:
            down, up = self.factors(key)
            merged[key] = self._base[key] + self._oriented(key, self.scale * (up @ down))
        self._write(merged)


def save_adapter(slices: LowRankSlices, directory: Path, *, base: str | Path) -> None:
    """Write the factors as a peft LoRA directory for the untrained student at `base`; a matrix with k trained heads has
    rank k * rank.

    Errors: `InputError` without peft, for an architecture that stores queries, keys and values in one matrix (save the
    student instead), and for a directory that holds what this program has not written.
    """
    storage.require_replaceable(Path(directory))
    sources.require_package("peft", "adapters")
    from peft import LoraConfig

    members: dict[str, list[str]] = defaultdict(list)
    for key, part in slices.slices.items():
        members[part.parameter.replace(WRAPPER, "").removesuffix(".weight")].append(key)
    _require_modules(slices, members)
    tensors: dict[str, Tensor] = {}
    for module, keys in members.items():
        down, up = _stacked(slices, keys)
        tensors |= {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        r=slices.rank,
        lora_alpha=slices.alpha,  # pyright: ignore[reportArgumentType]  peft divides it by the rank: a fraction is as good
        target_modules=sorted(members),
        rank_pattern={module: slices.rank * len(keys) for module, keys in members.items()},
        alpha_pattern={module: slices.alpha * len(keys) for module, keys in members.items()},
        inference_mode=True,
    )

    def fill(temporary: Path) -> None:
        config.save_pretrained(str(temporary))
        storage.write_tensors(temporary / "adapter_model.safetensors", tensors, metadata={"format": "pt"})

    storage.replace_directory(Path(directory), fill)


def _stacked(slices: LowRankSlices, keys: list[str]) -> tuple[Float[Tensor, "ranks inner"], Float[Tensor, "out ranks"]]:
    """The factors of a matrix's heads as those of one adapter: one block of ranks a head, zero outside its rows (W_O:
    its columns)."""
    part = slices.slices[keys[0]]
    whole = slices.student.parameters()[part.parameter]
    out, inner = whole.shape[::-1] if part.inputs_first else whole.shape
    down, up = whole.new_zeros(len(keys), slices.rank, inner), whole.new_zeros(len(keys), out, slices.rank)
    for place, key in enumerate(keys):
        index = slices.slices[key].index
        rows, columns = (*index, slice(None))[:2]
        if part.inputs_first:
            rows, columns = columns, rows
        a, b = slices.factors(key)
        down[place][:, columns], up[place][rows] = a.detach(), b.detach()
    return down.flatten(0, 1), up.transpose(0, 1).flatten(1)


def _require_modules(slices: LowRankSlices, members: Mapping[str, list[str]]) -> None:
    original = getattr(slices.student.model, "original_model", None)
    if original is None:
        raise InputError(
            "only a student loaded through TransformerBridge (TransformerLens 4) can be saved as an adapter."
        )
    with torch.device("meta"):
        known = dict(AutoModelForCausalLM.from_config(original.config).named_modules())
    fused = [module for module in members if not isinstance(known.get(module), nn.Linear)]
    if fused:
        raise InputError(
            f"{fused[0]} is no matrix of its own in this architecture, so peft can't adapt it; save the merged student "
            "instead."
        )
