"""Which positions a replay computes: `Window`, the stretch up to the last token, and `Spots`, scattered positions
gathered side by side."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.models.hooked_model import last_position


def _at(values: Tensor, index: Int[Tensor, "batch slot"]) -> Tensor:
    return values[torch.arange(len(values), device=values.device)[:, None], index]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spots:
    """The positions of a mask, prompt by prompt, padded to the prompt that has most."""

    index: Int[Tensor, "batch spot"]
    real: Bool[Tensor, "batch spot"]
    """False where a prompt has fewer positions than the others."""

    @classmethod
    def of(cls, mask: Bool[Tensor, "batch pos"]) -> "Spots":
        """The positions where the mask is True (at least one spot, real or not)."""
        count = max(1, int(mask.sum(1).max()))
        index = mask.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        return cls(index=index, real=mask.gather(1, index))

    def at(self, values: Tensor) -> Tensor:
        """[batch pos ...] -> [batch spot ...]."""
        return _at(values, self.index)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """The positions of each prompt from its earliest changed one to its last real token, right-aligned: the last slot
    is the last token."""

    index: Int[Tensor, "batch slot"]
    visible: Bool[Tensor, "batch slot slot"] | None
    """Which slot attends to which slot; None for a single slot. A slot in front of its prompt attends to itself, so
    that no softmax is empty."""
    prefix: Bool[Tensor, "batch pos"]
    """The clean positions in front of the window that its slots attend to."""

    @classmethod
    def of(cls, mask: Bool[Tensor, "batch pos"], first: Int[Tensor, " batch"]) -> "Window":
        """The window from position `first` of each prompt on; `mask` is True on real tokens."""
        last = last_position(mask)
        width = int((last - first).max()) + 1
        index = last[:, None] - width + 1 + torch.arange(width, device=mask.device)
        inside = index.clamp(min=0)
        start = index[:, :1]
        prefix = (mask & (torch.arange(mask.shape[1], device=mask.device) < start))[:, : int(start.max().clamp(min=0))]
        if width == 1:
            return cls(index=inside, visible=None, prefix=prefix)
        real = (index >= 0) & mask.gather(1, inside)
        slots = torch.arange(width, device=mask.device)
        visible = (slots <= slots[:, None]) & real[:, None] | (slots == slots[:, None])
        return cls(index=inside, visible=visible, prefix=prefix)

    @property
    def width(self) -> int:
        """Number of slots."""
        return self.index.shape[1]

    def at(self, values: Tensor) -> Tensor:
        """[batch pos ...] -> [batch slot ...]."""
        return _at(values, self.index)

    def find(self, spots: Spots) -> tuple[Int[Tensor, "batch slot"], Bool[Tensor, "batch slot"]]:
        """For each slot: the spot at its position, and whether there is one."""
        same = (self.index[:, :, None] == spots.index[:, None]) & spots.real[:, None]
        return same.int().argmax(-1), same.any(-1)
