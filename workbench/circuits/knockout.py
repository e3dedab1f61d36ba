"""Knocking heads out of a circuit: is every head needed (minimality), does anything else matter (completeness)?

F(C) is the mean metric with everything but C mean-ablated. Prakash et al. 2024, appendix; Wang et al. 2022, section 4:

    minimality of v    the largest effect (F(C - K) - F(C - K - v)) / |F(C - K)| over sets K of v's own group
    completeness       |F(C - K) - F(M - K)| over sets K of the circuit: circuit C and model M fall alike
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from workbench import seeds
from workbench.circuits.circuit import Circuit
from workbench.circuits.evaluation import EvaluationScope, circuit_logits
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import ablated_logits
from workbench.patching.progress import progress_bar
from workbench.patching.replacement import Replacement, replacement_named
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric, metric_named
from workbench.values.refs import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class Knockout:
    """F of a circuit and of the model when the same heads are knocked out of both."""

    heads: tuple[str, ...]
    circuit: float
    model: float


class Knockouts:
    """F(C - K) and F(M - K) on some prompts; each set is run once."""

    def __init__(
        self,
        model: HookedModel,
        pairs: PromptPairs,
        circuit: Circuit,
        replacement: Replacement | Literal["zero"],
        *,
        metric: str | Metric,
        scope: EvaluationScope = "positions",
    ) -> None:
        self.model, self.pairs, self.circuit, self.metric = model, pairs, circuit, metric_named(metric)
        self.replacement = replacement_named(replacement)
        self.scope: EvaluationScope = scope
        self._known: dict[tuple[bool, frozenset[Head]], float] = {}

    def of_circuit(self, without: Iterable[Head] = ()) -> float:
        """F(C - K)."""
        return self._once(
            False,
            frozenset(without),
            lambda gone: circuit_logits(
                self.model, self.pairs, self.circuit.without(gone), self.replacement, scope=self.scope
            ),
        )

    def of_model(self, without: Iterable[Head] = ()) -> float:
        """F(M - K): heads of K ablated where the circuit's scope has them act."""
        acting = self.circuit.scope if self.scope == "positions" else self.circuit.everywhere
        return self._once(
            True,
            frozenset(without),
            lambda gone: ablated_logits(
                self.model, self.pairs, {head: acting[head] for head in gone}, self.replacement
            ),
        )

    def _once(self, whole: bool, gone: frozenset[Head], run: Callable[[frozenset[Head]], Any]) -> float:
        if (whole, gone) not in self._known:
            values = self.metric(run(gone), self.pairs.answers, self.pairs.distractors)
            self._known[whole, gone] = float(values.mean())
        return self._known[whole, gone]


def minimality(knockouts: Knockouts, *, draws: int = 5, seed: int = 0) -> dict[Head, float]:
    """For each head the largest relative fall that knocking it out too causes, over random sets K of its own groups
    (the empty set among them)."""
    circuit, draw = knockouts.circuit, seeds.chooser(seed, "minimality")
    scores: dict[Head, float] = {}
    for head in progress_bar(circuit.heads, desc="minimality", unit="head"):
        group = sorted({other for heads in circuit.roles.values() if head in heads for other in heads} - {head})
        sets: list[list[Head]] = [[]] + [draw.sample(group, draw.randint(1, len(group))) for _ in range(draws) if group]
        scores[head] = max(_fall(knockouts.of_circuit(gone), knockouts.of_circuit([*gone, head])) for gone in sets)
    return scores


def _fall(before: float, after: float) -> float:
    return (before - after) / max(abs(before), 1e-9)


def minimal(knockouts: Knockouts, *, least: float = 0.01, draws: int = 5, seed: int = 0) -> Circuit:
    """The circuit without the heads that are needed by less than `least` (1 %)."""
    scores = minimality(knockouts, draws=draws, seed=seed)
    return knockouts.circuit.without(head for head, score in scores.items() if score < least)


def completeness(knockouts: Knockouts, *, draws: int = 10, seed: int = 0) -> tuple[Knockout, ...]:
    """Random sets of the circuit's heads (each head in or out by a coin), and every single group, knocked out of
    circuit and model."""
    circuit, draw = knockouts.circuit, seeds.chooser(seed, "completeness")
    sets = list(circuit.roles.values())
    sets += [tuple(head for head in circuit.heads if draw.random() < 0.5) for _ in range(draws)]
    return tuple(
        Knockout(heads=tuple(map(str, gone)), circuit=knockouts.of_circuit(gone), model=knockouts.of_model(gone))
        for gone in progress_bar([(), *sets], desc="completeness", unit="set")
    )


def incompleteness(knockouts: Sequence[Knockout]) -> float:
    """Mean |F(C - K) - F(M - K)| over the sets, in the metric's unit."""
    return float(torch.tensor([abs(each.circuit - each.model) for each in knockouts]).mean())
