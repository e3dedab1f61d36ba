"""The settings of a study."""

import copy
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from workbench.errors import InputError
from workbench.experiment.conditions import ConditionName
from workbench.experiment.recipe import parse_config, read_yaml

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class StudentConfig:
    """A student of the study."""

    source: str
    """Directory or hub id."""
    teacher_layers: tuple[int, ...] | None = None
    """Which of the teacher's layers the student's came from, where it is of its lineage: circuits can then be compared
    head by head."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the recipe for this student alone, e.g. `alignment.positions: last`: the same model under several
    methods."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class StudyConfig:
    """What is run. The recipe's own student, data size, lambda, conditions and seeds are replaced."""

    title: str = "Study"
    recipe: str
    """The recipe of every cell: a file or the name of a bundled one."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the recipe for all cells, e.g. `data.seed: 1`."""
    students: dict[str, StudentConfig]
    train_scenes: tuple[Annotated[int, Field(ge=1)], ...]
    """Data sizes, scarce to ample."""
    weights: tuple[Annotated[float, Field(gt=0)], ...]
    """lambda is chosen among these, for each student and data size, by accuracy on validation prompts; a single one is
    taken as it is."""
    validation_seeds: tuple[int, ...] = ()
    """Training seeds of the choice of lambda; none of them is among `seeds`."""
    seeds: tuple[int, ...]
    conditions: tuple[ConditionName, ...]
    anew: tuple[ConditionName, ...] = ()
    """Conditions in whose students circuits are found anew, with the first seed at the first data size."""

    def __post_init__(self) -> None:
        shared = set(self.seeds) & set(self.validation_seeds)
        if shared:
            raise InputError(
                f"the seeds {sorted(shared)} are both for choosing lambda and for the results; use fresh ones for the "
                "results."
            )
        if len(self.weights) > 1 and not self.validation_seeds:
            raise InputError(
                "lambda can't be chosen among several `weights` without `validation_seeds`; give some, or a single "
                "weight."
            )


def read_study(source: str | Path, *, overrides: dict[str, Any] | None = None) -> StudyConfig:
    """A study from a YAML file or the name of a bundled one. Errors: as `read_recipe`."""
    return parse_config(StudyConfig, read_yaml(source), overrides=overrides)


def written_study(value: dict[str, Any]) -> StudyConfig:
    """The study that a folder's `study.json` holds, now or before: there bundled models stood by their paths."""
    from workbench.storage.assets import short_name  # here: storage loads torch, which reading a recipe need not

    study = copy.deepcopy(value)
    for student in study["students"].values() if isinstance(study.get("students"), dict) else ():
        if isinstance(student, dict) and isinstance(student.get("source"), str):
            student["source"] = short_name(student["source"])
    return parse_config(StudyConfig, study)
