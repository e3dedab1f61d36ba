"""What a session is about: the pair, the method, the head in view, each model's circuit. A frozen value; every change
gives a new one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from workbench.circuits.circuit import Circuit, Member
from workbench.errors import InputError
from workbench.tasks.pairs import Pair
from workbench.values.refs import Head, Position

Side = Literal["teacher", "student", "after"]
"""Which model: the teacher, the student before distillation, the student after it."""
Method = Literal["zero", "mean", "counterfactual", "activation", "path"]
Outside = Literal["zero", "mean", "counterfactual"]
"""What the heads outside a circuit put out."""
ROLE = "picked"
"""The role of a head that was added by hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A second head, or the same one on a second pair, beside what is in view."""

    side: Side
    head: Head
    pair: Pair
    picked: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that the user has chosen."""

    pair: Pair
    picked: int | None
    """Which of the listed pairs it is; None for a typed one."""
    side: Side
    """The model whose head is in view."""
    head: Head | None
    circuits: Mapping[Side, Circuit]
    method: Method = "path"
    metric: str = "logit_difference"
    position: Position = "all"
    """Where ablation and activation patching act."""
    average: bool = False
    """The heat map over all listed pairs, not this one alone."""
    outside: Outside = "counterfactual"
    weighted: bool = False
    """Attention weighted by the norm of what is moved."""
    compared: bool = False
    """The circuits against random ones of equal size."""
    layer: int | None = None
    """The layer whose heads are shown small; None: that of the head in view."""
    beside: Beside | None = None
    paths: Mapping[Side, str] = field(default_factory=dict)
    """The ranking that a model's circuit is stepped along, by the name of its source."""

    @property
    def acts(self) -> Position:
        """Where the method acts: paths to the logits leave from the last token, whatever is chosen for the others."""
        return "last" if self.method == "path" else self.position

    @property
    def layer_shown(self) -> int:
        """The layer whose heads are shown small."""
        return self.layer if self.layer is not None else 0 if self.head is None else self.head.layer

    def with_circuit(self, side: Side, circuit: Circuit) -> "State":
        """The same with another circuit of a model."""
        return replace(self, circuits={**self.circuits, side: circuit}, compared=False)

    def toggled(self, side: Side, head: Head) -> tuple["State", str]:
        """The head added to or dropped from its model's circuit, and what was done in words."""
        circuit = self.circuits[side]
        if head in circuit.heads:
            return self.with_circuit(side, circuit.without([head])), f"dropped {head} from the {side}'s circuit"
        if not (0 <= head.layer < circuit.shape[0] and 0 <= head.index < circuit.shape[1]):
            raise InputError(
                f"{head} is outside the {side}, a model of {circuit.shape[0]} layers x {circuit.shape[1]} heads."
            )
        added = Circuit.of(
            [*circuit.members, Member(head, ROLE, "all")], shape=circuit.shape, method=_by_hand(circuit.method)
        )
        return self.with_circuit(side, added), f"added {head} to the {side}'s circuit"


def with_role(circuit: Circuit, heads: Collection[Head], role: str) -> Circuit:
    """The circuit with some of its heads in one role of this name (each at its positions), whatever role they had."""
    renamed = {Member(m.head, role if m.head in heads else m.role, m.position) for m in circuit.members}
    return replace(circuit, members=tuple(sorted(renamed)))


def _by_hand(method: str) -> str:
    return method if method.endswith("by hand") else f"{method}, changed by hand" if method else "by hand"


def empty_circuit(shape: tuple[int, int]) -> Circuit:
    """The circuit that a session begins with."""
    return Circuit.of([], shape=shape, method="picked by hand")
