"""What every stage needs: a recipe's models, prompts and ablations, and the run folder that it works in."""

import functools
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from workbench.circuits import evaluation
from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.experiment.prompts import Prompts
from workbench.experiment.recipe import Recipe, to_plain
from workbench.experiment.runs import RunFolder
from workbench.models.hooked_model import HookedModel, Student, Teacher
from workbench.patching.ablation import ReferenceMeans, Replacement, counterfactual_outputs, reference_means
from workbench.storage import located
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import same_vocabulary

NO_STUDENT = "this recipe names no student; add `student: <directory or hub id>`."

Same = TypeVar("Same", bound="Setting")


class Setting:
    """A recipe in a run folder, before anything is found."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder

    def varied(self: Same, recipe: Recipe, trial: str) -> Same:
        """The same models and what was found in them, with other data or training, in a subfolder of its own."""
        other = type(self)(recipe, replace(self.folder, trial=trial))
        other.teacher, other.student = self.teacher, self.student
        return other

    def begin(self, *, resume: bool) -> None:
        """Open the run folder. Errors: `InputError` when it holds another run, or one and `resume` is off."""
        self.folder.begin({"recipe": to_plain(self.recipe)}, resume=resume)

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The teacher, self-checked."""
        return Teacher.load(
            located(self.recipe.teacher),
            device=self.recipe.device,
            dtype=self.recipe.teacher_dtype or self.recipe.dtype,
        )

    @functools.cached_property
    def student(self) -> Student:
        """The student as it came, self-checked."""
        return self.fresh_student(check=True)

    def fresh_student(self, *, check: bool = False) -> Student:
        """Another copy of the untrained student."""
        if self.recipe.student is None:
            raise InputError(NO_STUDENT)
        return Student.load(
            located(self.recipe.student), device=self.recipe.device, dtype=self.recipe.dtype, check=check
        )

    @functools.cached_property
    def prompts(self) -> Prompts:
        """The recipe's prompts, in tokens that both models share, or in the student's with the teacher's reading beside
        them."""
        ours, theirs = (self.teacher if self.recipe.student is None else self.student).tokenizer, self.teacher.tokenizer
        return (
            Prompts(self.recipe, theirs)
            if same_vocabulary(ours, theirs)
            else Prompts(self.recipe, ours, teacher=theirs)
        )

    def read_by(self, model: HookedModel, prompts: PromptPairs) -> PromptPairs:
        """Prompts in the tokens of one of the models."""
        return prompts.for_teacher if model is self.teacher else prompts

    def models(self) -> dict[str, HookedModel]:
        """Teacher and, where the recipe names one, student."""
        return (
            {"teacher": self.teacher}
            if self.recipe.student is None
            else {"teacher": self.teacher, "student": self.student}
        )

    def means(self, model: HookedModel) -> ReferenceMeans:
        """A model's ablation means over the reference prompts."""
        return reference_means(
            model, self.read_by(model, self.prompts.reference), per_position=self.recipe.data.per_position_means
        )

    def outside(self, model: HookedModel) -> Replacement:
        """What stands in for the heads outside a circuit on the test prompts."""
        if self.recipe.evaluation.ablation == "mean":
            return self.means(model)
        return counterfactual_outputs(model, self.read_by(model, self.prompts.test))

    def evaluate(self, model: HookedModel, circuit: Circuit) -> tuple[evaluation.CircuitReport, dict[str, Tensor]]:
        """A model and its circuit on the test prompts: the report, and which prompts were answered right (for paired
        tests)."""
        prompts, means, config = self.read_by(model, self.prompts.test), self.outside(model), self.recipe.evaluation
        report, right = evaluation.evaluate_with_outcomes(
            model, prompts, circuit, means, scope=config.scope, random_circuits=config.random_circuits
        )
        return report, {name: value.to(torch.uint8) for name, value in right.items()}
