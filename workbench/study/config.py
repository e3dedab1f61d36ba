"""The settings of a study."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from workbench.errors import InputError, nearest
from workbench.experiment.conditions import ConditionName
from workbench.experiment.recipe import parse_config, read_yaml

STRICT = ConfigDict(extra="forbid")
BESIDE_METHOD = ("teacher", "data", "discovery", "evaluation", "dtype", "teacher_dtype", "training")
"""Keys of a recipe in which a student and its baseline must not differ."""
GROWING = ("students", "train_scenes", "seeds", "conditions")
"""What a study that has been begun may get more of."""


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
    conditions: tuple[ConditionName, ...] | None = None
    """In place of the study's."""
    baseline: str | None = None
    """Another student of the study, the same model under another method, whose rows stand in the comparisons for the
    conditions that this one leaves out: what is trained without alignment need not be trained under every method."""


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
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """The learning rate of each condition is chosen among these in the same way: the method's together with lambda,
    that of the others by themselves (with alignment: at the lambda that is chosen). Empty: the recipe's own, for
    all."""
    validation_seeds: tuple[int, ...] = ()
    """Training seeds of the choice of lambda and learning rates; none of them is among `seeds`."""
    seeds: tuple[int, ...]
    conditions: tuple[ConditionName, ...]
    best: tuple[ConditionName, ...] = ()
    """Conditions under which only the student of the highest validation accuracy (at its chosen lambda) is trained,
    where the students are one model under several methods: controls of the method that validation chooses."""
    anew: tuple[ConditionName, ...] = ()
    """Conditions in whose students circuits are found anew, with the first seed at the first data size."""

    def __post_init__(self) -> None:
        for name, student in self.students.items():
            self._check_baseline(name, student)
        if self.best and len(self.weights) < 2:
            raise InputError("`best` is chosen by validation, as lambda is; give several `weights`, or leave it out.")
        if self.best and self.learning_rates:
            raise InputError(
                "the learning rates of `best` can't be chosen, for which student trains them is known last; give those "
                "conditions to the students, or leave `learning_rates` out."
            )
        shared = set(self.seeds) & set(self.validation_seeds)
        if shared:
            raise InputError(
                f"the seeds {sorted(shared)} are both for choosing lambda and for the results; use fresh ones for the "
                "results."
            )
        if self.chooses and not self.validation_seeds:
            raise InputError(
                "nothing can be chosen among several `weights`, or among `learning_rates`, without `validation_seeds`; "
                "give some, or a single weight and no `learning_rates`."
            )

    @property
    def chooses(self) -> bool:
        """Whether validation prompts choose anything."""
        return len(self.weights) > 1 or bool(self.learning_rates)

    def grows(self, before: "StudyConfig") -> bool:
        """Whether this is a study that has been begun, with more to do: further students, conditions, and data sizes or
        seeds after those that it had. All else, on which its rows rest, is the same: where a student is compared with
        another's rows, or the learning rate of each condition was chosen, the conditions too; where the best student
        was, the students."""
        settled = bool(before.learning_rates)
        return (
            all(getattr(self, one.name) == getattr(before, one.name) for one in fields(self) if one.name not in GROWING)
            and (not before.best or len(self.students) == len(before.students))
            and all(self._grows_in(before, name, settled=settled) for name in before.students)
            and self.train_scenes[: len(before.train_scenes)] == before.train_scenes
            and self.seeds[: len(before.seeds)] == before.seeds
        )

    def _grows_in(self, before: "StudyConfig", name: str, *, settled: bool) -> bool:
        """Whether a student is the same as before, and is asked for no condition less."""
        if name not in self.students:
            return False
        student, old = self.students[name], before.students[name]
        asked, had = set(self.asked(name)), set(before.asked(name))
        same = all(
            getattr(student, one.name) == getattr(old, one.name) for one in fields(old) if one.name not in GROWING
        )
        return same and (asked == had if settled or old.baseline is not None else asked >= had)

    def asked(self, student: str) -> tuple[ConditionName, ...]:
        """The conditions of a student: its own, else the study's."""
        own = self.students[student].conditions
        return self.conditions if own is None else own

    def _check_baseline(self, name: str, student: StudentConfig) -> None:
        """The other student is there, of the same model, and evaluated on the same prompts."""
        if student.baseline is None:
            return
        other = self.students.get(student.baseline)
        if other is None or student.baseline == name:
            raise InputError(
                f"the baseline of {name} is another student of the study; "
                f"{nearest(student.baseline, [each for each in self.students if each != name])}"
            )
        apart = {each for one in (student, other) for each in one.overrides if each.split(".")[0] in BESIDE_METHOD}
        if other.source != student.source or apart:
            raise InputError(
                f"{name} can't be compared with the rows of {student.baseline}: "
                + (f"they differ in {', '.join(sorted(apart))}" if apart else "they are different models")
                + "; leave `baseline` out and give it conditions of its own."
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
