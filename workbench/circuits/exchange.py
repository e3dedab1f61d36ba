"""Growing and pruning: put back what repairs most, remove what then costs least, until no exchange helps.

Elimination never takes a removal back, so a part that went early may be worth more than one that is left. From a
circuit C that keeps the target:

    prune     C without p, for the p that costs least, where that keeps the target too
    exchange  C with p without q, for the p that repairs most and the q of what then is there that costs least, where
              its criterion is above that of C

The size never grows; each exchange raises the criterion, so it ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.elimination import Site
from workbench.circuits.remaining import Remaining

SLACK = 1e-6
"""Least gain of an exchange: below, it is rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """A circuit after growing and pruning."""

    left: tuple[Site, ...]
    pruned: int
    exchanges: int


def exchange(
    remaining: Remaining,
    sites: Sequence[Site],
    left: Sequence[Site],
    reaches: Callable[[Float[Tensor, "measure example"]], bool],
) -> Exchanged:
    """Grow and prune from `left`, which keeps the target; `reaches` judges what is measured of a circuit."""
    current, pruned, exchanges = list(left), 0, 0
    while True:
        if len(smaller := _without_cheapest(remaining, sites, current)) and reaches(
            _measured(remaining, sites, smaller)
        ):
            current, pruned = smaller, pruned + 1
            continue
        better = _exchanged(remaining, sites, current)
        if better is None:
            return Exchanged(
                left=tuple(site for site in sites if site in set(current)), pruned=pruned, exchanges=exchanges
            )
        current, exchanges = better, exchanges + 1


def _exchanged(remaining: Remaining, sites: Sequence[Site], current: Sequence[Site]) -> list[Site] | None:
    """The circuit after its best exchange; None where that is no gain."""
    outside = [site for site in sites if site not in set(current)]
    if not outside or not current:
        return None
    before = float(_measured(remaining, sites, current)[0].mean())
    grown = [float(_measured(remaining, sites, [*current, site])[0].mean()) for site in outside]
    added = outside[int(torch.tensor(grown).argmax())]
    after = _without_cheapest(remaining, sites, [*current, added])
    if set(after) == set(current) or float(_measured(remaining, sites, after)[0].mean()) <= before + SLACK:
        return None
    return after


def _measured(remaining: Remaining, sites: Sequence[Site], rest: Sequence[Site]) -> Tensor:
    return remaining.after([(site.part, site.position) for site in sites if site not in set(rest)])


def _without_cheapest(remaining: Remaining, sites: Sequence[Site], rest: Sequence[Site]) -> list[Site]:
    remaining.restart()
    remaining.remove([(site.part, site.position) for site in sites if site not in set(rest)])
    values = remaining.without_each([(site.part, site.position) for site in rest]).mean(1)
    cheapest = rest[int(values.argmax())]
    return [site for site in rest if site != cheapest]
