"""Prompt pairs of unequal length: which token of a corrupt prompt is the counterpart of which token of the clean one.

A name says it: the token that `subject` names in the clean prompt belongs to the one that `subject` names in the
corrupt prompt, in order where it names several. No other token has a counterpart, so what acts at named positions can
be asked of such pairs, and what replaces whole prompts can't.

The corrupt prompts are padded to another width than the clean ones, always: no mask of the one can be taken for the
other's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import InputError

REMEDY = (
    "patch, ablate or interchange at positions that both prompts name (`position=`, `positions=`), or write both "
    "prompts with as many tokens"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counterparts:
    """The layout of the corrupt prompts, and where the counterpart of each clean token stands in it."""

    mask: Bool[Tensor, "batch corrupt_pos"]
    """True on the corrupt prompts' real tokens."""
    index: Int[Tensor, "batch pos"]
    """The column of a clean token's counterpart; -1: it has none."""

    @classmethod
    def named(
        cls,
        clean: Mapping[str, Sequence[Sequence[int]]],
        corrupt: Mapping[str, Sequence[Sequence[int]]],
        mask: Bool[Tensor, "batch corrupt_pos"],
        width: int,
    ) -> "Counterparts":
        """Name -> columns of each prompt, on both sides; `width` is that of the clean prompts."""
        index = torch.full((len(mask), width), -1)
        for name, rows in clean.items():
            for row, (here, there) in enumerate(zip(rows, corrupt[name], strict=True)):
                index[row, list(here)] = torch.tensor(there)
        return cls(mask=mask, index=index)

    def aligned(self, value: Tensor) -> Tensor:
        """[batch corrupt_pos ...] in the clean prompts' layout, [batch pos ...]; zero where there is no counterpart."""
        rows, index = torch.arange(len(self.index), device=value.device)[:, None], self.index.to(value.device)
        lacking = (index < 0).reshape(*index.shape, *[1] * (value.ndim - 2))
        return value[rows, index.clamp(min=0)].masked_fill(lacking, 0.0)

    def swapped(self, mask: Bool[Tensor, "batch pos"]) -> "Counterparts":
        """With clean and corrupt exchanged; `mask` is that of the clean prompts."""
        index = torch.full(self.mask.shape, -1, device=self.index.device)
        rows, columns = (self.index >= 0).nonzero(as_tuple=True)
        index[rows, self.index[rows, columns]] = columns
        return Counterparts(mask=mask, index=index)

    def moved(self, where: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch corrupt_pos"]:
        """The counterparts of some clean tokens."""
        moved = torch.zeros_like(self.mask)
        rows, columns = (where & (self.index >= 0)).nonzero(as_tuple=True)
        moved[rows, self.index[rows, columns]] = True
        return moved

    def require(self, where: Bool[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> None:
        """Errors: `InputError` where one of these tokens has no counterpart."""
        lacking = (where & real & (self.index.to(where.device) < 0)).sum(1)
        if bool(lacking.any()):
            row = int(lacking.argmax())
            raise InputError(
                f"clean and corrupt prompts differ in length, and {int(lacking[row])} tokens of prompt {row} that are "
                f"to take their corrupt value have no counterpart; {REMEDY}."
            )


def refuse_unequal(counterparts: Counterparts | None, what: str) -> None:
    """Errors: `InputError` for pairs of unequal length, where `what` needs the counterpart of every token."""
    if counterparts is not None:
        raise InputError(
            f"clean and corrupt prompts differ in length, and {what} needs every token's counterpart; {REMEDY}."
        )


def require_paired(clean: Mapping[str, Sequence[int]], corrupt: Mapping[str, Sequence[int]]) -> None:
    """Refuse names that do not say which token belongs to which: other names on one side, other numbers of tokens, or
    two counterparts of one token. Errors: `InputError`."""
    if clean.keys() != corrupt.keys():
        raise InputError(
            f"`positions` names {sorted(clean)}, `corrupt_positions` {sorted(corrupt)}; name the same in both prompts."
        )
    there: dict[int, tuple[int, str]] = {}
    back: dict[int, tuple[int, str]] = {}
    for name, tokens in clean.items():
        others = corrupt[name]
        if len(tokens) != len(others):
            raise InputError(
                f"position {name!r} has {len(tokens)} tokens in the clean prompt and {len(others)} in the corrupt one; "
                "name as many in both (a piece of text names its last token)."
            )
        for one, other in zip(tokens, others, strict=True):
            for known, here, twin in ((there, one, other), (back, other, one)):
                before = known.setdefault(here, (twin, name))
                if before[0] != twin:
                    raise InputError(
                        f"positions {before[1]!r} and {name!r} share a token of one prompt and not of the other, so it "
                        "would have two counterparts; leave one of the names out."
                    )
