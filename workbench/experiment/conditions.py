"""The arms of the paper's table: what each condition trains, on what, and what it aligns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionSpec:
    """What a condition trains and on what: the arms of the paper's table."""

    trains: str | None
    """`circuit` (the student's matched heads), `all`, or None (untrained)."""
    task_loss: str | None
    """None: the recipe's own task loss; `none`: no task loss; or a task loss by name."""
    aligns: Literal["matched", "paper", "random", "shuffled"] | None
    """The recipe's matches, those of another rule, or None."""


CONDITIONS: Mapping[str, ConditionSpec] = {
    "base": ConditionSpec(trains=None, task_loss=None, aligns=None),
    "full_ce": ConditionSpec(trains="all", task_loss=None, aligns=None),
    "circuit_ce": ConditionSpec(trains="circuit", task_loss=None, aligns=None),
    "circuit_cka": ConditionSpec(trains="circuit", task_loss="none", aligns="matched"),
    "circuit_ce_random_cka": ConditionSpec(trains="circuit", task_loss=None, aligns="random"),
    "circuit_ce_shuffled_cka": ConditionSpec(trains="circuit", task_loss=None, aligns="shuffled"),
    "circuit_ce_paper_cka": ConditionSpec(trains="circuit", task_loss=None, aligns="paper"),
    "circuit_ce_cka": ConditionSpec(trains="circuit", task_loss=None, aligns="matched"),
    "full_kl": ConditionSpec(trains="all", task_loss="kl_teacher", aligns=None),
    "full_ce_cka": ConditionSpec(trains="all", task_loss=None, aligns="matched"),
}
