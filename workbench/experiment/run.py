"""A run: a recipe at work in a run folder, with its prompts and its models, which are loaded when first asked for."""

import functools
import json
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from workbench import storage
from workbench.circuits.circuit import Circuit
from workbench.circuits.config import ReplacementKind
from workbench.distillation.processes import launched
from workbench.errors import InputError
from workbench.experiment.origins import Origin, digest_of, stated
from workbench.experiment.prompts import Prompts
from workbench.experiment.recipe import Recipe, to_plain
from workbench.experiment.runs import RunFolder
from workbench.matching import HeadMap
from workbench.matching.head_rows import Readings
from workbench.models.hooked_model import Dtype, HookedModel, Student, Teacher
from workbench.patching.replacement import (
    ReferenceMeans,
    Replacement,
    Zero,
    counterfactual_outputs,
    reference_means,
    resampled_outputs,
)
from workbench.storage import located
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import same_vocabulary

NO_STUDENT = "this recipe names no student; add `student: <directory or hub id>`."
BESIDE = ("title", "conditions", "seeds", "save_students")
"""Keys of a recipe that no row depends on."""
Kind = TypeVar("Kind", bound=HookedModel)


class Models:
    """Models by what they were loaded from and as; each is loaded, and checked, once. Runs of one study share them."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, ...], HookedModel] = {}
        self._fingerprints: dict[int, str] = {}
        self._readings: dict[int, Readings] = {}

    def get(self, kind: type[Kind], source: str, *, device: str, dtype: Dtype, **placing: Any) -> Kind:
        """The model of a source, as a teacher or a student; `placing` as in `HookedModel.load`."""
        key = (kind.__name__, source, device, dtype, json.dumps(placing, sort_keys=True))
        if key not in self._loaded:
            self._loaded[key] = kind.load(located(source), device=device, dtype=dtype, **placing)
        model = self._loaded[key]
        assert isinstance(model, kind)
        return model

    def readings(self, model: HookedModel) -> Readings:
        """What is kept of a model that does not change, for all runs that share these models."""
        return self._readings.setdefault(id(model), Readings(model))

    def fingerprint(self, model: HookedModel) -> str:
        """Of a model's weights, taken once."""
        if id(model) not in self._fingerprints:
            self._fingerprints[id(model)] = model.fingerprint()
        return self._fingerprints[id(model)]


@dataclass(frozen=True, eq=False)
class Run:
    """A recipe in a run folder. What it holds beside them is computed once."""

    recipe: Recipe
    folder: RunFolder
    models: Models = field(default_factory=Models, repr=False)
    _origins: dict[str, Origin] = field(default_factory=dict, init=False, repr=False)

    def begin(self, *, resume: bool, lock: bool = True) -> None:
        """Open the run folder, and hold it. Errors: as `RunFolder.begin`."""
        processes = launched(self.recipe.device)
        with processes.main_first():  # under `accelerate launch` the first process begins, and holds it for all
            first = processes.is_main
            self.folder.begin({"recipe": to_plain(self.recipe)}, resume=resume or not first, lock=lock and first)

    def varied(self, recipe: Recipe, trial: str) -> "Run":
        """The same models and what was found in them, with other data or training, in a subfolder of its own."""
        return replace(self, recipe=recipe, folder=replace(self.folder, trial=trial))

    @property
    def teacher(self) -> Teacher:
        """The teacher, self-checked. Errors: `InputError` for one behind an endpoint."""
        recipe = self.recipe
        if recipe.endpoint is not None:
            raise InputError(
                f"{recipe.teacher} answers at {recipe.endpoint.url}, and is not loaded: it has no heads to match or "
                "align here; leave `endpoint` out and name a model to load."
            )
        return self.models.get(
            Teacher,
            recipe.teacher,
            device=recipe.device if recipe.teacher_device_map is None else "cpu",
            dtype=recipe.teacher_dtype or recipe.dtype,
            quantisation=recipe.teacher_quantisation,
            device_map=recipe.teacher_device_map,
        )

    @property
    def student(self) -> Student:
        """The student as it came, self-checked."""
        return self.models.get(Student, self._student, device=self.recipe.device, dtype=self.recipe.dtype)

    def fresh_student(self) -> Student:
        """Another copy of the untrained student."""
        return Student.load(located(self._student), device=self.recipe.device, dtype=self.recipe.dtype, check=False)

    @property
    def _student(self) -> str:
        if self.recipe.student is None:
            raise InputError(NO_STUDENT)
        return self.recipe.student

    def both(self) -> dict[str, HookedModel]:
        """Teacher and, where the recipe names one, student; the student alone where the teacher answers elsewhere."""
        if self.recipe.endpoint is not None:
            return {"student": self.student}
        teacher: dict[str, HookedModel] = {"teacher": self.teacher}
        return teacher if self.recipe.student is None else {**teacher, "student": self.student}

    @functools.cached_property
    def prompts(self) -> Prompts:
        """The recipe's prompts, in tokens that both models share, or in the student's with the teacher's reading beside
        them."""
        if self.recipe.endpoint is not None:
            return Prompts(self.recipe, self.student.tokenizer)
        ours, theirs = (self.teacher if self.recipe.student is None else self.student).tokenizer, self.teacher.tokenizer
        return (
            Prompts(self.recipe, theirs)
            if same_vocabulary(ours, theirs)
            else Prompts(self.recipe, ours, teacher=theirs)
        )

    def read_by(self, model: HookedModel, prompts: PromptPairs) -> PromptPairs:
        """Prompts in the tokens of one of the models."""
        return prompts.for_teacher if self._is_teacher(model) else prompts

    def _is_teacher(self, model: HookedModel) -> bool:
        return self.recipe.endpoint is None and model is self.teacher

    def circuit(self, name: str) -> Circuit:
        """The circuit of `teacher` or `student` in the run folder. Errors: `InputError` when it is not there, or was
        found in other weights, on other prompts or by another search than this run's."""
        return self.folder.circuit(name, self.circuit_origin(name))

    def head_map(self) -> HeadMap:
        """The head map in the run folder. Errors: `InputError` when it is not there, or is of other circuits."""
        return self.folder.head_map(self.head_map_origin())

    def circuit_origin(self, name: str) -> Origin:
        """What a circuit is found in, on and by."""
        if name not in self._origins:
            model = self.both()[name]
            read = [self.read_by(model, part) for part in (self.prompts.reference, self.prompts.discovery)]
            search = [
                stated(to_plain(self.recipe.discovery), "discovery"),
                [to_plain(stage) for stage in self.prompts.stages],
            ]
            self._origins[name] = {
                "model": name,
                "weights": self.models.fingerprint(model),
                "prompts": storage.digest(*(part.fingerprint() for part in read)),
                "search": digest_of(search),
            }
        return self._origins[name]

    def head_map_origin(self) -> Origin:
        """What a head map is made of."""
        circuits = {f"{name} circuit": digest_of(self.circuit(name).to_json()) for name in ("student", "teacher")}
        return {**circuits, "matching": digest_of(stated(to_plain(self.recipe.matching), "matching"))}

    def condition_origin(self, condition: str, seed: int) -> Origin:
        """What the row of a condition and seed rests on."""
        recipe = {name: part for name, part in to_plain(self.recipe).items() if name not in BESIDE}
        recipe = stated(recipe, "recipe")
        recipe |= {
            name: stated(recipe[name], name)
            for name in ("discovery", "evaluation", "training", "alignment", "matching")
        }
        weights = {name: self.models.fingerprint(model) for name, model in self.both().items()}
        return {"condition": condition, "seed": str(seed), "recipe": digest_of(recipe), **weights}

    def means(self, model: HookedModel) -> ReferenceMeans:
        """A model's ablation means over the reference prompts."""
        return reference_means(
            model, self.read_by(model, self.prompts.reference), per_position=self.recipe.data.per_position_means
        )

    def outside(self, model: HookedModel, prompts: PromptPairs | None = None) -> Replacement:
        """What stands in for the heads outside a circuit on the test prompts (or some of them)."""
        role = "teacher" if self._is_teacher(model) else "student"
        there = self.read_by(model, self.prompts.test) if prompts is None else prompts
        return self.stand_in(role, model, self.recipe.evaluation.ablation, there)[0]

    def stand_in(
        self, name: str, model: HookedModel, kind: ReplacementKind, prompts: PromptPairs
    ) -> tuple[Replacement, str]:
        """What stands in for an ablated head of a model on some prompts (in the tokens of `name`, teacher or student),
        with that in words."""
        if kind == "zero":
            return Zero(), "zero"
        if kind == "counterfactual":
            return counterfactual_outputs(model, prompts), "each prompt's own corrupt counterpart"
        reference = self.prompts.reference.for_teacher if name == "teacher" else self.prompts.reference
        if kind == "resampled":
            drawn = resampled_outputs(model, reference, seed=self.recipe.data.seed)
            return drawn, f"the output on one of {len(reference)} drawn prompts"
        by_position = self.recipe.data.per_position_means if kind == "mean" else kind == "per_position_mean"
        how = "position by position" if by_position else "over all tokens"
        means = reference_means(model, reference, per_position=by_position)
        return means, f"mean over {len(reference)} reference prompts, {how}"
