"""`Circuit`: attention heads with their roles and the positions where they act, and, where they were searched for, MLPs
and edges with their scores; set algebra and JSON both ways."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from workbench import seeds
from workbench.circuits.edge import LOGITS, Edge, Node, WrittenEdge, height
from workbench.errors import InputError
from workbench.storage import read_typed
from workbench.storage.hub import Artefact
from workbench.values.display import Row, Shown
from workbench.values.refs import Embedding, Head, Mlp, Position, head_named, heads_named, sender_named


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """A head in a role, at the position where it acts in that role."""

    head: Head
    role: str
    position: Position


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Circuit(Shown, Artefact):
    """Some heads of one model. A head may stand in several roles; it is one head of the circuit all the same."""

    FILE: ClassVar[str] = "circuit.json"

    members: tuple[Member, ...]
    shape: tuple[int, int]
    """Layers and heads per layer of the model."""
    method: str
    """How it was found."""
    mlps: tuple[Mlp, ...] | None = None
    """Its MLPs; None where heads alone were searched for (then every MLP is kept)."""
    edges: tuple[Edge, ...] | None = None
    """Its edges, from the embedding up; None where nodes alone were searched for (then all edges between them are
    kept)."""

    def __post_init__(self) -> None:
        if list(self.members) != sorted(set(self.members)):
            raise InputError("members of a circuit are sorted and stand once each; build it with `Circuit.of`.")
        for member in self.members:
            if member.head.layer >= self.shape[0] or member.head.index >= self.shape[1]:
                raise InputError(f"{member.head} is outside a model of {self.shape[0]} layers x {self.shape[1]} heads.")
        if self.mlps is not None and list(self.mlps) != sorted(set(self.mlps)):
            raise InputError("MLPs of a circuit are sorted and stand once each; build it with `Circuit.of`.")
        for mlp in self.mlps or ():
            if mlp.layer >= self.shape[0]:
                raise InputError(f"{mlp} is outside a model of {self.shape[0]} layers.")
        names = [str(edge) for edge in self.edges or ()]
        if self.edges is not None and (
            len(set(names)) != len(names) or list(self.edges) != sorted(self.edges, key=lambda edge: edge.order)
        ):
            raise InputError("edges of a circuit are sorted and stand once each; build it with `Circuit.of`.")
        for edge in self.edges or ():
            for node in (edge.sender, edge.into):
                if isinstance(node, Head) and (node.layer >= self.shape[0] or node.index >= self.shape[1]):
                    raise InputError(
                        f"the edge {edge} is outside a model of {self.shape[0]} layers x {self.shape[1]} heads."
                    )

    def _title(self) -> str:
        total = self.shape[0] * self.shape[1]
        more = "" if self.mlps is None else f", {len(self.mlps)} of {self.shape[0]} MLPs"
        more += "" if self.edges is None else f", {len(self.edges)} edges"
        return f"Circuit of {len(self.heads)} of {total} heads ({self.fraction:.0%}){more}: {self.method}"

    def _table(self) -> tuple[Row, Sequence[Row]]:
        groups: dict[tuple[str, Position], list[str]] = {}
        for member in self.members:
            groups.setdefault((member.role, member.position), []).append(str(member.head))
        return ("role", "position", "heads"), [(*group, " ".join(heads)) for group, heads in sorted(groups.items())]

    @classmethod
    def of(
        cls,
        members: Iterable[Member],
        *,
        shape: tuple[int, int],
        method: str,
        mlps: Iterable[Mlp] | None = None,
        edges: Iterable[Edge] | None = None,
    ) -> "Circuit":
        """A circuit of these members (MLPs, edges), in order and without repeats."""
        once = None if edges is None else {str(edge): edge for edge in edges}.values()
        return cls(
            members=tuple(sorted(set(members))),
            shape=shape,
            method=method,
            mlps=None if mlps is None else tuple(sorted(set(mlps))),
            edges=None if once is None else tuple(sorted(once, key=lambda edge: edge.order)),
        )

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Embedding, heads, MLPs (all, where they were not searched for) and the logits, from the embedding up."""
        mlps = map(Mlp, range(self.shape[0])) if self.mlps is None else self.mlps
        return (Embedding(), *sorted([*self.heads, *mlps], key=height), LOGITS)

    @property
    def heads(self) -> tuple[Head, ...]:
        """Its heads, in order."""
        return tuple(sorted({member.head for member in self.members}))

    @property
    def fraction(self) -> float:
        """Share of all the model's attention heads."""
        return len(self.heads) / (self.shape[0] * self.shape[1])

    @property
    def scope(self) -> dict[Head, tuple[Position, ...]]:
        """Each head with the positions of all its roles."""
        return {
            head: tuple(sorted({member.position for member in self.members if member.head == head}))
            for head in self.heads
        }

    @property
    def everywhere(self) -> dict[Head, tuple[Position, ...]]:
        """Each head at every position."""
        return dict.fromkeys(self.heads, ("all",))

    @property
    def roles(self) -> dict[str, tuple[Head, ...]]:
        """Role -> its heads."""
        return {
            role: tuple(m.head for m in self.members if m.role == role)
            for role in sorted({m.role for m in self.members})
        }

    def role_of(self, head: Head | str) -> str:
        """The roles of a head, joined by `+`; empty when it is not in the circuit."""
        named = head_named(head)
        return "+".join(sorted({member.role for member in self.members if member.head == named}))

    def where(self, keep: Callable[[Member], bool]) -> "Circuit":
        """The members that pass a test, and the edges between what is left."""
        members = tuple(member for member in self.members if keep(member))
        gone = set(self.heads) - {member.head for member in members}
        edges = None if self.edges is None else [e for e in self.edges if e.sender not in gone and e.into not in gone]
        return replace(self, members=members, edges=None if edges is None else tuple(edges))

    def without(self, heads: Iterable[Head | str]) -> "Circuit":
        """The circuit without some heads."""
        gone = set(heads_named(heads))
        return self.where(lambda member: member.head not in gone)

    def __or__(self, other: "Circuit") -> "Circuit":
        return self._merged(other, set(self.members) | set(other.members), "|")

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._merged(other, set(self.members) & set(other.members), "&")

    def _merged(self, other: "Circuit", members: set[Member], sign: str) -> "Circuit":
        if self.shape != other.shape:
            raise InputError(
                f"circuits of models of shapes {self.shape} and {other.shape} can't be joined; compare circuits of one "
                "model."
            )
        mlps = edges = None
        if self.mlps is not None and other.mlps is not None:
            mlps = set(self.mlps) | set(other.mlps) if sign == "|" else set(self.mlps) & set(other.mlps)
        if self.edges is not None and other.edges is not None:
            names = {str(edge) for edge in other.edges}
            edges = [*self.edges, *other.edges] if sign == "|" else [e for e in self.edges if str(e) in names]
        return Circuit.of(
            members, shape=self.shape, method=f"({self.method}) {sign} ({other.method})", mlps=mlps, edges=edges
        )

    def jaccard(self, other: "Circuit") -> float:
        """Heads in both over heads in either (1 for two empty circuits)."""
        either = set(self.heads) | set(other.heads)
        return len(set(self.heads) & set(other.heads)) / len(either) if either else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        members = [{"head": str(m.head), "role": m.role, "position": m.position} for m in self.members]
        written: dict[str, Any] = {"members": members, "shape": list(self.shape), "method": self.method}
        if self.mlps is not None:
            written["mlps"] = [str(mlp) for mlp in self.mlps]
        if self.edges is not None:
            written["edges"] = [edge.to_json() for edge in self.edges]
        return written

    @classmethod
    def from_json(cls, value: Any) -> "Circuit":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        written = read_typed(value, _Written, what="a circuit (members with head, role, position; shape; method)")
        members = [Member(member.head, member.role, member.position) for member in written.members]
        mlps = None if written.mlps is None else [_mlp_named(name) for name in written.mlps]
        edges = None if written.edges is None else [Edge.read(edge) for edge in written.edges]
        return cls.of(members, shape=written.shape, method=written.method, mlps=mlps, edges=edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """A circuit as it is written; files from before there were MLPs and edges have neither."""

    members: tuple[Member, ...]
    shape: tuple[int, int]
    method: str
    mlps: tuple[str, ...] | None = None
    edges: tuple[WrittenEdge, ...] | None = None


def _mlp_named(name: str) -> Mlp:
    mlp = sender_named(name)
    if not isinstance(mlp, Mlp):
        raise InputError(f"{name!r} is no MLP; write M5 for that of layer 5.")
    return mlp


def whole_model(shape: tuple[int, int]) -> Circuit:
    """Every head at every position: the circuit that is the model."""
    heads = (Head(layer, index) for layer in range(shape[0]) for index in range(shape[1]))
    return Circuit.of((Member(head, "all", "all") for head in heads), shape=shape, method="whole model")


def random_circuit(circuit: Circuit, *, seed: int, draw: int = 0) -> Circuit:
    """As many heads, drawn from outside the circuit (from all heads if too few are left), each taking over the roles of
    one of its heads."""
    layers, heads = circuit.shape
    everyone = [Head(layer, index) for layer in range(layers) for index in range(heads)]
    outside = [head for head in everyone if head not in set(circuit.heads)]
    pool = outside if len(outside) >= len(circuit.heads) else everyone
    chosen = seeds.chooser(seed, "random circuit", draw).sample(pool, len(circuit.heads))
    stand_in = dict(zip(circuit.heads, chosen, strict=True))
    members = (Member(stand_in[m.head], m.role, m.position) for m in circuit.members)
    return Circuit.of(members, shape=circuit.shape, method=f"random heads in place of: {circuit.method}")
