"""Faithfulness of circuits of edges, and its areas over edge budgets exactly as MIB defines them (Mueller et al. 2025).

    f(C) = (m(C) - m(no edge)) / (m(all edges) - m(no edge))
    CPR = area under f over the shares .001, .002, .005, .01, .02, .05, .1, .2, .5, 1 of the edges (trapezoids)
    CMD = area of |1 - f| over the same shares

Every edge outside a circuit carries the corrupt activation, so no edge at all is the corrupt run. CPR is taken with
edges chosen by signed score and CMD by size, in MIB's table; the areas begin at .001, not at 0.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from workbench import storage
from workbench.circuits.circuit import Circuit
from workbench.circuits.edge_selection import EdgeSelection, Mask, Ranking, edge_mask
from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.patching.attribution import Edges
from workbench.patching.edge_circuit import EdgePatcher
from workbench.patching.execution import Execution
from workbench.patching.progress import KnownValues, identity, progress_bar
from workbench.patching.reference import reading, require_model, require_pairs
from workbench.tasks.base import PromptPairs
from workbench.values.display import Row, Shown
from workbench.values.metrics import Metric, metric_named
from workbench.values.scores import Scores

BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's shares of the edges."""
NOTHING = 1e-5
"""Below this share of the whole model's metric (or of 1) a difference is rounding."""
BY_SIZE = EdgeSelection()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EdgeCurve(Shown):
    """Faithfulness over edge budgets."""

    metric: str
    selection: str
    """How edges were chosen, in words."""
    budgets: tuple[float, ...]
    """Shares of all edges."""
    edges: tuple[int, ...]
    """Edges of each circuit that lie on a way from the embedding to the logits (MIB's count)."""
    total_edges: int
    faithfulness: tuple[float, ...]
    full: float
    """The metric of the whole model."""
    empty: float
    """The metric of no edge: the corrupt run's."""

    def __post_init__(self) -> None:
        if not len(self.budgets) == len(self.edges) == len(self.faithfulness) or self.total_edges < 1:
            raise InputError("an edge curve has a circuit and a value for each of its budgets.")

    def _title(self) -> str:
        return (
            f"Faithfulness over edges ({self.metric}; {self.selection}; others of {self.total_edges} corrupt): "
            f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}"
        )

    def _table(self) -> tuple[Row, Sequence[Row]]:
        rows = zip(self.budgets, self.edges, self.faithfulness, strict=True)
        return ("budget", "edges", "faithfulness"), [(f"{share:g}", str(n), f"{f:.3f}") for share, n, f in rows]

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: area under the curve."""
        return float(np.trapezoid(self.faithfulness, self.budgets))

    @property
    def cmd(self) -> float:
        """Circuit-model difference: area between the curve and 1."""
        return float(np.trapezoid([abs(1 - value) for value in self.faithfulness], self.budgets))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the areas; `from_json` reads them back."""
        return {**asdict(self), "cpr": self.cpr, "cmd": self.cmd}

    @classmethod
    def from_json(cls, value: Any) -> "EdgeCurve":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        return storage.read_typed(value, cls, what="an edge curve", beside=("cpr", "cmd"))


class EdgeFaithfulness:
    """f of circuits of edges on some pairs; each is run once.

    `execution.file`: where the values are kept as they come. Errors: `InputError` as for `EdgePatcher`, where the
    corrupt run has the clean run's metric (nothing to recover), and for another evaluation's file.
    """

    def __init__(
        self, model: HookedModel, pairs: PromptPairs, *, metric: str | Metric, execution: Execution = Execution()
    ) -> None:
        require_model(model)
        require_pairs(pairs)
        self.model, self.pairs, self.metric = model, reading(model, pairs), metric_named(metric)
        self.execution, self.patcher = execution, EdgePatcher(model, reading(model, pairs), execution=execution)
        self._known = KnownValues(execution.path, self._identify)
        there = self.patcher.there
        self.full, self.empty = self._metric(there), self._metric(there & False)
        if abs(self.full - self.empty) < NOTHING * max(1.0, abs(self.full)):
            raise InputError("the corrupt prompts give the clean prompts' metric: nothing to recover. Use other pairs.")

    @property
    def edges(self) -> Edges:
        """The graph of the model."""
        return self.patcher.edges

    def of(self, circuit: Circuit | Mask) -> float:
        """(m(C) - m(no edge)) / (m(all edges) - m(no edge)) of a circuit's edges, or of those that a mask marks."""
        present = edge_mask(self.edges, circuit) if isinstance(circuit, Circuit) else circuit
        return (self._metric(present) - self.empty) / (self.full - self.empty)

    def _metric(self, present: Mask) -> float:
        present = self.edges.pruned(present)

        def measured() -> float:
            logits = self.patcher.logits(present)
            return float(self.metric(logits, self.pairs.answers, self.pairs.distractors).double().mean())

        return self._known.of(storage.digest(present), measured)

    def _identify(self) -> str:
        return identity("edge faithfulness", self.model, [self.pairs], metrics=[self.metric], settings={})


def edge_curve(
    faithfulness: EdgeFaithfulness,
    scores: Scores,
    *,
    selection: EdgeSelection = BY_SIZE,
    budgets: Sequence[float] = BUDGETS,
) -> EdgeCurve:
    """f of the circuits of each budget (a share of the edges; MIB's by default), chosen from scores of edges.

    Errors: `InputError` for scores of another model's edges, and budgets that are no shares in rising order.
    """
    if list(budgets) != sorted(set(budgets)) or not budgets or budgets[0] < 0 or budgets[-1] > 1:
        raise InputError(f"budgets are shares of the edges in rising order, from 0 to 1, not {tuple(budgets)}.")
    ranking = Ranking(scores, selection)
    if ranking.edges != faithfulness.edges:
        raise InputError("these scores are of another model's edges; make them with the model that is evaluated.")
    counts, values = list[int](), list[float]()
    for share in progress_bar(
        budgets,
        desc=f"edge circuits of {faithfulness.model.name}",
        unit="circuit",
        shown=faithfulness.execution.progress,
    ):
        chosen = ranking.edges.pruned(ranking.choose(int(share * ranking.total)))
        counts.append(int((chosen * ranking.counts).sum()))
        values.append(faithfulness.of(chosen))
    return EdgeCurve(
        metric=faithfulness.metric.unit,
        selection=str(selection),
        budgets=tuple(map(float, budgets)),
        edges=tuple(counts),
        total_edges=ranking.total,
        faithfulness=tuple(values),
        full=faithfulness.full,
        empty=faithfulness.empty,
    )
