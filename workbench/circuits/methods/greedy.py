"""Greedy to a target: the shortest beginning of another method's ranking that keeps enough of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.methods.base import DiscoveryMethod, Inquiry
from workbench.circuits.methods.ranked import curve_of
from workbench.circuits.methods.registry import method_named
from workbench.circuits.search_curve import Of
from workbench.circuits.search_result import CircuitSearch
from workbench.errors import InputError
from workbench.tasks.stages import Stage
from workbench.values.refs import Position


@validated(frozen=True, slots=True, kw_only=True, config=ConfigDict(arbitrary_types_allowed=True))
class Greedy:
    """Heads are added in the order of a ranking until the target is reached; every size is run."""

    ranking: str = "mean_ablation"
    """The method whose ranking is walked."""
    ranking_options: Mapping[str, Any] = Field(default_factory=dict)
    """Of that method."""
    target: Annotated[float, Field(gt=0)] = 0.9
    """How much of the model the circuit must keep, as a share (with `until: kl_divergence`, nats at most)."""
    until: Of = "accuracy"
    """Share of what."""

    def _ranks(self) -> DiscoveryMethod:
        if self.ranking == "greedy":
            raise InputError("greedy walks the ranking of another method; set `ranking` to one, such as eap.")
        return method_named(self.ranking, self.ranking_options)

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The shortest beginning that reaches the target (all heads, if none does)."""
        first = self._ranks().find(inquiry)
        order = [*first.ranking, *(head for head in inquiry.model.heads if head not in set(first.ranking))]
        curve = curve_of(inquiry, order, sizes=range(len(order) + 1))
        size = next(size for size in curve.sizes if curve.reaches(size, self.target, self.until) or size == len(order))
        members = (Member(head, "greedy", "all") for head in order[:size])
        method = f"the first of {first.method} to keep {self.target:g} of {self.until.replace('_', ' ')}"
        return replace(
            first,
            circuit=Circuit.of(members, shape=inquiry.shape, method=f"greedy: {method}, {inquiry.words}"),
            method="greedy",
            reference=f"ranked by {first.method}; {first.reference}; kept against: {inquiry.words}",
            ranking=tuple(order),
            curve=curve,
        )

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """Everywhere."""
        return ("all",)

    def runs(self, heads: int, layers: int) -> int:
        """The ranking's, and one for each size."""
        return self._ranks().runs(heads, layers) + heads + 1
