"""The tables of the forecast: what is known before training against what alignment gained, over all studies."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean
from typing import Any

from docs.forms import DASH, HARD, METHOD, MINUS, RESULTS, diagnostic, markdown, number, start, summary
from docs.studies import OF_ONE_TASK, STUDIES, Shown
from workbench import storage
from workbench.experiment.recipe import read_recipe
from workbench.study.config import read_study
from workbench.study.diagnostic import BUNDLED, Known, forecast, read_known
from workbench.values.statistics import rank_correlation

EVERY = "all of them"
GROUPS = {**OF_ONE_TASK, EVERY: sum(OF_ONE_TASK.values(), ())}
FEW = 5
"""Of fewer models no interval is drawn, of fewer cells no correlation."""
UNRELATED = "unrelated-student"
"""How the sources of students without the teacher's lineage end."""
NEAR_NONE = 0.005
"""A mean gain of less than this, either way, is called none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A training, or a cell of a study, as a forecast sees it."""

    model: str
    """The student with its teacher: what belongs to one is not drawn apart, in whatever study it stands."""
    known: float
    """Before training."""
    gain: float
    """Over circuit CE."""
    matched: bool = True

    @property
    def related(self) -> bool:
        """Whether the student is of the teacher's lineage."""
        return not self.model.endswith(UNRELATED)


@cache
def model_of(study: str, student: str) -> str:
    """Teacher and student of a study by their sources: one name for one pair of models, in whatever study."""
    config = read_study(study)
    teacher = read_recipe(config.recipe, overrides=config.overrides).teacher
    return f"{teacher} {config.students[student].source}"


@cache
def trainings(study: str) -> list[Point]:
    """Every aligned training of a study: its pairs' CKA above the floor before, and its gain in full accuracy."""
    return [
        Point(
            model=model_of(study, point["student"]),
            known=point["cka"] - point["floor"],
            gain=point["gain"],
            matched=point["condition"] == METHOD,
        )
        for point in diagnostic(study)["points"]
    ]


def correlation(points: Sequence[Point]) -> float | None:
    """Rank correlation of what was known with the gain (Spearman); None where one of them never differs."""
    return rank_correlation([point.known for point in points], [point.gain for point in points])


def by_study() -> str:
    """How the pairs' CKA before training ranks the gains of every study: over all its trainings, as stored, and over
    those of the matched arm alone."""
    head = ("study", "students", "trainings", "rank correlation", "trainings with matched partners", "rank correlation")

    def row(name: str, shown: Shown) -> list[str]:
        points = trainings(f"study_{name}")
        matched = [point for point in points if point.matched]
        values = (diagnostic(f"study_{name}")["rank_correlation"], correlation(matched))
        whole, alone = (number(value, 2).replace("-", MINUS) for value in values)
        return [shown.words, shown.students, str(len(points)), whole, str(len(matched)), alone]

    return markdown(head, [row(*each) for studies in STUDIES.values() for each in studies.items()])


def pooled() -> str:
    """The same over all studies of a task, over all of them, and over students of the teacher's lineage alone; with
    intervals over the students."""
    head = ("task", "students", "trainings", "rank correlation", "with matched partners", "rank correlation")
    points = {task: [point for name in names for point in trainings(name)] for task, names in GROUPS.items()}

    def row(words: str, every: Sequence[Point]) -> list[str]:
        matched = [point for point in every if point.matched]
        students = len({point.model for point in every})
        return [words, str(students), str(len(every)), ranked(every), str(len(matched)), ranked(matched)]

    rows = [row(task, every) for task, every in points.items()]
    kin = [
        row(f"{task}, related students alone", [point for point in points[task] if point.related])
        for task in ("entity tracking", EVERY)
    ]
    return markdown(head, [*rows, *kin])


def ranked(points: Sequence[Point], draws: int = 1000) -> str:
    """Rank correlation of what was known with the gain, with the 95 % interval of a bootstrap over models (a student
    and its teacher, all their trainings drawn together); of fewer than five models without one."""
    models: dict[str, list[Point]] = {}
    for point in points:
        models.setdefault(point.model, []).append(point)

    def of(drawn: Iterable[str]) -> float | None:
        return correlation([point for model in drawn for point in models[model]])

    value = number(of(models), 2)
    names, draw = list(models), random.Random(0)
    if len(names) < FEW or value == DASH:
        return value.replace("-", MINUS)
    found = sorted(each for _ in range(draws) if (each := of(draw.choices(names, k=len(names)))) is not None)
    low, high = (found[int(len(found) * share)] for share in (0.025, 0.975))
    return f"{value} [{low:.2f},{HARD}{high:.2f}]".replace("-0.00", "0.00").replace("-", MINUS)


@cache
def starts() -> Mapping[str, Any]:
    """What `python -m docs.starts` measured in every study's untrained students."""
    return storage.read_json(RESULTS / "forecast/starts.json")["studies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A student at one size of data, as it is before training."""

    study: str
    student: str
    scenes: int
    found: Mapping[str, Any]
    """The cell of the study's summary."""

    @property
    def start(self) -> float:
        """Its matched pairs' CKA above their floor, as the study stored it."""
        of = start(self.study, self.student, self.scenes)
        return of["cka"] - of["floor"]

    def base(self, what: str) -> float | None:
        """Of the untrained student, where the study evaluated it."""
        found = self.found["conditions"].get("base", {}).get(what)
        return None if found is None else found["mean"]

    def measured(self, what: str) -> float | None:
        """Of the untrained student, where `docs.starts` measured it."""
        return starts().get(self.study, {}).get(self.student, {}).get(what)

    def gain(self, part: str) -> Mapping[str, Any]:
        """Of the matched arm over circuit CE, over seeds."""
        return self.found["comparisons"]["circuit_ce"][METHOD][part]["over_seeds"]


@cache
def cells(study: str) -> list[Cell]:
    """Every cell of a study that has the matched arm."""
    return [
        Cell(study=study, student=student, scenes=scenes, found=found)
        for (student, scenes), found in summary(study).items()
        if METHOD in found["conditions"]
    ]


def above(cell: Cell, what: str) -> float | None:
    """A measured similarity above its floor."""
    value, floor = cell.measured(what), cell.measured(f"{what}_floor")
    return None if value is None or floor is None else value - floor


PREDICTORS: Mapping[str, Callable[[Cell], float | None]] = {
    "CKA of the matched pairs above its floor": lambda cell: cell.start,
    "the same of differences, clean minus corrupt": lambda cell: above(cell, "cka_of_differences"),
    "causal consistency under interchange": lambda cell: cell.measured("interchange_agreement_where_changed"),
    "share of the student's circuit that is matched": lambda cell: share(cell, "matched", "student_circuit"),
    "share of the student's heads that train": lambda cell: (
        cell.found["heads_trained"]["heads"] / cell.found["heads_trained"]["of"]
    ),
    "faithfulness of the student's circuit": lambda cell: cell.base("faithfulness"),
    "faithfulness of the teacher's circuit": lambda cell: cell.measured("teacher_faithfulness"),
    "accuracy of the untrained student": lambda cell: cell.base("full"),
    "training prompts": lambda cell: cell.found["train_prompts"],
}
"""What is known of a cell before its training."""


def share(cell: Cell, part: str, whole: str) -> float | None:
    """Of two measured counts."""
    some, every = cell.measured(part), cell.measured(whole)
    return None if some is None or not every else some / every


def predictors(part: str) -> str:
    """What is known before training against the mean gain of matched partners, cell by cell, by task."""

    def entry(measure: Callable[[Cell], float | None], task: str) -> str:
        points = [
            Point(model=model_of(cell.study, cell.student), known=value, gain=cell.gain(part)["mean"])
            for name in GROUPS[task]
            for cell in cells(name)
            if (value := measure(cell)) is not None
        ]
        return f"{ranked(points)} of {len(points)}" if len(points) >= FEW else DASH

    tasks = [task for task in GROUPS if sum(map(len, map(cells, GROUPS[task]))) >= FEW]
    rows = [[words, *(entry(measure, task) for task in tasks)] for words, measure in PREDICTORS.items()]
    return markdown(("known before training", *tasks), rows)


def checked() -> str:
    """What the bundled study of entity tracking forecasts for the students of the others, and what came: each cell of
    them is called as `workbench match` would call it."""
    known = read_known(BUNDLED["entity_tracking"])
    calls_of = ("likely to help", "of them gained", "likely to hurt", "of them lost")
    head = ("study", "cells", *calls_of, "gain forecast", "gain that came")
    others = {name: shown for name, shown in STUDIES["entity tracking"].items() if name != "entity"}
    calls = {name: [Called.of(cell, known) for cell in cells(f"study_{name}")] for name in others}

    def row(words: str, some: Sequence[Called]) -> list[str]:
        helped, hurt = ([call.gain for call in some if call.verdict == each] for each in VERDICTS)
        right = sum(gain > NEAR_NONE for gain in helped), sum(gain < -NEAR_NONE for gain in hurt)
        counts = (len(some), len(helped), right[0], len(hurt), right[1])
        means = (fmean(call.forecast for call in some), fmean(call.gain for call in some))
        return [words, *map(str, counts), *(f"{value:+.3f}".replace("-", MINUS) for value in means)]

    rows = [row(others[name].words, some) for name, some in calls.items()]
    return markdown(head, [*rows, row(EVERY, [call for some in calls.values() for call in some])])


VERDICTS = ("likely to help", "likely to hurt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """What the nearest trainings of a study say of a cell's start, and what it gained."""

    verdict: str
    forecast: float
    gain: float

    @classmethod
    def of(cls, cell: Cell, known: Known) -> "Called":
        """A cell called by a study."""
        said = forecast([{"cka": cell.start, "floor": 0.0}], known, task=known.task)
        assert said is not None, "a study with trainings, and pairs"
        return cls(verdict=said.verdict, forecast=said.gain.mean, gain=cell.gain("full")["mean"])


TABLES: Mapping[str, Callable[[], str]] = {
    "forecast": by_study,
    "forecast-pooled": pooled,
    "forecast-predictors": partial(predictors, "full"),
    "forecast-predictors-circuit": partial(predictors, "circuit"),
    "forecast-checked": checked,
}
