"""Elimination as a method: exact, or in rounds by the gradients of gates and finished exactly."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated
from torch import Tensor

from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.elimination import ROLE, Elimination, EliminationConfig, Site, eliminate
from workbench.circuits.exchange import Exchanged, exchange
from workbench.circuits.methods.base import Inquiry
from workbench.circuits.remaining import KL, Remaining
from workbench.circuits.search_curve import Of, SearchCurve, plain
from workbench.circuits.search_result import CircuitSearch
from workbench.tasks.stages import Stage
from workbench.values.refs import Head, Position
from workbench.values.scores import Scores

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What both ways have in common."""

    target: Annotated[float, Field(gt=0)] = 0.9
    """How much of the model the circuit must keep, as a share (with `until: kl_divergence`, nats at most)."""
    until: Of = "accuracy"
    """Share of what: of the whole model's accuracy; of the way from nothing left to the whole model in the metric (the
    logit difference recovered, say); or the KL divergence from the whole model."""
    by_kl: bool = False
    """Remove, each time, what adds least to the KL divergence from the whole model, in place of what costs least of
    `discovery.metric`."""
    positions: tuple[Position, ...] = ()
    """Named positions at which parts are removed one by one, apart from what they leave of the prompts; empty: parts
    are removed everywhere."""
    mlps: bool = False
    """Remove MLPs too."""
    to_the_end: bool = False
    """Go on below the target until nothing is left: the whole ranking, with its curve."""
    exchange: bool = False
    """Afterwards, put back what repairs most and remove what costs least, until no exchange helps."""

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """The named positions and what they leave, or everywhere."""
        return (*self.positions, f"not {'+'.join(self.positions)}") if self.positions else ("all",)

    def _parts(self, heads: int, layers: int) -> int:
        return (heads + (layers if self.mlps else 0)) * (len(self.positions) + 1 if self.positions else 1)

    def _config(self, inquiry: Inquiry) -> EliminationConfig:
        names = {field.name for field in fields(EliminationConfig)}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name in names}
        return EliminationConfig(criterion=KL if self.by_kl else inquiry.metric, **own)


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class Exactly(_Options):
    """Each time the part is removed whose removal from what is left costs least, every candidate being run."""

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The last of what was left that reaches the target."""
        return _found(inquiry, self._config(inquiry), "elimination", exchanging=self.exchange)

    def runs(self, heads: int, layers: int) -> int:
        """n (n + 1) / 2 of n parts, most of which run only what lies above the removed part."""
        parts = self._parts(heads, layers)
        return parts * (parts + 1) // 2


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class ByGates(_Options):
    """Rounds remove a share of what is left at once, by attribution that is estimated anew on what is left; a round
    that would miss the target is halved, and the rest goes exactly."""

    exact_from: Annotated[int, Field(ge=1)] = 12
    """Exact from this many parts on."""
    round_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of what is left that one round removes."""
    round_steps: Annotated[int, Field(ge=1)] = 3
    """Steps of a round's integrated gradient."""
    prompts: Annotated[int, Field(ge=1)] | None = None
    """What goes is decided on the first so many prompts, whether the target is kept on all. None: on all."""

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The last of what was left that reaches the target."""
        return _found(inquiry, self._config(inquiry), "elimination_by_gates", exchanging=self.exchange)

    def runs(self, heads: int, layers: int) -> int:
        """Gradients of each round, then the exact end."""
        parts, rounds = self._parts(heads, layers), 0
        while parts > self.exact_from:
            parts -= min(parts - self.exact_from, max(1, int(self.round_share * parts)))
            rounds += 1
        return rounds * (3 * self.round_steps + 1) + parts * (parts + 1) // 2


def _found(inquiry: Inquiry, config: EliminationConfig, name: str, *, exchanging: bool) -> CircuitSearch:
    execution = inquiry.executed(name)
    if execution.path is not None:
        execution = replace(execution, file=execution.path.with_suffix(".json"))
    result = eliminate(inquiry.model, inquiry.pairs, inquiry.replacement, config, execution=execution)
    left, notes = result.left(result.removals), _notes(result)
    if exchanging:
        grown = _exchanged(inquiry, result)
        left, notes = grown.left, (*notes, _told(result, grown))
    members = [Member(site.part, ROLE, site.position) for site in left if isinstance(site.part, Head)]
    circuit = Circuit.of(members, shape=inquiry.shape, method=result.method)
    ranked = [site.part for site in (*left, *result.ranking) if isinstance(site.part, Head)]
    if not exchanging:
        ranked = [site.part for site in result.ranking if isinstance(site.part, Head)]
    return CircuitSearch(
        circuit=circuit,
        scores=removal_costs(inquiry, result, left),
        method=name,
        reference=f"removed parts: {inquiry.words}",
        ranking=tuple(dict.fromkeys(ranked)),
        acting=_acting(result) | circuit.scope if config.positions else {},
        curve=_curve(inquiry, result),
        notes=notes,
    )


def _remaining(inquiry: Inquiry, config: EliminationConfig) -> Remaining:
    return Remaining(
        inquiry.model, inquiry.pairs, inquiry.replacement, config.criterion, inquiry.execution, mlps=config.mlps
    )


def _exchanged(inquiry: Inquiry, result: Elimination) -> Exchanged:
    def reaches(measured: Tensor) -> bool:
        criterion, accuracy, divergence = measured.mean(1).tolist()
        return result.keeps(criterion=criterion, accuracy=accuracy, divergence=divergence)

    return exchange(_remaining(inquiry, result.config), result.sites, result.left(result.removals), reaches)


def _told(result: Elimination, grown: Exchanged) -> str:
    before = set(result.left(result.removals))
    into, out = [str(site) for site in grown.left if site not in before], sorted(map(str, before - set(grown.left)))
    return (
        f"{ROLE}: grown and pruned ({grown.exchanges} exchanges, {grown.pruned} pruned): {len(grown.left)} parts, with "
        f"{' '.join(into) or 'none'} put back for {' '.join(out) or 'none'}; the curve is of the elimination before"
    )


def _acting(result: Elimination) -> dict[Head, tuple[Position, ...]]:
    """The circuit's heads at their positions, another head at the position from which it was removed last."""
    others = {site.part: (site.position,) for site in reversed(result.ranking) if isinstance(site.part, Head)}
    return others | result.circuit.scope


def _curve(inquiry: Inquiry, result: Elimination) -> SearchCurve:
    total, count = len(result.sites), len(result.order)
    sizes = [total - removed for removed in range(count, -1, -1)]
    means = {
        "metric": result.criterion.values.mean(-1),
        "accuracy": result.accuracy.values.mean(-1),
        "divergence": result.divergence.values.mean(-1),
    }
    columns = {name: plain(values.flip(0).tolist()) for name, values in means.items()}
    if sizes[0] > 0:
        sizes = [0, *sizes]
        columns = {
            name: (result.empty["criterion" if name == "metric" else name], *values) for name, values in columns.items()
        }
    return SearchCurve(
        sizes=tuple(sizes),
        **columns,
        unit=result.criterion.unit,
        ablation=inquiry.replacement.kind,
        prompts=len(inquiry.pairs),
    )


def removal_costs(inquiry: Inquiry, result: Elimination, left: Sequence[Site]) -> Scores:
    """What each head's removal costs: of the circuit's heads from the circuit, of the others when they went (NaN inside
    a round of removals). A head at several positions counts with the largest."""
    remaining = _remaining(inquiry, result.config)
    gone = [site for site in result.sites if site not in set(left)]
    remaining.remove([(site.part, site.position) for site in gone])
    without = remaining.without_each([(site.part, site.position) for site in left])
    costs = dict(zip(left, remaining.measured()[0] - without, strict=True))
    rows = result.criterion.values
    costs |= {site: (rows[at] - rows[at + 1]).double() for at, site in enumerate(result.order) if site in set(gone)}
    values = torch.full((*inquiry.shape, len(inquiry.pairs)), torch.nan, dtype=torch.float64)
    for site, cost in costs.items():
        if isinstance(site.part, Head):
            known = values[site.part.layer, site.part.index]
            if bool(known.isnan().all()) or float(cost.mean()) > float(known.mean()):
                values[site.part.layer, site.part.index] = cost
    return Scores.of_heads(values.float(), unit=f"fall of {result.criterion.unit} when removed from what is left")


def _notes(result: Elimination) -> tuple[str, ...]:
    left = result.left(result.removals)
    exact = [rivals for rivals in result.rivals[: result.removals] if rivals is not None]
    notes = [result.summary()]
    if exact:
        tied = sum(rivals > 0 for rivals in exact)
        notes.append(
            f"{ROLE}: at {tied} of {len(exact)} exact removals these prompts can't tell the removed part from another "
            f"(on average {sum(exact) / len(exact):.1f} others cost as little within the 95 % interval)"
        )
    mlps = [str(site) for site in left if not isinstance(site.part, Head)]
    if result.config.mlps:
        notes.append(f"{ROLE}: MLPs that are left: {' '.join(mlps) or 'none'}")
    return tuple(notes)
