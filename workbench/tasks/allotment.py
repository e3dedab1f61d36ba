"""Who gets which prompts: one allotment of rows to reference, discovery, training, validation and test, disjoint by
content.

    30 rows: 0 reference, 10 discovery, 8 train, 4 validation, 8 test

Uses take consecutive rows in this order. A size that is not chosen is a share of what the chosen ones leave, by
`SHARES`; a use without need of rows gets none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from workbench.errors import InputError

Use = Literal["reference", "discovery", "train", "validation", "test"]
USES: tuple[Use, ...] = get_args(Use)
SHARES: Mapping[Use, int] = {"reference": 10, "discovery": 10, "train": 8, "validation": 4, "test": 8}
"""Of rows whose use is not chosen: the sizes above for 30 rows of which the reference needs none."""
MOST_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """How many rows (or scenes) each use gets."""

    total: int
    sizes: Mapping[Use, int]
    unit: str = "rows"

    def __str__(self) -> str:
        return f"{self.total} {self.unit}: {', '.join(f'{self.sizes[use]} {use}' for use in USES)}"

    def rows_of(self, use: Use) -> slice:
        """The rows of a use, counted from 0."""
        start = sum(self.sizes[other] for other in USES[: USES.index(use)])
        return slice(start, start + self.sizes[use])

    def use_of(self, row: int) -> Use | None:
        """The use of a row, counted from 0; None where nobody has it."""
        return next((use for use in USES if row in range(*self.rows_of(use).indices(self.total))), None)

    def require(self, *uses: Use) -> None:
        """Refuse uses without rows. Errors: `InputError` with the key to change."""
        for use in uses:
            if self.sizes[use] == 0:
                if self.unit == "scenes":
                    raise InputError(f"{self}; there are no {use} prompts: set {key_of(use)} above 0.")
                largest = max(USES, key=lambda other: self.sizes[other])
                raise InputError(
                    f"{self}; none is left for {use}. Give more rows, or lower {key_of(largest)} "
                    f"({self.sizes[largest]})."
                )


def key_of(use: Use) -> str:
    """The key of a recipe that sets a size."""
    return f"data.{use}_scenes"


def allot(total: int, wanted: Mapping[Use, int | None], *, idle: Sequence[Use] = (), unit: str = "rows") -> Allotment:
    """An allotment of `total` rows. `wanted`: sizes, None for a share of what is left; `idle`: uses that need no rows,
    whatever is wanted for them. Errors: `InputError` naming the keys to lower, where more are wanted than there are."""
    chosen: dict[Use, int | None] = {use: 0 if use in idle else wanted.get(use) for use in USES}
    taken: dict[Use, int] = {use: size for use, size in chosen.items() if size}
    left = total - sum(taken.values())
    if left < 0:
        keys = ", ".join(f"{key_of(use)} {size}" for use, size in taken.items())
        raise InputError(
            f"{total} {unit}, but {sum(taken.values())} are wanted ({keys}): {-left} too many. Give more {unit}, or "
            f"lower {key_of(max(taken, key=lambda use: taken[use]))}."
        )
    open_uses: list[Use] = [use for use in USES if chosen[use] is None]
    shares = _shares(left, open_uses)
    return Allotment(total=total, sizes={use: shares.get(use, chosen[use] or 0) for use in USES}, unit=unit)


def _shares(total: int, uses: Sequence[Use]) -> dict[Use, int]:
    """Whole shares of a total by weight, each at least 1 while there are enough."""
    if not uses:
        return {}
    weights: dict[Use, int] = {use: SHARES[use] for use in uses}
    whole = sum(weights.values())
    least = 1 if total >= len(weights) else 0
    shares: dict[Use, int] = {use: max(least, total * weight // whole) for use, weight in weights.items()}
    spare = total - sum(shares.values())
    order: list[Use] = sorted(uses, key=lambda use: (-(total * weights[use] % whole), USES.index(use)))
    for step in range(abs(spare)):
        use = order[step % len(order)] if spare > 0 else max(shares, key=lambda use: shares[use])
        shares[use] += 1 if spare > 0 else -1
    return shares


def refuse_copies(allotment: Allotment, contents: Sequence[str], numbers: Sequence[int], *, source: str) -> None:
    """Refuse equal prompts on two sides of the allotment. `contents`: the clean prompt of each row; `numbers`: how each
    is named. Errors: `InputError` listing the rows."""
    first: dict[str, tuple[Use, int]] = {}
    copies: list[str] = []
    for row, (content, number) in enumerate(zip(contents, numbers, strict=True)):
        use = allotment.use_of(row)
        if use is None:
            continue
        before, earlier = first.setdefault(content, (use, number))
        if before != use:
            copies.append(f"  row {number} ({use}) repeats row {earlier} ({before})")
    if copies:
        more = len(copies) - MOST_SHOWN
        raise InputError(
            f"{source} has {len(copies)} prompts on two sides of {allotment}:\n"
            + "\n".join(copies[:MOST_SHOWN])
            + (f"\n  ... and {more} more" if more > 0 else "")
            + "\nRemove the copies, or put equal rows side by side, so that one use gets them all."
        )
