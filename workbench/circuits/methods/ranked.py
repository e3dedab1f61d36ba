"""Methods that rank all heads once and take the first: path patching by stages, single ablation, attribution."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as validated

from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.curves import default_sizes
from workbench.circuits.discovery import (
    acting,
    backward_search,
    chosen,
    explained_size,
    ranking,
    stacked,
    top_by_ablation,
)
from workbench.circuits.methods.base import Inquiry
from workbench.circuits.remaining import Remaining
from workbench.circuits.search_curve import SearchCurve, plain
from workbench.circuits.search_result import CircuitSearch
from workbench.errors import InputError
from workbench.patching.ablation import ablate
from workbench.patching.attribution import attribute_edges, attribute_nodes
from workbench.patching.gradient_rules import Rule
from workbench.patching.replacement import counterfactual_outputs
from workbench.tasks.stages import Stage
from workbench.values.refs import Head, Position
from workbench.values.scores import Scores

DIRECT = (Stage(name="A", title="direct", position="last"),)
"""The search where no stages are known: heads that write the answer to the logits themselves."""


@dataclass(frozen=True, slots=True)
class PathPatching:
    """Backward search from the logits, stage by stage (Prakash et al. 2024); its stages are the task's or the
    recipe's."""

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """At most `heads` of each stage, which write into those of the stage above."""
        stages = inquiry.stages or DIRECT
        files: Mapping[str, str | Path] | None = None
        if inquiry.file_of is not None:
            files = {stage.name: inquiry.file_of(f"path-{stage.name}") for stage in stages}
        execution = replace(inquiry.execution, file=None)
        search = backward_search(
            inquiry.model,
            inquiry.pairs,
            stages,
            inquiry.config,
            metric=inquiry.metric,
            execution=execution,
            files=files,
        )
        scores = stacked(search.scores)
        assert scores is not None  # the first stage is always scored
        corrupt = replace(inquiry, stand_in=lambda pairs: (counterfactual_outputs(inquiry.model, pairs), ""))
        result = CircuitSearch(
            circuit=search.circuit,
            scores=scores,
            method="path_patching",
            reference=f"patched: the outputs on the {len(inquiry.pairs)} pairs' corrupt prompts",
            by_stage=search.scores,
            ranking=tuple(ranking(search.scores)),
            acting=acting(search.scores, search.circuit, {stage.name: stage.position for stage in stages}),
            notes=(
                *(_ties(name, each, search.circuit.roles.get(name, ())) for name, each in search.scores.items()),
                *explained_size(search.circuit, [stage.name for stage in stages], inquiry.config),
            ),
            seconds=search.seconds,
        )
        return with_curve(result, corrupt)

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """Each stage at its position."""
        return tuple(stage.position for stage in stages or DIRECT)

    def runs(self, heads: int, layers: int) -> int:
        """Every head of every stage once, and the clean and corrupt runs."""
        return heads + 2


@dataclass(frozen=True, slots=True)
class MeanAblation:
    """The heads whose single ablation costs most (the paper's recipe for tasks without a known graph). Blind to heads
    that stand in for each other."""

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The strongest `heads`, by the common settings."""
        if inquiry.impacts is not None:
            profile = inquiry.impacts()
        else:
            execution = inquiry.executed(f"ablation-{inquiry.replacement.kind}-{inquiry.metric.name}")
            profile = ablate(
                inquiry.model, inquiry.pairs, inquiry.replacement, metric=inquiry.metric, execution=execution
            )
        circuit = top_by_ablation(profile, inquiry.config)
        return of_ranking(inquiry, circuit, profile, "mean_ablation", f"ablated: {inquiry.words}")

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """Everywhere."""
        return ("all",)

    def runs(self, heads: int, layers: int) -> int:
        """Every head once, the reference prompts and the whole model."""
        return heads + 2


@validated(frozen=True, slots=True, kw_only=True)
class Eap:
    """Attribution patching of edges (EAP; Syed et al. 2023), summed over each head's edges: what putting the corrupt
    output of a head into the clean run costs, to first order at the clean run."""

    absolute: bool = False
    """Rank by the absolute value of a head's mean score, as circuits of edges are often cut."""

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The strongest `heads`, by the common settings."""
        return _attributed(inquiry, "eap", steps=1, absolute=self.absolute)

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """Everywhere."""
        return ("all",)

    def runs(self, heads: int, layers: int) -> int:
        """A forward with its backward, and the clean and corrupt runs."""
        return 3 + 2


@validated(frozen=True, slots=True, kw_only=True)
class EapIg:
    """The same with gradients averaged on the way from the clean to the corrupt embeddings (EAP-IG inputs; Hanna et al.
    2024)."""

    steps: Annotated[int, Field(ge=1)] = 5
    """Points of the integral."""
    absolute: bool = False
    """As in `eap`."""

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The strongest `heads`, by the common settings."""
        return _attributed(inquiry, "eap_ig", steps=self.steps, absolute=self.absolute)

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """Everywhere."""
        return ("all",)

    def runs(self, heads: int, layers: int) -> int:
        """A forward with its backward for each step, and the clean and corrupt runs."""
        return 3 * self.steps + 2


@validated(frozen=True, slots=True, kw_only=True)
class RelP:
    """EAP with the coefficients of relevance propagation in place of the gradient: norms' scales and attention patterns
    are constants (Jafari et al. 2025). Blind to what goes through queries and keys."""

    absolute: bool = False
    """As in `eap`."""

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The strongest `heads`, by the common settings."""
        return _attributed(inquiry, "relp", steps=1, absolute=self.absolute, rule="relp")

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """Everywhere."""
        return ("all",)

    def runs(self, heads: int, layers: int) -> int:
        """A forward with its backward, and the clean and corrupt runs."""
        return 3 + 2


@validated(frozen=True, slots=True, kw_only=True)
class Gim:
    """EAP with the gradient's interactions modified: norms' scales are constants, softmax at a higher temperature,
    products share the gradient (Edin et al. 2025)."""

    steps: Annotated[int, Field(ge=1)] = 1
    """Points of the integral, as in `eap_ig`; the paper takes one."""
    absolute: bool = False
    """As in `eap`."""

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The strongest `heads`, by the common settings."""
        return _attributed(inquiry, "gim", steps=self.steps, absolute=self.absolute, rule="gim")

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """Everywhere."""
        return ("all",)

    def runs(self, heads: int, layers: int) -> int:
        """A forward with its backward for each step, and the clean and corrupt runs."""
        return 3 * self.steps + 2


def _attributed(inquiry: Inquiry, name: str, *, steps: int, absolute: bool, rule: Rule = "plain") -> CircuitSearch:
    execution, metric = inquiry.executed(f"{name}-{inquiry.metric.name}"), inquiry.metric
    edges = attribute_edges(inquiry.model, inquiry.pairs, metric=metric, steps=steps, rule=rule, execution=execution)
    scores = heads_of(attribute_nodes(edges), inquiry)
    ranked = replace(scores, values=scores.values * scores.mean().sign()[..., None]) if absolute else scores
    span = float(ranked.mean().abs().max())
    heads = chosen(ranked, inquiry.config, least=inquiry.config.least_effect * span)
    circuit = Circuit.of((Member(head, name, "all") for head in heads), shape=inquiry.shape, method=scores.unit)
    return of_ranking(
        inquiry, circuit, ranked, name, f"to first order, the {len(inquiry.pairs)} pairs' corrupt prompts"
    )


def heads_of(nodes: Scores, inquiry: Inquiry) -> Scores:
    """The heads among the senders of an attribution, [layer head example]."""
    layers, heads = inquiry.shape
    rows = torch.tensor([nodes.labels["sender"].index(str(head)) for head in inquiry.model.heads])
    return Scores.of_heads(nodes.values[rows].unflatten(0, (layers, heads)), unit=nodes.unit)


def of_ranking(inquiry: Inquiry, circuit: Circuit, scores: Scores, method: str, reference: str) -> CircuitSearch:
    """The result of a method that takes the first of the ranked heads."""
    result = CircuitSearch(
        circuit=circuit,
        scores=scores,
        method=method,
        reference=reference,
        ranking=tuple(scores.ranked()),
        notes=(
            _ties(method, scores, circuit.heads),
            *explained_size(circuit, list(circuit.roles) or [method], inquiry.config),
        ),
    )
    return with_curve(result, inquiry)


def _ties(name: str, scores: Scores, heads: Sequence[Head]) -> str:
    """How many of the heads that were left out the prompts can't tell from the weakest that was taken."""
    if not heads:
        return f"{name}: no head stands out"
    means = scores.mean()
    weakest = min(heads, key=lambda head: (float(means[head.layer, head.index]), head))
    low, high = scores.confidence_interval(0.95)
    outside = [head for head in scores.ranked() if head not in heads]
    least = float(low[weakest.layer, weakest.index])
    near = sum(float(high[head.layer, head.index]) >= least for head in outside)
    return (
        f"{name}: the weakest head taken is {weakest}; the 95 % intervals of {near} of the {len(outside)} heads left "
        "out overlap its own"
    )


def with_curve(result: CircuitSearch, inquiry: Inquiry) -> CircuitSearch:
    """The result with its ranking's curve; where there is none to be had, a note says why."""
    try:
        return replace(result, curve=curve_of(inquiry, result.ranking))
    except InputError as error:
        return replace(result, notes=(*result.notes, f"no curve: {error}"))


def curve_of(inquiry: Inquiry, order: Sequence[Head], *, sizes: Sequence[int] | None = None) -> SearchCurve:
    """What the first heads of a ranking keep on the prompts of the search, everything else ablated. Errors:
    `InputError` where ablating everything changes nothing, or the replacement does not fit the prompts."""
    inquiry.replacement.require_fitting(inquiry.pairs)
    every = [*order, *(head for head in inquiry.model.heads if head not in set(order))]
    remaining = Remaining(inquiry.model, inquiry.pairs, inquiry.replacement, inquiry.metric, inquiry.execution)
    wanted = default_sizes(len(every)) if sizes is None else tuple(sorted({0, *sizes, len(every)}))
    rows = [remaining.after([(head, "all") for head in every[size:]]).mean(1).tolist() for size in wanted]
    if abs(rows[0][0] - rows[-1][0]) < 1e-9:
        raise InputError("ablating every head does not change the metric: nothing to recover.")
    metric, accuracy, divergence = (plain(column) for column in zip(*rows, strict=True))
    return SearchCurve(
        sizes=wanted,
        accuracy=accuracy,
        metric=metric,
        divergence=divergence,
        unit=inquiry.metric.unit,
        ablation=inquiry.replacement.kind,
        prompts=len(inquiry.pairs),
    )
