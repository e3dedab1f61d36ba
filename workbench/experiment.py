"""The road, stage by stage: discover in teacher and student, match, distil under a condition, evaluate. Each stage writes into a run folder
and is skipped when its files are there.
"""

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor

from workbench import sources, storage
from workbench.alignment import AlignedPair, PairCka, aligned_influence, aligned_pairs, floor_warning, head_similarities, hook_names, pair_ckas
from workbench.circuits import curves, discovery, evaluation
from workbench.circuits.circuit import Circuit
from workbench.distillation.assembly import teacher_outputs, trained_slices
from workbench.distillation.config import TrainingConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices
from workbench.distillation.processes import launched
from workbench.errors import InputError
from workbench.matching import HeadMap, MatchingConfig, match_heads, replace_rule
from workbench.metrics import METRICS
from workbench.models import HookedModel, Student, Teacher, require_same_vocabulary
from workbench.patching.ablation import ReferenceMeans, Replacement, ablation_profiles, counterfactual_outputs, plain_logits, reference_means
from workbench.recipe import Recipe, to_plain
from workbench.refs import Head
from workbench.runs import RunFolder
from workbench.scores import Scores
from workbench.tasks.base import PromptPairs, Split, Stage, Task
from workbench.tasks.pairs import numbered_pairs
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.registry import task_named

log = logging.getLogger("workbench")
NO_STUDENT = "this recipe names no student; add `student: <directory or hub id>`."


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


class Prompts:
    """The prompts of a recipe, by their use; each is disjoint from the others."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.recipe, self.data, self.tokenizer = recipe, recipe.data, tokenizer

    @functools.cached_property
    def _calibration(self) -> tuple[PromptPairs, PromptPairs]:
        if self.data.pairs is not None:
            pairs = self._encode(self._rows)
            if self.data.reference == "corrupt":
                return pairs.swapped(), pairs
            return pairs.rows(slice(0, self.data.reference_scenes)), pairs.rows(
                slice(self.data.reference_scenes, self.data.reference_scenes + self.data.discovery_scenes)
            )
        pairs = self._task("calibration", self.data.reference_scenes + self.data.discovery_scenes)
        cut = self.data.reference_scenes * (len(pairs) // (self.data.reference_scenes + self.data.discovery_scenes))
        return pairs.rows(slice(0, cut)), pairs.rows(slice(cut, None))

    @property
    def reference(self) -> PromptPairs:
        """For the means of the ablation."""
        return self._calibration[0]

    @property
    def discovery(self) -> PromptPairs:
        """For path patching, ablation impacts and matching."""
        if len(self._calibration[1]) == 0:
            raise InputError(
                f"no pairs are left for discovery after {self.data.reference_scenes} reference rows; give more rows, or set data.reference to corrupt."
            )
        return self._calibration[1]

    @functools.cached_property
    def train(self) -> PromptPairs:
        """For distillation."""
        return self._split("train", self.data.train_scenes)

    @functools.cached_property
    def validation(self) -> PromptPairs | None:
        """For the evaluations during training, if the recipe has any: scenes of the training split that are not trained on."""
        if not self.data.validation_scenes:
            return None
        scenes, count = self.data.train_scenes, self.data.validation_scenes
        if self.data.pairs is None:
            return self._task("train", scenes + count).rows(slice(len(self.train), None))
        return self._left("validation", self.data.reference_scenes + self.data.discovery_scenes + scenes, count)

    @functools.cached_property
    def test(self) -> PromptPairs:
        """For every number of the results table."""
        return self._split("test", self.data.test_scenes)

    @property
    def has_test(self) -> bool:
        """Whether a file of pairs has rows left for testing."""
        return len(self._rows) > self.data.reference_scenes + self.data.discovery_scenes + self.data.train_scenes + self.data.validation_scenes

    @functools.cached_property
    def _rows(self) -> Dataset:
        assert self.data.pairs is not None
        source = located(self.data.pairs)
        return self.settings.dataset(numbered_pairs(source), self.tokenizer, source=source)

    def _split(self, split: Split, scenes: int) -> PromptPairs:
        if self.data.pairs is None:
            return self._task(split, scenes)
        before = self.data.train_scenes + self.data.validation_scenes if split == "test" else 0
        return self._left(split, self.data.reference_scenes + self.data.discovery_scenes + before, scenes)

    def _left(self, use: str, start: int, count: int) -> PromptPairs:
        """Rows of the file of pairs."""
        rows = self._encode(self._rows).rows(slice(start, start + count))
        if len(rows) == 0:
            raise InputError(f"{self.data.pairs} has {len(self._rows)} rows, none left for {use}; lower the numbers of `data` or give more rows.")
        return rows

    def _task(self, split: Split, scenes: int) -> PromptPairs:
        pairs = enumerate(self.task.pairs(self.tokenizer, split=split, scenes=scenes, seed=self.data.seed))
        return self._encode(self.settings.dataset(pairs, self.tokenizer, source=f"{self.task.name} ({split})"))

    @functools.cached_property
    def task(self) -> Task:
        """The recipe's task."""
        boxes = {"boxes": self.data.boxes} if self.data.task == "entity_tracking" else {}
        return task_named(self.data.task, {**boxes, **self.data.options})

    def _encode(self, dataset: Dataset) -> PromptPairs:
        return self.settings.encode(dataset, self.tokenizer).to(self.recipe.device)

    @functools.cached_property
    def settings(self) -> PromptSettings:
        """How the recipe puts prompts to the models."""
        return PromptSettings(**{field.name: getattr(self.data, field.name) for field in fields(PromptSettings)})

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the backward search: the recipe's, else the task's."""
        if self.recipe.stages is not None:
            return tuple(Stage(name=s.name, title=s.title, position=s.position, into=s.into, composition=s.composition) for s in self.recipe.stages)
        return self.task.stages if self.data.pairs is None else (Stage(name="A", title="direct", position="last"),)


def located(name: str) -> str:
    """A relative path of the working directory, else of the project's root; anything else as it is."""
    inside = Path(__file__).parents[1] / name
    return str(inside) if not Path(name).exists() and inside.exists() else name


class Experiment:
    """A recipe at work in a run folder."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder

    def varied(self, recipe: Recipe, trial: str) -> "Experiment":
        """The same models and what was found in them, with other data or training, in a subfolder of its own."""
        other = Experiment(recipe, replace(self.folder, trial=trial))
        other.teacher, other.student = self.teacher, self.student
        return other

    def begin(self, *, resume: bool) -> None:
        """Open the run folder. Errors: `InputError` when it holds another run, or one and `resume` is off."""
        self.folder.begin({"recipe": to_plain(self.recipe)}, resume=resume)

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The teacher, self-checked."""
        return Teacher.load(located(self.recipe.teacher), device=self.recipe.device, dtype=self.recipe.teacher_dtype or self.recipe.dtype)

    @functools.cached_property
    def student(self) -> Student:
        """The student as it came, self-checked."""
        student = self.fresh_student(check=True)
        require_same_vocabulary(self.teacher, student)
        return student

    def fresh_student(self, *, check: bool = False) -> Student:
        """Another copy of the untrained student."""
        if self.recipe.student is None:
            raise InputError(NO_STUDENT)
        return Student.load(located(self.recipe.student), device=self.recipe.device, dtype=self.recipe.dtype, check=check)

    @functools.cached_property
    def prompts(self) -> Prompts:
        """The recipe's prompts, in the teacher's tokens."""
        return Prompts(self.recipe, self.teacher.tokenizer)

    def models(self) -> dict[str, HookedModel]:
        """Teacher and, where the recipe names one, student."""
        return {"teacher": self.teacher} if self.recipe.student is None else {"teacher": self.teacher, "student": self.student}

    def means(self, model: HookedModel) -> ReferenceMeans:
        """A model's ablation means over the reference prompts."""
        return reference_means(model, self.prompts.reference, per_position=self.recipe.data.per_position_means)

    def outside(self, model: HookedModel) -> Replacement:
        """What stands in for the heads outside a circuit on the test prompts."""
        return self.means(model) if self.recipe.evaluation.ablation == "mean" else counterfactual_outputs(model, self.prompts.test)

    def discover(self) -> dict[str, Circuit]:
        """Ablation impacts, path effects and a circuit in each model on its own; writes scores and circuits."""
        return {name: self._discover(name, model) for name, model in self.models().items()}

    def _discover(self, name: str, model: HookedModel) -> Circuit:
        if self.folder.circuit_file(name).exists():
            return self.folder.circuit(name)
        accuracy = float(evaluation.correct(plain_logits(model, self.prompts.discovery), self.prompts.discovery).float().mean())
        log.info("%s: accuracy %.2f on %d discovery prompts; %d heads", name, accuracy, len(self.prompts.discovery), len(model.heads))
        if self.recipe.discovery.method == "mean_ablation":
            profile = self._profiles(name, model)[self.recipe.discovery.metric]
            circuit, ranking = discovery.top_by_ablation(profile, self.recipe.discovery), profile.ranked(by="highest")
        else:
            if self.recipe.student is not None:
                self._profiles(name, model)
            circuit, ranking = self._searched(name, model)
        log.info(
            "%s: circuit of %d heads (%.0f %%): %s",
            name,
            len(circuit.heads),
            100 * circuit.fraction,
            "; ".join(f"{role}: {' '.join(map(str, heads))}" for role, heads in circuit.roles.items()),
        )
        self._examine(name, model, circuit, ranking)
        storage.write_json(self.folder.circuit_file(name), circuit.to_json())  # last: it says that this stage is done
        return circuit

    def _searched(self, name: str, model: HookedModel) -> tuple[Circuit, list[Head]]:
        """The backward search; each stage's scores are written as soon as they are there, and not computed again."""
        prompts = self.prompts.discovery
        files = {stage.name: self.folder.scores_file(name, f"path-{stage.name}") for stage in self.prompts.stages}
        resumed = any((self.folder.path / "scores").glob(f"{name}-path-*"))
        found = discovery.backward_search(model, prompts, self.prompts.stages, self.recipe.discovery, files=files)
        if not resumed:
            start = time.perf_counter()
            plain_logits(model, prompts)
            forward = time.perf_counter() - start
            taken = ", ".join(f"{stage} {seconds / forward:.0f}" for stage, seconds in found.seconds.items())
            log.info("%s: searched in %.0f s; in plain forwards, up to stage: %s", name, max(found.seconds.values()), taken)
        return found.circuit, discovery.ranking(found.scores)

    def _examine(self, name: str, model: HookedModel, circuit: Circuit, ranking: Sequence[Head]) -> None:
        """The circuit on test prompts: its report, and faithfulness over the size of the ranking, beside random ones."""
        if not self.recipe.evaluation.curve or (self.recipe.data.pairs is not None and not self.prompts.has_test):
            return
        metric, file = self.recipe.discovery.metric, self.folder.examined_file(name)
        report, _ = self.evaluate(model, circuit)
        partial = file.with_suffix(".partial")
        whole = curves.Faithfulness(model, self.prompts.test, self.outside(model), metric=METRICS[metric], file=partial)
        curve = curves.faithfulness_curve(whole, ranking, unit=metric.replace("_", " "), random_rankings=self.recipe.evaluation.random_circuits)
        storage.write_json(file, {"report": report.to_json(), "curve": curve.to_json()})
        partial.unlink(missing_ok=True)
        log.info(
            "%s: circuit alone %.3f of %.3f accuracy (random circuits %.3f); CPR %.2f (random %.2f), CMD %.2f (random %.2f)",
            name, report.circuit_accuracy, report.full_accuracy, report.random_circuit_accuracy, curve.cpr, curve.random_cpr[0], curve.cmd, curve.random_cmd[0],
        )  # fmt: skip

    def _profiles(self, name: str, model: HookedModel) -> dict[str, Scores]:
        wanted = sorted({self.recipe.matching.metric, self.recipe.discovery.metric, "accuracy", "log_probability"})
        files = {metric: self.folder.scores_file(name, f"ablation-{metric}") for metric in wanted}
        metrics = {metric: METRICS[metric] for metric in wanted}
        return ablation_profiles(model, self.prompts.discovery, self.means(model), metrics=metrics, files=files)

    def match(self) -> HeadMap:
        """Match the student's circuit to the teacher's by ablation impact; writes the head map and each pair's CKA with its floor."""
        if self.recipe.student is None:
            raise InputError(NO_STUDENT)
        self.discover()
        if not self.folder.head_map_file.exists():
            storage.write_json(self.folder.head_map_file, self._matched(self.recipe.matching, 0).to_json())
        head_map = self.folder.head_map()
        ckas = self.ckas(self.student, head_map, self.prompts.discovery)
        storage.write_json(self.folder.path / "ckas.json", [cka.to_json() for cka in ckas])
        log.info("%s", head_map.summary())
        impacts = {name: self._profiles(name, model)[self.recipe.matching.metric] for name, model in self.models().items()}
        found, floor = aligned_influence(head_map, ckas, impacts["student"], impacts["teacher"])
        storage.write_json(self.folder.path / "circuit_alignment.json", {**found.to_json(), "floor": floor})
        log.info("influence-weighted alignment of the matched heads: %.2f (prompts shuffled: %.2f)", found.value, floor)
        warning = floor_warning(ckas)
        if warning:
            log.warning("%s", warning)
        return head_map

    def aligned(self, head_map: HeadMap) -> tuple[AlignedPair, ...]:
        """The pairs of a map with their positions."""
        circuits = self.folder.circuit("student"), self.folder.circuit("teacher")
        return aligned_pairs(head_map, *circuits, self.prompts.test, positions=self.recipe.alignment.positions)

    def ckas(self, student: HookedModel, head_map: HeadMap, prompts: PromptPairs) -> list[PairCka]:
        """Debiased CKA of each pair on some prompts with its shuffled floor."""
        return pair_ckas(student, self.teacher, prompts, self.aligned(head_map), activation=self.recipe.alignment.activation)

    def head_map_of(self, spec: ConditionSpec, seed: int) -> HeadMap:
        """The map that a condition aligns by: the matched one, or another one (by another rule, or drawn with the seed) of the same student heads."""
        matched = self.folder.head_map()
        if spec.aligns in (None, "matched"):
            return matched
        other, ours = self._matched(replace_rule(self.recipe.matching, spec.aligns), seed), {match.student for match in matched.matches}
        return replace(other, matches=tuple(match for match in other.matches if match.student in ours))

    def _matched(self, config: MatchingConfig, seed: int) -> HeadMap:
        circuits = self.folder.circuit("student"), self.folder.circuit("teacher")
        impacts = {name: self._profiles(name, model)[config.metric] for name, model in self.models().items()}
        similarity, similarities, prompts = None, None, self.prompts.discovery
        if "similarity" in config.distances:
            activation = self.recipe.alignment.activation
            similarities = head_similarities(self.student, self.teacher, prompts, *circuits, activation=activation, measure=config.measure)
            similarity = similarities(torch.arange(len(prompts)))
        return match_heads(impacts["student"], impacts["teacher"], *circuits, config, seed=seed, similarity=similarity, similarities=similarities)

    def training_config(self, spec: ConditionSpec) -> TrainingConfig:
        """The recipe's training with a condition's losses."""
        alignment = self.recipe.alignment
        return replace(
            self.recipe.training,
            task_loss=spec.task_loss or self.recipe.training.task_loss,
            weight=alignment.weight if spec.aligns else 0.0,
            estimator=alignment.estimator,
            measure=alignment.measure,
            measure_options=alignment.options,
            pairs=alignment.pairs,
            activation=alignment.activation,
        )

    def distill(self, condition: str, seed: int, *, resume: bool) -> tuple[Student, TrainedSlices]:
        """Train a fresh student under a condition; writes its log, checkpoints and (if wanted) the student itself."""
        spec, student = CONDITIONS[condition], self.fresh_student()
        if spec.trains is None:
            return student, TrainedSlices(student, [])
        config, pairs = self.training_config(spec), self.aligned(self.head_map_of(spec, seed)) if spec.aligns else ()
        heads = None if spec.trains == "all" else self.trained_heads()
        slices = trained_slices(student, heads, config, train_kv=self.recipe.train_kv, seed=seed)
        log.info("  %s of %s parameters train (%.1f %%)", f"{slices.count:,}", f"{slices.total:,}", 100 * slices.fraction)
        names, processes = hook_names([pair.teacher for pair in pairs], config.activation), launched(student.device)
        with processes.main_first():
            outputs = teacher_outputs(self.recipe.teacher_outputs, self.teacher, self.prompts.train, names, sources.cache_root() / "teacher")
        run = Distillation(
            student, slices, self.prompts.train, outputs, pairs, config, seed=seed, validation=self.prompts.validation, processes=processes
        )
        folder = self.folder.condition(condition, seed)
        run.run(folder, resume=resume, label=f"{condition}, seed {seed}")
        if slices.sharded:  # one process evaluates and saves, which takes a whole student
            student = self.fresh_student()
            slices.onto(student)
        if self.recipe.save_students and processes.is_main:
            student.save(folder / "student")
        return student, slices

    def trained_heads(self) -> list[Head]:
        """The student's heads that train where a condition trains heads: the matched ones, or its circuit."""
        if self.recipe.training.heads == "circuit":
            return list(self.folder.circuit("student").heads)
        return [ours for ours, _ in self.folder.head_map().pairs]

    def evaluate(self, model: HookedModel, circuit: Circuit) -> tuple[evaluation.CircuitReport, dict[str, Tensor]]:
        """A model and its circuit on the test prompts: the report, and which prompts were answered right (for paired tests)."""
        means, config = self.outside(model), self.recipe.evaluation
        report = evaluation.evaluate_circuit(model, self.prompts.test, circuit, means, scope=config.scope, random_circuits=config.random_circuits)
        full = evaluation.correct(plain_logits(model, self.prompts.test), self.prompts.test)
        alone = evaluation.correct(evaluation.circuit_logits(model, self.prompts.test, circuit, means, scope=config.scope), self.prompts.test)
        return report, {"full": full.to(torch.uint8), "circuit": alone.to(torch.uint8)}


def mean_cka_and_floor(values: Sequence[PairCka]) -> tuple[float | None, float | None]:
    """(mean CKA, mean floor) of some pairs; None without pairs."""
    if not values:
        return None, None
    return sum(v.cka for v in values) / len(values), sum(v.floor for v in values) / len(values)
