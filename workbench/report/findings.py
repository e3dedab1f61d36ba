"""What a run found, in three sentences of its own numbers: the circuits, what alignment gained, what is undecided.

A difference is decided where its 95 % interval over seeds leaves out 0; of a single seed, which has no such interval,
where McNemar's exact test on the same prompts gives p < 0.05 (and then for this training alone).
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from workbench.circuits.circuit import Circuit
from workbench.circuits.evaluation import CircuitReport
from workbench.experiment.conditions import CONDITIONS, METHOD, TITLES
from workbench.experiment.results import OUTCOMES, ConditionResult, read_outcomes
from workbench.experiment.runs import RunFolder
from workbench.values.statistics import Comparison, compared

LEVEL = 0.05
"""Of p, below which a single training's difference is decided."""
AGAINST = (
    *reversed(CONDITIONS[METHOD].compared_with),
    *(name for name, each in CONDITIONS.items() if each.aligns in ("random", "shuffled")),
)
"""What the method is set against: the same without alignment first, then what it was compared with, and alignment to
the wrong heads."""


def findings(
    circuits: Mapping[str, Circuit],
    reports: Mapping[str, CircuitReport],
    rows: Sequence[ConditionResult],
    comparisons: Mapping[str, Comparison],
) -> list[str]:
    """The three sentences. `circuits` and `reports` by model; `comparisons`: the method against each control that was
    run."""
    seeds = {row.seed for row in rows if row.condition == METHOD}
    return [
        discovered(circuits, reports),
        gained(comparisons, accuracy=mean_accuracy(rows), seeds=len(seeds)),
        undecided(comparisons, seeds=len(seeds)),
    ]


def discovered(circuits: Mapping[str, Circuit], reports: Mapping[str, CircuitReport]) -> str:
    """How many heads each circuit has, and what they do alone."""
    if not circuits:
        return "No circuit has been searched for in this run yet."
    parts = [_circuit(name, circuit, reports.get(name)) for name, circuit in circuits.items()]
    return f"Found: {'; '.join(parts)}."


def _circuit(name: str, circuit: Circuit, report: CircuitReport | None) -> str:
    total = circuit.shape[0] * circuit.shape[1]
    share = f"{len(circuit.heads)} of {total} attention heads ({100 * circuit.fraction:.0f} %)"
    if report is None:
        return f"the {name}'s circuit has {share}, and has not been evaluated alone"
    faithful = "undefined" if report.faithfulness is None else f"{report.faithfulness:.2f}"
    return (
        f"the {name}'s circuit has {share}; alone they answer {report.circuit_accuracy:.3f} of the test prompts, the "
        f"whole model {report.full_accuracy:.3f} (faithfulness {faithful}; as many random heads "
        f"{report.random_circuit_accuracy:.3f})"
    )


def gained(comparisons: Mapping[str, Comparison], *, accuracy: float | None, seeds: int) -> str:
    """The method against each of its controls: difference in accuracy, interval, p."""
    if accuracy is None:
        return f"What alignment gains can't be said: {TITLES[METHOD]}, the method, has not been evaluated in this run."
    trained = f"Aligned ({TITLES[METHOD]}, {seeds} seed{'' if seeds == 1 else 's'}), the student answers {accuracy:.3f}"
    if not comparisons:
        return f"{trained}; what alignment gained of it can't be said, because none of its controls has been evaluated."
    return f"{trained}: {'; '.join(_difference(name, each) for name, each in comparisons.items())}."


def _difference(name: str, comparison: Comparison) -> str:
    mean = comparison.over_seeds.mean
    by = f"{abs(mean):.3f} {'more' if mean > 0 else 'less'} than" if f"{abs(mean):.3f}" != "0.000" else "as many as"
    return f"{by} {TITLES[name]} ({_spread(comparison)}, p {_p_value(comparison.pooled_p)})"


def _spread(comparison: Comparison) -> str:
    """The interval over seeds; of a single seed the one over prompts, and said so."""
    single = comparison.over_seeds.low is None
    over, of = (comparison.over_prompts, "prompts alone") if single else (comparison.over_seeds, "seeds")
    if over.low is None or over.high is None:
        return "no interval"
    return f"95 % interval over {of} {over.low:+.3f} to {over.high:+.3f}"


def undecided(comparisons: Mapping[str, Comparison], *, seeds: int) -> str:
    """Which differences could be none at all, and what a single seed leaves open."""
    if not seeds:
        return "Undecided: whether alignment gains anything."
    unclear = [TITLES[name] for name, comparison in comparisons.items() if not decided(comparison)]
    missing = [TITLES[name] for name in AGAINST if name not in comparisons and CONDITIONS[name].usual]
    parts = [f"the difference from {_listed(unclear)}, which could be none"] if unclear else []
    parts += [f"the difference from {_listed(missing)}, not run"] if missing else []
    parts += ["how much another training would differ, because one seed has no interval over seeds"] * (seeds == 1)
    return f"Undecided: {'; '.join(parts)}." if parts else "None of these differences is undecided at 95 %."


def decided(comparison: Comparison) -> bool:
    """Whether a difference is told from 0."""
    low, high = comparison.over_seeds.low, comparison.over_seeds.high
    return comparison.pooled_p < LEVEL if low is None or high is None else low > 0 or high < 0


def mean_accuracy(rows: Sequence[ConditionResult], condition: str = METHOD) -> float | None:
    """The whole model's accuracy, mean over seeds; None where the condition has not been evaluated."""
    values = [row.full_accuracy for row in rows if row.condition == condition]
    return sum(values) / len(values) if values else None


def comparisons_of(folder: RunFolder, rows: Sequence[ConditionResult], *, scenes: int) -> dict[str, Comparison]:
    """The method against each of `AGAINST` on the seeds of both: the whole model on the test prompts, of `scenes` that
    count as one each (0: every prompt does)."""
    comparisons = {}
    for name in AGAINST:
        ours, theirs = ({row.seed for row in rows if row.condition == condition} for condition in (METHOD, name))
        seeds = sorted(ours & theirs)
        first, second = (_outcomes(folder, condition, seeds) for condition in (METHOD, name))
        if seeds and first and second:
            prompts = len(first[0])
            clusters = prompts // scenes if scenes and not prompts % scenes else 1
            comparisons[name] = compared(first, second, clusters=clusters)
    return comparisons


def _outcomes(folder: RunFolder, condition: str, seeds: Sequence[int]) -> list[Tensor]:
    """Right or wrong of each prompt, a vector a seed; nothing where one is missing."""
    places = [folder.condition(condition, seed) for seed in seeds]
    there = all((place / OUTCOMES).exists() for place in places)
    return [read_outcomes(place)["full"] for place in places] if there else []


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
