"""What a search for a circuit gives: the circuit, the scores that it was chosen by, and the ranking with its curve."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from workbench.circuits.circuit import Circuit
from workbench.circuits.search_curve import SearchCurve
from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.values.refs import Head, Position
from workbench.values.scores import Scores
from workbench.values.tables import html_table, number, text_table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CircuitSearch:
    """A circuit, and the scores that it was chosen by."""

    circuit: Circuit
    scores: Scores
    """One value for each head (over the stages the strongest); positive = the head helps."""
    method: str
    reference: str
    """What the scores compare the clean run with, in words: what stands in for an ablated head, or what is patched."""
    by_stage: Mapping[str, Scores] = field(default_factory=lambda: MappingProxyType({}))
    """Path patching: the scores of each stage, [layer head example]."""
    ranking: tuple[Head, ...] = ()
    """All heads that the method has ranked, the most needed first."""
    acting: Mapping[Head, tuple[Position, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Where each ranked head acts; heads that it leaves out act everywhere."""
    curve: SearchCurve | None = None
    """What the beginnings of the ranking keep on the same prompts; None where ablating everything changes nothing."""
    stability: tuple[float, ...] = ()
    """Jaccard of the circuit's heads with those found on each resampled set of the prompts (`resamples`)."""
    notes: tuple[str, ...] = ()
    """What the prompts can't tell: ties and intervals, in words."""
    seconds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """When each part of the search was done, from its start on."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of what stands neither in the circuit's file nor in that of the scores."""
        return {
            "method": self.method,
            "reference": self.reference,
            "ranking": [str(head) for head in self.ranking],
            "curve": None if self.curve is None else self.curve.to_json(),
            "stability": list(self.stability),
            "notes": list(self.notes),
        }

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
        means = self.scores.mean()
        score = {head: float(means[head.layer, head.index]) for head in self.circuit.heads}
        rows = [
            (str(head), self.circuit.role_of(head), ", ".join(self.circuit.scope[head]), number(score[head]))
            for head in sorted(score, key=lambda head: (-score[head], head))
        ]
        layers, heads = self.circuit.shape
        title = f"{len(score)} of {layers * heads} heads by {self.circuit.method}; {self.reference}; {self.scores.unit}"
        return ("head", "role", "position", "score"), rows, title

    def __repr__(self) -> str:
        head, rows, title = self._table()
        return "\n".join((text_table(head, rows, title=title), *self.notes))

    def _repr_html_(self) -> str:
        head, rows, title = self._table()
        return html_table(head, rows, title=title)


def circuit_of(circuit: Circuit | CircuitSearch, model: HookedModel) -> Circuit:
    """The circuit itself, also of a search. Errors: `InputError` for anything else, or one of another model's shape."""
    circuit = circuit.circuit if isinstance(circuit, CircuitSearch) else circuit
    if not isinstance(circuit, Circuit):
        raise InputError(
            f"this is {type(circuit).__name__}, no circuit; give what find_circuit returns, or build one: `Circuit.of`."
        )
    if circuit.shape != (model.n_layers, model.n_heads):
        raise InputError(
            f"the circuit is of a model of {circuit.shape[0]} layers x {circuit.shape[1]} heads, {model.name} has "
            f"{model.n_layers} x {model.n_heads}; find the circuit in this model."
        )
    return circuit
