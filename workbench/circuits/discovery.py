"""Finding a circuit: backward search by path patching, or the strongest heads by mean ablation.

`backward_search` walks a task's stages from the logits down: the heads of a stage act at its position and write into
the heads of the stage above (Prakash et al. 2024 for entity tracking: value fetchers, position transmitters, position
detectors, structure readers).
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from workbench.circuits import selection
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.config import DiscoveryConfig
from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.patching.engine.passage import Route
from workbench.patching.execution import Execution
from workbench.patching.path import activation_baselines, prepared, sweep_heads
from workbench.tasks.base import PromptPairs
from workbench.tasks.stages import Stage, require_stages
from workbench.values.display import Row, Shown
from workbench.values.metrics import Metric, metric_named
from workbench.values.refs import Head, Receiver
from workbench.values.scores import Scores


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, config=ConfigDict(arbitrary_types_allowed=True))
class Discovery(Shown):
    """A circuit and the scores that chose it, stage by stage."""

    circuit: Circuit
    scores: Mapping[str, Scores]
    seconds: Mapping[str, float]
    """When each stage was scored, from the start of the search on."""

    def _title(self) -> str:
        return f"Found in {max(self.seconds.values(), default=0.0):.1f} s: {self.circuit._title()}"

    def _table(self) -> tuple[Row, Sequence[Row]]:
        """Each stage's heads, strongest first, with their mean effects."""
        rows = []
        for stage, scores in self.scores.items():
            means = scores.mean()
            heads = [head for head in scores.ranked() if head in self.circuit.roles.get(stage, ())]
            rows.append((stage, "  ".join(f"{head} {float(means[head.layer, head.index]):+.3g}" for head in heads)))
        return ("stage", "heads and effects"), rows


def backward_search(
    model: HookedModel,
    pairs: PromptPairs,
    stages: Sequence[Stage],
    config: DiscoveryConfig,
    *,
    metric: Metric | None = None,
    execution: Execution = Execution(),
    files: Mapping[str, str | Path] | None = None,
) -> Discovery:
    """Search the stages in their order; each later stage's receivers are the heads found for the stage it writes into.

    A stage whose receivers are empty finds nothing, which is a result. `files` (stage -> file): where each stage's
    scores are kept, in place of `execution.file`, and read if they are there; an interrupted search resumes inside the
    stage. `metric` takes the place of the configuration's. Errors: `InputError` for a position that the prompts don't
    name, and another search's files.
    """
    require_stages(stages)
    if execution.file is not None:
        raise InputError("a search has a file a stage: give `files` (stage -> file) in place of one file.")
    metric = metric or metric_named(config.metric)
    start, seconds = time.perf_counter(), {}
    patchers = prepared(model, pairs, execution=execution)
    clean, corrupt = activation_baselines(patchers, metric)
    least = config.least_effect * (1.0 if config.effect == "relative" else abs(clean - corrupt))
    groups: dict[str, list[Head]] = {}
    scores: dict[str, Scores] = {}
    members: list[Member] = []
    position_of = {stage.name: stage.position for stage in stages}
    for stage in stages:
        if stage.into is not None and not groups[stage.into]:
            groups[stage.name] = []
            continue
        receivers = (
            []
            if stage.into is None or stage.composition is None
            else [Receiver(head, stage.composition) for head in groups[stage.into]]
        )
        there = "all" if stage.into is None else receiver_position(stage, position_of)
        route = Route(position=stage.position, receivers=tuple(receivers), receiver_position=there)
        file = None if files is None else files.get(stage.name)
        scores[stage.name] = sweep_heads(
            patchers, route, metric=metric, effect=config.effect, execution=dataclasses.replace(execution, file=file)
        )
        seconds[stage.name] = time.perf_counter() - start
        groups[stage.name] = chosen(scores[stage.name], config, least=least)
        members += [Member(head, stage.name, stage.position) for head in groups[stage.name]]
    circuit = Circuit.of(
        members,
        shape=(model.n_layers, model.n_heads),
        method=f"path patching, {metric.name}, stages {' '.join(position_of)}",
    )
    return Discovery(circuit=circuit, scores=scores, seconds=seconds)


def receiver_position(stage: Stage, position_of: Mapping[str, str]) -> str:
    """Queries are read where the receiving heads act; keys and values where this stage's own heads write."""
    assert stage.into is not None
    return position_of[stage.into] if stage.composition == "q" else stage.position


def chosen(scores: Scores, config: DiscoveryConfig, *, least: float) -> list[Head]:
    """The heads that a configuration takes from scores; `least` in the scores' unit."""
    match config.selection:
        case "top":
            return selection.by_count(scores, config.heads)
        case "threshold":
            return selection.by_threshold(scores, least)[: config.heads]
        case "elbow":
            return selection.by_elbow(scores)[: config.heads]
        case "significance":
            return selection.by_significance(scores, rate=1 - config.confidence)[: config.heads]
        case "interval":
            return selection.by_interval(scores, most=config.heads, least=least, confidence=config.confidence)


RULES = {
    "top": "the strongest",
    "threshold": "an effect of at least `discovery.least_effect` ({least_effect:g})",
    "elbow": "a rank in front of the elbow of the ranked effects",
    "significance": "an effect above 0 at a false-discovery rate of {rate:g} (1 - `discovery.confidence`)",
    "interval": "an effect of at least `discovery.least_effect` ({least_effect:g}) and above 0 with "
    "`discovery.confidence` {confidence:g}",
}
"""Selection -> what a head must have, in words."""


def explained_size(circuit: Circuit, groups: Sequence[str], config: DiscoveryConfig) -> tuple[str, ...]:
    """Why groups (stages) of a circuit hold fewer heads than `heads` asks for, and what would change it: one sentence,
    or none where all are full."""
    short = {group: len(circuit.roles.get(group, ())) for group in groups}
    short = {group: count for group, count in short.items() if count < config.heads}
    if not short:
        return ()
    counts = ", ".join(f"{count} in {group}" for group, count in short.items())
    rule = RULES[config.selection].format(
        least_effect=config.least_effect, confidence=config.confidence, rate=1 - config.confidence
    )
    return (
        f"of up to {config.heads} heads asked for (`discovery.heads`): {counts}; selection {config.selection!r} asks "
        f"for {rule}. More discovery prompts narrow the intervals; `discovery.selection: top` takes the strongest "
        "whatever their effect",
    )


def ranking(scores: Mapping[str, Scores]) -> list[Head]:
    """All heads of a search in one order: by their largest effect in any stage, as a share of that stage's
    largest."""
    best: dict[Head, float] = {}
    for part in scores.values():
        means = part.mean()
        largest = float(means.nan_to_num(0.0).max()) or 1.0
        for head in part.ranked():
            best[head] = max(best.get(head, -torch.inf), float(means[head.layer, head.index]) / largest)
    return sorted(best, key=lambda head: (-best[head], head))


def acting(
    scores: Mapping[str, Scores], circuit: Circuit, position_of: Mapping[str, str]
) -> dict[Head, tuple[str, ...]]:
    """Where each head of a search acts: a head of the circuit at its positions, another at that of the stage in which
    it is strongest, as `ranking` has it."""
    best: dict[Head, tuple[float, str]] = {}
    for stage, part in scores.items():
        means = part.mean()
        largest = float(means.nan_to_num(0.0).max()) or 1.0
        for head in part.ranked():
            share = float(means[head.layer, head.index]) / largest
            if head not in best or share > best[head][0]:
                best[head] = share, position_of[stage]
    return {head: (position,) for head, (_, position) in best.items()} | circuit.scope


def top_by_ablation(profile: Scores, config: DiscoveryConfig, *, position: str = "all") -> Circuit:
    """The heads whose mean ablation costs most (the paper's recipe for tasks without a known graph)."""
    span = abs(profile.baseline) if profile.baseline else float(profile.mean().abs().nan_to_num().max())
    heads = chosen(profile, config, least=config.least_effect * span)
    shape = (profile.values.shape[0], profile.values.shape[1])
    return Circuit.of(
        (Member(head, "ablation", position) for head in heads), shape=shape, method=f"mean ablation, {profile.unit}"
    )


def stacked(scores: Mapping[str, Scores]) -> Scores | None:
    """One map for all stages of a search: per head the strongest mean effect over the stages (NaN where none was
    measured)."""
    if not scores:
        return None
    means = torch.stack([part.mean() for part in scores.values()])
    strongest = means.nan_to_num(0).abs().argmax(0, keepdim=True)
    values = means.gather(0, strongest)[0]
    kinds = sorted({part.unit.split(", path from")[0] for part in scores.values()})
    return Scores.of_heads(values, unit=f"{' / '.join(kinds)}, strongest over the stages {', '.join(scores)}")
