"""What a method of discovery is asked, and what it has to be."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from workbench import seeds
from workbench.circuits.config import DiscoveryConfig
from workbench.circuits.search_result import CircuitSearch
from workbench.models.hooked_model import HookedModel
from workbench.patching.execution import Execution
from workbench.patching.replacement import Replacement
from workbench.tasks.base import PromptPairs
from workbench.tasks.stages import Stage
from workbench.values.metrics import Metric
from workbench.values.refs import Position
from workbench.values.scores import Scores


@dataclass(frozen=True, kw_only=True, eq=False)
class Inquiry:
    """What is asked of a method: the circuit of which model, on which prompts, by which metric."""

    model: HookedModel
    pairs: PromptPairs
    """In the model's own tokens."""
    metric: Metric
    config: DiscoveryConfig
    """What is common to all methods: how many of the ranked heads."""
    stand_in: Callable[[PromptPairs], tuple[Replacement, str]]
    """Makes what stands in for what is ablated on these prompts, with that in words."""
    stages: tuple[Stage, ...] = ()
    """Of the task's circuit, where they are known."""
    execution: Execution = Execution()
    """Its file has no part in it: see `file`."""
    file_of: Callable[[str], Path] | None = None
    """Name of some scores -> the file that keeps them; None: nothing is kept."""
    impacts: Callable[[], Scores] | None = None
    """Single ablation impacts by the same replacement, where they are had anyway."""

    @functools.cached_property
    def _stand_in(self) -> tuple[Replacement, str]:
        return self.stand_in(self.pairs)

    @property
    def replacement(self) -> Replacement:
        """What stands in for what is ablated; made once."""
        return self._stand_in[0]

    @property
    def words(self) -> str:
        """The same in words."""
        return self._stand_in[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads of the model."""
        return self.model.n_layers, self.model.n_heads

    def executed(self, name: str) -> Execution:
        """The execution of a sweep, with its file."""
        return replace(self.execution, file=None if self.file_of is None else self.file_of(name))


@runtime_checkable
class DiscoveryMethod(Protocol):
    """A way to find a circuit. Its fields are its options."""

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The circuit, with a ranking of all heads and its curve. An interrupted search resumes from its files to the
        same bits."""
        ...

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """The positions at which members of the circuits that it finds may act."""
        ...

    def runs(self, heads: int, layers: int) -> int:
        """At most so many times the prompts are run by a model of so many heads in all: what a search costs, in
        forwards (a forward with its backward counts 3)."""
        ...


def search_by(method: DiscoveryMethod, inquiry: Inquiry) -> CircuitSearch:
    """The circuit, and where the settings want it how stable it is over resampled prompts."""
    result, draws = method.find(inquiry), inquiry.config.resamples
    if not draws:
        return result
    others = [method.find(_resampled(inquiry, draw)).circuit for draw in range(draws)]
    values = tuple(result.circuit.jaccard(other) for other in others)
    note = (
        f"stability: over {draws} resampled sets of the prompts the circuit's heads have Jaccard "
        f"{sum(values) / draws:.2f} ({min(values):.2f} to {max(values):.2f}); sizes "
        f"{', '.join(str(len(other.heads)) for other in others)}"
    )
    return replace(result, stability=values, notes=(*result.notes, note))


def _resampled(inquiry: Inquiry, draw: int) -> Inquiry:
    """The same question on as many prompts, drawn with repeats."""
    count, file_of = len(inquiry.pairs), inquiry.file_of
    rows = torch.randint(count, (count,), generator=seeds.generator(0, "resampled prompts", str(draw)))
    return replace(
        inquiry,
        pairs=inquiry.pairs.rows(rows.to(inquiry.pairs.mask.device)),
        file_of=None if file_of is None else lambda name: file_of(f"resample-{draw}-{name}"),
        impacts=None,
    )
