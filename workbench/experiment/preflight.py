"""What is refused before anything is computed: every stage's conditions on a recipe, its prompts and its models, in one
place.

`require_recipe` needs prompts alone, so a plan asks it too; `preflight` asks it of a run and looks at the models.
"""

from collections.abc import Iterable, Sequence

import torch

from workbench.circuits.methods.registry import method_named
from workbench.distillation.config import interchanges
from workbench.distillation.loop import require_settings, require_wide
from workbench.distillation.losses import DIVERGENCES
from workbench.distillation.processes import launched
from workbench.errors import InputError
from workbench.experiment.conditions import CONDITIONS, Condition
from workbench.experiment.prompts import Prompts
from workbench.experiment.recipe import Recipe
from workbench.experiment.run import NO_STUDENT, Run
from workbench.matching.aligned_pairs import is_own
from workbench.matching.head_rows import require_fitting
from workbench.models.export import require_savable
from workbench.tasks.tokenizers import require_same_words


def preflight(run: Run, conditions: Iterable[str] = ()) -> None:
    """Refuse what the stages of a run (and the training of these conditions) would refuse later. Errors: `InputError`
    with the remedy. Bad rows that the recipe leaves out are recorded in the run folder (`left_out.json`)."""
    trained = training_conditions(conditions)
    require_recipe(run.recipe, run.prompts, trained, processes=launched(run.recipe.device).count)
    if run.prompts.left_out:
        run.folder.record_left_out(run.prompts.data.pairs or "", run.prompts.left_out)
    if not trained:
        return
    if run.recipe.dtype == "auto":
        require_wide(run.student.dtype)
    if run.recipe.endpoint is None:
        require_same_logits(run.recipe, run.prompts, trained, teacher=run.teacher.d_vocab, student=run.student.d_vocab)
    if run.recipe.save_students:
        try:
            require_savable(run.student.model)
        except InputError as error:
            raise InputError(f"{error} Set `save_students: false` to train without keeping the students.") from None


def training_conditions(names: Iterable[str]) -> tuple[Condition, ...]:
    """Those of the conditions that train."""
    return tuple(CONDITIONS[name] for name in names if CONDITIONS[name].trains is not None)


def require_recipe(recipe: Recipe, prompts: Prompts, trained: Sequence[Condition], *, processes: int = 1) -> None:
    """The part of it that a recipe and its prompts tell."""
    for name in recipe.discovery.options.get("positions") or ():
        prompts.discovery.position(name)
    for condition in trained:
        if recipe.endpoint is not None and condition.aligns:
            raise InputError(f"{condition.title} aligns activations, and an endpoint gives none; load the teacher.")
        if recipe.endpoint is not None and condition.trains == "circuit" and recipe.training.heads == "matched":
            raise InputError("no heads are matched to a teacher behind an endpoint; set `training.heads: circuit`.")
    if recipe.student is not None and recipe.endpoint is None:
        require_alignable(recipe, prompts)
    elif trained and recipe.student is None:
        raise InputError(NO_STUDENT)
    if trained and recipe.dtype != "auto":
        require_wide(getattr(torch, recipe.dtype))
    for condition in trained:
        require_settings(recipe.training_of(condition), prompts.train, prompts.validation, processes=processes)


def require_alignable(recipe: Recipe, prompts: Prompts) -> None:
    """Where the models have different tokenizers: refuse, before anything is searched, what could not be aligned
    afterwards."""
    alignment = recipe.alignment
    require_fitting(alignment.measure, alignment.activation, prompts.discovery, alignment.compared)
    acts = method_named(recipe.discovery.method, recipe.discovery.options).acts_at(prompts.stages)
    own = [*acts, *(alignment.broadened.get(name, name) for name in acts)]
    beside = alignment.positions.split("+")[1:]
    for name in [*own, *beside] if is_own(alignment.positions) else [alignment.positions]:
        require_same_words(prompts.discovery, [name], [name])


def require_same_logits(
    recipe: Recipe, prompts: Prompts, trained: Sequence[Condition], *, teacher: int, student: int
) -> None:
    """Refuse a task loss that compares the logits of models with one tokenizer that pad its vocabulary differently."""
    if prompts.teacher is not None or teacher == student:
        return
    for condition in trained:
        if recipe.training_of(condition).task_loss in DIVERGENCES or interchanges(recipe.training_of(condition)):
            raise InputError(
                f"the teacher has {teacher} logits and the student {student}, though they share a tokenizer (one pads "
                f"its vocabulary), so {condition.title} can't compare them: leave the condition {condition.name} out, "
                "use task loss ce_teacher or ce_truth (and no interchange), or resize the embeddings of one of the "
                "models."
            )
