"""Conditions x seeds -> the results table and its statistics."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionResult:
    """One row of the results table: a condition after training with one seed, evaluated on held-out test prompts."""

    condition: str
    """A key of `CONDITIONS`, or `teacher`."""
    seed: int
    full_accuracy: float
    full_interval: tuple[float, float]
    """95 % Wilson interval over prompts."""
    circuit_accuracy: float
    circuit_interval: tuple[float, float]
    random_circuit_accuracy: float
    faithfulness: float | None
    mean_cka: float | None
    """Mean CKA of the matched pairs on test prompts (None for the teacher)."""
    cka_floor: float | None
    """The same with the prompts shuffled."""
    trained_parameters: int
    trained_fraction: float
    """Share of all parameters."""
    steps: int
    mcnemar: Mapping[str, float]
    """Condition compared with -> two-sided p of McNemar's exact test on the same test prompts."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
