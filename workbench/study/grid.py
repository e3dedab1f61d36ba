"""A study: students x data sizes x conditions x seeds, lambda chosen on validation prompts, everything resumable.

out/
  study.json                                  configuration, versions, commit, machine
  <student>/                                  a run folder: circuits, head map, scores (found once for all data sizes)
    scenes-<n>/weight-<lambda>/conditions/    trainings on the validation seeds, evaluated on validation prompts alone
                                              (weight-<lambda>-rate-<r> where learning rates are tried too)
    scenes-<n>/weight.json                    the chosen lambda and what each would have given
    scenes-<n>/conditions/                    all conditions and seeds at that lambda, evaluated on the test prompts
    scenes-<n>/anew/<condition>.json          circuits found anew in trained students
  summary.json                                cells, comparisons, diagnostic
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from workbench import storage
from workbench.circuits.comparison import compare
from workbench.circuits.methods.registry import method_named
from workbench.distillation.reports import evaluations, read_training
from workbench.errors import InputError
from workbench.experiment.arms import run_arms, run_condition
from workbench.experiment.conditions import CONDITIONS, METHOD
from workbench.experiment.discover import discover_one, inquiry_of
from workbench.experiment.distill import distill, is_trained
from workbench.experiment.match import aligned_ckas, head_map_of, match, mean_cka_and_floor
from workbench.experiment.preflight import preflight
from workbench.experiment.recipe import Recipe, read_recipe, to_plain
from workbench.experiment.run import Models, Run
from workbench.experiment.runs import RunFolder, holds_nothing_but, leave_free
from workbench.models.hooked_model import Student
from workbench.storage.provenance import provenance
from workbench.study.choice import Point, choose, chosen_accuracy, method_points, other_points, read_choice
from workbench.study.config import StudyConfig, written_study
from workbench.values.refs import Head

log = logging.getLogger("workbench")


def opened_study(path: Path) -> "Study":
    """The study that a folder holds. Errors: `InputError` when it holds none."""
    return Study(_described(path / "study.json"), path)


def _described(file: Path) -> StudyConfig:
    """The study that `study.json` describes. Errors: `InputError` when it describes none."""
    description = storage.read_field(storage.read_json(file), "study", what=f"the description of a study ({file})")
    if not isinstance(description, Mapping):
        raise InputError(f"{file} is damaged (its study is no object); begin the study anew.")
    return written_study(dict(description))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One student at one data size: its run at the chosen lambda."""

    student: str
    scenes: int
    run: Run

    @property
    def path(self) -> Path:
        """Where the cell's results lie."""
        return self.run.folder.trial_path


class Study:
    """A study at work in a folder."""

    def __init__(self, config: StudyConfig, path: Path) -> None:
        self.config, self.path = config, path
        self.recipe = read_recipe(config.recipe, overrides=_dotted(config.overrides))
        if self.recipe.endpoint is not None:
            raise InputError(
                "a study asks what alignment adds, and a teacher behind an endpoint has no activations to align; leave "
                "`endpoint` out of its recipe."
            )
        if not self.recipe.data.sizes["validation"] or not self.recipe.training.evaluate_every:
            raise InputError(
                "a study chooses lambda on validation prompts; set data.validation_scenes and training.evaluate_every "
                "in `overrides`."
            )
        self._models = Models()
        self._searched: dict[str, Run] = {}
        self._open: dict[str, Run] = {}

    def begin(self, *, resume: bool) -> None:
        """Open the folder, and hold it; a study that is resumed may have more to do than it had (`StudyConfig.grows`).
        Errors: `InputError` when another process works in it, when it holds another study, or one and `resume` is
        off."""
        file, described = self.path / "study.json", to_plain(self.config)
        storage.hold(self.path, lambda: leave_free(self.path, file.name))
        if not file.exists() or holds_nothing_but(self.path, file.name):
            storage.write_json(file, {"study": described, **provenance()})
            return
        if not resume:
            raise InputError(f"{self.path} already holds a study; resume it with --resume, or choose another --out.")
        before = _described(file)
        if before == self.config:
            return
        if not self.config.grows(before):
            raise InputError(
                f"{self.path} was begun as another study; resume with its recipe (it is in {file}), to which students, "
                "conditions, and further data sizes and seeds may be added, or choose another --out."
            )
        for name in self.config.students:  # what can't be run is refused before it is asked for
            self._check(self._opened(name), name)
        log.info("%s has more to do than before; a cell counts again when all of it is done", self.path)
        old = storage.read_json(file)
        storage.write_json(file, {**old, "study": described, "grown": [*old.get("grown", []), provenance()]})

    def folder(self, student: str) -> RunFolder:
        """Where a student's circuits and head map lie."""
        return RunFolder(self.path / student)

    def weight_file(self, student: str, scenes: int) -> Path:
        """Where a cell's chosen lambda lies."""
        return self.path / student / f"scenes-{scenes}" / "weight.json"

    def anew_file(self, student: str, scenes: int, condition: str) -> Path:
        """Where a circuit lies that was found anew in a trained student."""
        return self.path / student / f"scenes-{scenes}" / "anew" / f"{condition}.json"

    def prepare(self) -> None:
        """Circuits and head maps of all students, which every trial reads."""
        for name in self.config.students:
            self._matched(name)

    def unsearched(self) -> list[tuple[str, str]]:
        """(student, `teacher` or `student`) of the circuits that can be looked for at once: each model's once, because
        other students of the study take over what was found in the same model where they may."""
        sources = {student.source: name for name, student in reversed(self.config.students.items())}
        first = next(iter(self.config.students))
        wanted = [(first, "teacher"), *((name, "student") for name in self.config.students if name in sources.values())]
        return [(name, side) for name, side in wanted if not self.folder(name).circuit_file(side).exists()]

    def search(self, student: str, model: str) -> None:
        """The circuit of one model of a student's run."""
        run = self._opened(student)
        self._check(run, student)
        discover_one(run, model)

    def choose(self) -> None:
        """lambda of every cell, from its trainings (which are done here where they are not yet)."""
        for _ in self.cells():
            pass

    def points(self, student: str, scenes: int) -> list[Point]:
        """Where the conditions of a cell are still to be tried; those whose lambda the method chooses, once it has."""
        base = self._opened(student)
        done = partial(self._is_validated, base, scenes)
        method = method_points(self.config)
        weight = self._chosen_weight(base, scenes) if all(map(done, method)) else None
        points = [*method, *other_points(self.config, self.conditions(student, scenes), weight)]
        return [point for point in points if not done(point)]

    def run_trial(self, student: str, scenes: int, condition: str, seed: int, *, at: Point | None = None) -> None:
        """One training: on trial `at` a point, to be judged on validation prompts; else as chosen, evaluated on the
        test prompts.

        Errors: `InputError` when circuits, head map or (without `at`) the choice of lambda are not there yet.
        """
        base = self._opened(student)
        base.folder.head_map()  # it says what is missing
        if at is not None:
            self._validated_once(base, scenes, at, seed)
            return
        if not self.weight_file(student, scenes).exists():
            raise InputError(f"lambda of {student} at {scenes} scenes has not been chosen yet.")
        run_condition(self._chosen(base, scenes), condition, seed, resume=True)

    def run(self) -> None:
        """Everything that is not there yet: discovery, lambda, conditions, circuits anew; the scarce data size of all
        students first."""
        if self.config.best:
            self.choose()
        for cell in self.cells():
            run_arms(cell.run, self.arms(cell.student, cell.scenes), resume=True)
            if cell.scenes == self.config.train_scenes[0]:
                for condition in self.config.anew:
                    self.find_anew(cell.student, cell.scenes, condition)

    def conditions(self, student: str, scenes: int) -> tuple[str, ...]:
        """Of a cell; those for the best student are known once lambda is chosen for all."""
        best = self.config.best if self.config.best and self.best(scenes) == student else ()
        return tuple(dict.fromkeys((*self.config.asked(student), *best)))

    def best(self, scenes: int) -> str | None:
        """The student of the highest validation accuracy at its chosen lambda; None before all have chosen theirs."""
        files = {name: self.weight_file(name, scenes) for name in self.config.students}
        if not all(file.exists() for file in files.values()):
            return None
        accuracies = {name: chosen_accuracy(read_choice(file)) for name, file in files.items()}
        known = {name: value for name, value in accuracies.items() if value is not None}
        return max(known, key=lambda name: known[name]) if known else None

    def arms(self, student: str, scenes: int) -> list[tuple[str, int]]:
        """Conditions and seeds of a cell; what is not trained has no seed, and is evaluated once."""
        return [
            (condition, seed)
            for seed in self.config.seeds
            for condition in self.conditions(student, scenes)
            if CONDITIONS[condition].trains is not None or seed == self.config.seeds[0]
        ]

    def finished(self) -> list[Cell]:
        """The cells whose arms have all been run."""
        folders = {name: self.folder(name) for name in self.config.students}
        return [
            Cell(student=name, scenes=scenes, run=self._chosen(self._matched(name), scenes))
            for scenes in self.config.train_scenes
            for name, folder in folders.items()
            if all(
                (replace(folder, trial=f"scenes-{scenes}").condition(*arm) / "result.json").exists()
                for arm in self.arms(name, scenes)
            )
        ]

    def cells(self) -> Iterator[Cell]:
        """Every student and data size with its chosen lambda, which is chosen on the way where it is not yet."""
        for scenes in self.config.train_scenes:
            for name in self.config.students:
                yield Cell(student=name, scenes=scenes, run=self._chosen(self._matched(name), scenes))

    def _opened(self, name: str) -> Run:
        """A student's run; models that are loaded already are not loaded again."""
        if name not in self._open:
            student = self.config.students[name]
            own = read_recipe(self.config.recipe, overrides=_dotted(self.config.overrides) | _dotted(student.overrides))
            run = Run(replace(own, student=student.source), self.folder(name), self._models)
            run.begin(resume=True, lock=False)  # the study holds its whole folder, for the workers of a cluster too
            self._open[name] = run
        return self._open[name]

    def _matched(self, name: str) -> Run:
        """A student's run with circuits and head map."""
        if name in self._searched:
            return self._searched[name]
        run = self._opened(name)
        for other in self._searched.values():
            _share_results(other, run)
        log.info("student %s", name)
        self._check(run, name)
        match(run)
        self._searched[name] = run
        return run

    def _check(self, run: Run, name: str) -> None:
        """What can be refused of a student's trainings before anything is computed; the recipe's own data size trains
        nothing."""
        conditions = (
            *self.config.asked(name),
            *self.config.best,
            *([METHOD] if self.config.chooses else []),
        )
        for scenes in self.config.train_scenes:
            preflight(run.varied(_at(run.recipe, scenes, min(self.config.weights)), f"scenes-{scenes}"), conditions)

    def _chosen(self, base: Run, scenes: int) -> Run:
        """A cell's run as validation chose it; it is chosen here where it is not yet."""
        name = base.folder.path.name
        file = self.weight_file(name, scenes)
        if not file.exists():
            choice = choose(self.config, self.conditions(name, scenes), partial(self._validated, base, scenes))
            accuracy = chosen_accuracy(choice)
            if accuracy is not None:
                log.info(
                    "%s, %d scenes: lambda %g (validation accuracy %.3f)", name, scenes, choice["weight"], accuracy
                )
            storage.write_json(file, dict(choice))
        choice = read_choice(file)
        recipe = _at(base.recipe, scenes, choice["weight"])
        rates = recipe.learning_rates | choice.get("learning_rates", {})
        return base.varied(replace(recipe, learning_rates=rates), f"scenes-{scenes}")

    def _chosen_weight(self, base: Run, scenes: int) -> float:
        """lambda, from trials of the method that are all done."""
        return choose(self.config, (), partial(self._validated, base, scenes))["weight"]

    def _validated(self, base: Run, scenes: int, point: Point) -> list[float]:
        """Validation accuracy after the last step, for each validation seed; nothing is evaluated on the test
        prompts."""
        return [self._validated_once(base, scenes, point, seed) for seed in self.config.validation_seeds]

    def _validated_once(self, base: Run, scenes: int, point: Point, seed: int) -> float:
        run = self._on_trial(base, scenes, point)
        if not is_trained(run, point.condition, seed):
            distill(run, point.condition, seed, resume=True)
        return evaluations(read_training(run.folder.condition(point.condition, seed)))[-1][1]

    def _is_validated(self, base: Run, scenes: int, point: Point) -> bool:
        run = self._on_trial(base, scenes, point)
        return all(is_trained(run, point.condition, seed) for seed in self.config.validation_seeds)

    @staticmethod
    def _on_trial(base: Run, scenes: int, point: Point) -> Run:
        return base.varied(_at(base.recipe, scenes, point.weight, point.rate), f"scenes-{scenes}/{point.folder}")

    def find_anew(self, student_name: str, scenes: int, condition: str) -> None:
        """The circuit of a student that has been trained, found by the recipe's own search, beside the untrained
        student's and the teacher's."""
        file = self.anew_file(student_name, scenes, condition)
        if file.exists():
            return
        run, seed = self._chosen(self._opened(student_name), scenes), self.config.seeds[0]
        trained = run.folder.condition(condition, seed) / "student"
        student = (
            run.student if CONDITIONS[condition].trains is None else Student.load(trained, device=self.recipe.device)
        )
        config = run.recipe.discovery
        finder = method_named(config.method, config.options)
        anew = finder.find(inquiry_of(run, "student", student, keep=False)).circuit
        before, teacher = run.circuit("student"), run.circuit("teacher")
        layers = self.config.students[student_name].teacher_layers
        overlap = None if layers is None else lineage_overlap(anew.heads, teacher.heads, layers)
        storage.write_json(
            file,
            {
                "circuit": anew.to_json(),
                "against_untrained": compare(before, anew).to_json(),
                "teacher_overlap": overlap,
                "seed": seed,
            },
        )


def _at(recipe: Recipe, scenes: int, weight: float, rate: float | None = None) -> Recipe:
    """The recipe at a data size and a lambda, and at a learning rate in place of its own."""
    training = recipe.training if rate is None else replace(recipe.training, learning_rate=rate)
    return replace(
        recipe,
        data=replace(recipe.data, train_scenes=scenes),
        alignment=replace(recipe.alignment, weight=weight),
        training=training,
    )


def _agree(first: Recipe, second: Recipe, *keys: str) -> bool:
    return all(getattr(first, key) == getattr(second, key) for key in keys)


def _share_results(finished: Run, wanting: Run) -> None:
    """Scores and circuits that a study has found already in the same model, by the same search, serve again."""
    first, second = finished.recipe, wanting.recipe
    searched = _agree(
        first, second, "teacher", "teacher_dtype", "device", "dtype", "data", "stages", "discovery", "evaluation"
    )
    if not searched or first.matching.metric != second.matching.metric:
        return
    for model in ("teacher", "student") if first.student == second.student else ("teacher",):
        for file in sorted(
            [*finished.folder.path.glob(f"scores/{model}-*"), *finished.folder.path.glob(f"circuits/{model}*")]
        ):
            target = wanting.folder.path / file.relative_to(finished.folder.path)
            if not target.exists():
                storage.write_atomically(target, lambda temporary, file=file: shutil.copyfile(file, temporary))


def _dotted(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`{"training": {"steps": 20}}`, as `--set overrides.training.steps=20` gives it, as `{"training.steps": 20}`."""
    dotted: dict[str, Any] = {}
    for key, value in overrides.items():
        dotted |= (
            {f"{key}.{rest}": inner for rest, inner in _dotted(value).items()}
            if isinstance(value, Mapping) and value
            else {key: value}
        )
    return dotted


def lineage_overlap(student: tuple[Head, ...], teacher: tuple[Head, ...], layers: tuple[int, ...]) -> float:
    """Jaccard overlap of two circuits in the teacher's own heads, of those layers that the student has kept."""
    ours = {Head(layers[head.layer], head.index) for head in student}
    theirs = {head for head in teacher if head.layer in layers}
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def starting_similarity(cell: Cell, condition: str, seed: int) -> tuple[float, float] | None:
    """(mean CKA, mean floor) of the pairs that a condition aligns, in the untrained student on the discovery prompts;
    None if it aligns none."""
    run, aligning = cell.run, CONDITIONS[condition]
    if aligning.aligns is None:
        return None
    file = cell.path / "starting" / f"{condition}-{seed}.json"
    if not file.exists():
        cka, floor = mean_cka_and_floor(
            aligned_ckas(run, run.student, head_map_of(run, aligning, seed), run.prompts.discovery)
        )
        storage.write_json(file, {"cka": cka, "floor": floor})
    similarity = storage.read_typed(storage.read_json(file), Starting, what=f"a starting similarity ({file})")
    return similarity["cka"], similarity["floor"]


class Starting(TypedDict):
    """Where the pairs of a training began."""

    cka: float
    floor: float
