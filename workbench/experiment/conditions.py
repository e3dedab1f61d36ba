"""The conditions of the paper's table, each in one entry: what it trains, on what, what it aligns, what it is compared
with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from workbench.errors import InputError, nearest

Aligned = Literal["matched", "paper", "random", "shuffled"]
"""The recipe's matches, or those of another rule on the same student heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A row of the table."""

    name: str
    title: str
    """In the words of the paper."""
    trains: Literal["circuit", "all"] | None
    """The student's matched heads, everything, or nothing (untrained)."""
    aligns: Aligned | None
    task_loss: str | None = None
    """None: the recipe's own task loss; `none`: no task loss; or a task loss by name."""
    compared_with: tuple[str, ...] = ("full_ce", "circuit_ce")
    """The conditions that McNemar's test and a study's comparisons set it against."""
    usual: bool = True
    """Whether a recipe that names no conditions runs it."""


TABLE = (
    Condition(name="base", title="base (untrained)", trains=None, aligns=None),
    Condition(name="full_ce", title="full / CE", trains="all", aligns=None, compared_with=("circuit_ce",)),
    Condition(name="circuit_ce", title="circuit / CE", trains="circuit", aligns=None, compared_with=("full_ce",)),
    Condition(name="circuit_cka", title="circuit / CKA", trains="circuit", task_loss="none", aligns="matched"),
    Condition(name="circuit_ce_random_cka", title="circuit / CE + random CKA", trains="circuit", aligns="random"),
    Condition(
        name="circuit_ce_shuffled_cka",
        title="circuit / CE + shuffled CKA",
        trains="circuit",
        aligns="shuffled",
        usual=False,
    ),
    Condition(
        name="circuit_ce_paper_cka",
        title="circuit / CE + CKA, paper's matching",
        trains="circuit",
        aligns="paper",
        usual=False,
    ),
    Condition(name="circuit_ce_cka", title="circuit / CE + CKA", trains="circuit", aligns="matched"),
    Condition(name="full_kl", title="full / KL", trains="all", task_loss="kl_teacher", aligns=None),
    Condition(name="full_ce_cka", title="full / CE + CKA", trains="all", aligns="matched"),
)
"""In the order of the paper's table."""
CONDITIONS: Mapping[str, Condition] = {condition.name: condition for condition in TABLE}
METHOD = "circuit_ce_cka"
"""The paper's method, whose lambda a study chooses."""
PLAIN = "circuit_ce"
"""The same training without alignment, which a gain of alignment is over."""
TEACHER = "teacher"
"""The row of the teacher, which no condition trains."""
TITLES: Mapping[str, str] = {**{condition.name: condition.title for condition in TABLE}, TEACHER: TEACHER}
"""Name -> title of every row, in the order of the table."""
BASELINES = tuple(name for name in CONDITIONS if any(name in other.compared_with for other in TABLE))
"""The conditions that others are compared with."""


def condition_named(name: str) -> str:
    """The name itself. Errors: `InputError` with the nearest for an unknown one."""
    if name not in CONDITIONS:
        raise InputError(f"there is no condition {name!r}; {nearest(name, CONDITIONS)}")
    return name


ConditionName = Annotated[str, AfterValidator(condition_named)]
"""A condition in a recipe."""
