"""Faithfulness over circuit size, with equal-size random circuits beside it, and its two areas (MIB; Mueller et al.
2025).

    f(C) = (m(C) - m(empty)) / (m(model) - m(empty))
    CPR = integral of f over the share of heads, from none to all (higher: performance is recovered early)
    CMD = integral of |1 - f| (lower: the circuit behaves as the model)

Everything outside a circuit is ablated: by its mean over reference prompts, or by the prompt's own corrupt run, as MIB
does it; sizes count attention heads (MLPs and the embedding are always kept), where MIB counts edges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from workbench import seeds, storage
from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import ablated_logits
from workbench.patching.execution import Execution
from workbench.patching.progress import KnownValues, identity, progress_bar
from workbench.patching.replacement import BATCH, Kind, Replacement, replacement_named
from workbench.tasks.base import PromptPairs
from workbench.values.display import Row, Shown
from workbench.values.metrics import Metric, metric_named
from workbench.values.refs import Head, Position, heads_named


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class FaithfulnessCurve(Shown):
    """Faithfulness of the first k heads of a ranking, and of k random heads."""

    metric: str
    ablation: Kind
    """What stands in for the heads outside: `mean`, `resampled`, `counterfactual` or `zero`."""
    sizes: tuple[int, ...]
    total_heads: int
    faithfulness: tuple[float, ...]
    random: tuple[tuple[float, ...], ...]
    """One curve for each random ranking."""
    without: tuple[float, ...]
    """f of the whole model without the first k heads: how far it falls when they alone are ablated."""
    random_without: tuple[tuple[float, ...], ...]
    """The same for the random rankings."""
    full: float
    """The metric of the whole model."""
    empty: float
    """The metric with every head ablated."""
    scope: str = "everywhere"
    """Where the heads are kept: `everywhere`, at their own `positions` (then all heads together are not yet the model),
    or one named position."""

    def __post_init__(self) -> None:
        curves = (self.faithfulness, self.without, *self.random, *self.random_without)
        if self.total_heads < 1 or any(len(curve) != len(self.sizes) for curve in curves):
            raise InputError("a faithfulness curve has a value for each of its sizes, of at least one head.")

    def _title(self) -> str:
        return (
            f"Faithfulness ({self.metric}; the other of {self.total_heads} heads ablated: {self.ablation}; scope: "
            f"{self.scope}): "
            f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}"
        )

    def _table(self) -> tuple[Row, Sequence[Row]]:
        rows = []
        for place, size in enumerate(self.sizes):
            others = [curve[place] for curve in self.random]
            without = f"{self.without[place]:.3f}" if self.without else ""
            random = f"{_mean_and_deviation(others)[0]:.3f}" if others else ""
            rows.append((str(size), f"{self.faithfulness[place]:.3f}", random, without))
        return ("heads", "faithfulness", "random heads", "without them"), rows

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: area under the curve."""
        return self._area(self.faithfulness)

    @property
    def cmd(self) -> float:
        """Circuit-model difference: area between the curve and 1."""
        return self._area([abs(1 - value) for value in self.faithfulness])

    @property
    def random_cpr(self) -> tuple[float, float]:
        """Mean and standard deviation over the random rankings."""
        return _mean_and_deviation([self._area(curve) for curve in self.random])

    @property
    def random_cmd(self) -> tuple[float, float]:
        """Mean and standard deviation over the random rankings."""
        return _mean_and_deviation([self._area([abs(1 - value) for value in curve]) for curve in self.random])

    def _area(self, values: Sequence[float]) -> float:
        return float(np.trapezoid(values, np.array(self.sizes) / self.total_heads))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the areas; `from_json` reads them back."""
        areas = {"cpr": self.cpr, "cmd": self.cmd, "random_cpr": self.random_cpr, "random_cmd": self.random_cmd}
        return {**asdict(self), **areas}

    @classmethod
    def from_json(cls, value: Any) -> "FaithfulnessCurve":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        if isinstance(value, Mapping):
            value = {"ablation": "mean", "scope": "everywhere", **value}  # files from before there was a choice
        beside = ("cpr", "cmd", "random_cpr", "random_cmd")
        return storage.read_typed(value, cls, what="a faithfulness curve", beside=beside)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def default_sizes(total: int) -> tuple[int, ...]:
    """0, 1, 2, 3, 5, 8, ... and all heads."""
    sizes, step = [0], (1, 2)
    while step[0] < total:
        sizes.append(step[0])
        step = (step[1], step[0] + step[1])
    return (*sizes, total)


class Faithfulness:
    """f of sets of heads that are kept at a position, all others ablated; each set is run once.

    `execution.file`: where the values are kept as they come, so that an interrupted evaluation goes on. Errors:
    `InputError` when the replacement does not fit the prompts (a mean over prompts among them), when ablating every
    head does not change the metric (nothing to recover), and for another evaluation's file.
    """

    def __init__(
        self,
        model: HookedModel,
        pairs: PromptPairs,
        replacement: Replacement | Literal["zero"],
        *,
        metric: str | Metric,
        position: Position = "all",
        acting: Mapping[Head, tuple[Position, ...]] | None = None,
        execution: Execution = Execution(),
    ) -> None:
        """`acting`: where each head is kept, in place of `position`, which is that of heads it leaves out."""
        self.model, self.pairs, self.metric, self.position = model, pairs, metric_named(metric), position
        self.acting = dict(acting or {})
        self.replacement, self.execution = replacement_named(replacement), execution
        self._known = KnownValues(execution.path, self._identify)
        self.full, self.empty = self._metric((), complement=False), self._metric(())
        if abs(self.full - self.empty) < 1e-9:
            raise InputError(
                "ablating every head does not change the metric: nothing to recover. Use prompts or a metric on which "
                "heads matter."
            )

    def _identify(self) -> str:
        return identity(
            "faithfulness",
            self.model,
            [self.pairs],
            metrics=[self.metric],
            replacement=self.replacement.identity(),
            settings={"position": self.position, **({"acting": sorted(self.acting.items())} if self.acting else {})},
        )

    @property
    def scope(self) -> str:
        """Where heads are kept, in a word."""
        return "positions" if self.acting else "everywhere" if self.position == "all" else self.position

    def of(self, heads: Sequence[Head | str]) -> float:
        """(m(C) - m(empty)) / (m(model) - m(empty))."""
        return (self._metric(heads) - self.empty) / (self.full - self.empty) if heads else 0.0

    def without(self, heads: Sequence[Head | str]) -> float:
        """The same of the model with only these heads ablated (at the position)."""
        return (self._metric(heads, complement=False) - self.empty) / (self.full - self.empty) if heads else 1.0

    @property
    def ablation(self) -> Kind:
        """What stands in for an ablated head, in a word."""
        return self.replacement.kind

    def _metric(self, heads: Sequence[Head | str], *, complement: bool = True) -> float:
        some = sorted(set(heads_named(heads)))
        key = f"{'only' if complement else 'without'} {' '.join(map(str, some))}"

        def measured() -> float:
            logits = ablated_logits(
                self.model,
                self.pairs,
                {head: self.acting.get(head, (self.position,)) for head in some},
                self.replacement,
                complement=complement,
                batch=self.execution.batch_of(BATCH),
            )
            return float(self.metric(logits, self.pairs.answers, self.pairs.distractors).mean())

        return self._known.of(key, measured)


def faithfulness_curve(
    faithfulness: Faithfulness,
    ranking: Sequence[Head | str],
    *,
    sizes: Sequence[int] | None = None,
    random_rankings: int = 3,
    seed: int = 0,
) -> FaithfulnessCurve:
    """f of the first k heads of a ranking alone, and of the model without them, for several k; the same for random
    rankings. Heads that the ranking leaves out come last."""
    model, ranked = faithfulness.model, heads_named(ranking)
    order = [*ranked, *(head for head in model.heads if head not in set(ranked))]
    chosen = default_sizes(len(order)) if sizes is None else tuple(sorted(set(sizes)))
    shuffled = [
        seeds.chooser(seed, "random ranking", draw).sample(order, len(order)) for draw in range(random_rankings)
    ]
    by_these, by_others = [], []
    with progress_bar(
        total=2 * (1 + len(shuffled)) * len(chosen),
        desc=f"faithfulness of {model.name}",
        unit="circuit",
        shown=faithfulness.execution.progress,
    ) as bar:
        for heads in (order, *shuffled):
            for measure, curves in ((faithfulness.of, by_these), (faithfulness.without, by_others)):
                curves.append(tuple(_counted(bar, measure(heads[:size])) for size in chosen))
    return FaithfulnessCurve(
        metric=faithfulness.metric.unit,
        ablation=faithfulness.ablation,
        sizes=chosen,
        total_heads=len(order),
        faithfulness=by_these[0],
        random=tuple(by_these[1:]),
        without=by_others[0],
        random_without=tuple(by_others[1:]),
        full=faithfulness.full,
        empty=faithfulness.empty,
        scope=faithfulness.scope,
    )


def _counted(bar: "tqdm[Any]", value: float) -> float:
    bar.update()
    return value


def greedy(faithfulness: Faithfulness, ranking: Sequence[Head], *, target: float) -> list[Head]:
    """The shortest beginning of a ranking whose faithfulness reaches `target` (all of it, if none does)."""
    sizes = range(1, len(ranking) + 1)
    return list(ranking[: next((size for size in sizes if faithfulness.of(ranking[:size]) >= target), len(ranking))])
