"""Two circuits of one model, or one circuit before and after training: which heads stayed, came and went, role by
role."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.storage import read_typed
from workbench.values.display import Row, Shown


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChange:
    """One role in two circuits."""

    role: str
    shared: tuple[str, ...]
    gained: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CircuitComparison(Shown):
    """What the second circuit shares with the first, and what differs."""

    jaccard: float
    """Heads in both over heads in either, whatever their roles."""
    roles: tuple[RoleChange, ...]
    moved: tuple[str, ...]
    """Heads of both circuits whose roles differ: `L2H1: A -> B`."""

    def _title(self) -> str:
        moved = f"; moved: {', '.join(self.moved)}" if self.moved else ""
        return f"Two circuits, Jaccard overlap {self.jaccard:.2f}{moved}"

    def _table(self) -> tuple[Row, Sequence[Row]]:
        return ("role", "shared", "gained", "lost"), [
            (change.role, " ".join(change.shared), " ".join(change.gained), " ".join(change.lost))
            for change in self.roles
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "CircuitComparison":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        return read_typed(value, cls, what="a comparison of circuits")


def compare(before: Circuit, after: Circuit) -> CircuitComparison:
    """Compare two circuits of models of one shape. Errors: `InputError` on different shapes."""
    if before.shape != after.shape:
        raise InputError(
            f"circuits of models of shapes {before.shape} and {after.shape} have no heads in common; compare circuits "
            "of one model."
        )
    names = sorted(set(before.roles) | set(after.roles))
    old, new = ({name: set(circuit.roles.get(name, ())) for name in names} for circuit in (before, after))
    both = sorted(set(before.heads) & set(after.heads))
    changed = [head for head in both if before.role_of(head) != after.role_of(head)]
    return CircuitComparison(
        jaccard=before.jaccard(after),
        roles=tuple(
            RoleChange(
                role=name,
                shared=_written(old[name] & new[name]),
                gained=_written(new[name] - old[name]),
                lost=_written(old[name] - new[name]),
            )
            for name in names
        ),
        moved=tuple(f"{head}: {before.role_of(head)} -> {after.role_of(head)}" for head in changed),
    )


def _written(heads: set[Any]) -> tuple[str, ...]:
    return tuple(map(str, sorted(heads)))
