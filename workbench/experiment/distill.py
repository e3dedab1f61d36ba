"""The third stage: a fresh student trained under a condition."""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from workbench import storage
from workbench.distillation.answers import answered
from workbench.distillation.assembly import teacher_outputs, trained_slices
from workbench.distillation.config import TrainingConfig
from workbench.distillation.counterfactual import teacher_alignment_outputs
from workbench.distillation.endpoint import Endpoint, endpoint_outputs
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices
from workbench.distillation.processes import launched
from workbench.distillation.reports import TRAINING, read_log, read_training
from workbench.distillation.teacher_cache import TeacherOutputs
from workbench.distillation.teacher_shards import Top
from workbench.experiment.cards import STUDENT, described
from workbench.experiment.conditions import CONDITIONS
from workbench.experiment.discover import profiles
from workbench.experiment.match import aligned, head_map_of
from workbench.experiment.origins import KEY, require_origin
from workbench.experiment.run import Run
from workbench.matching.aligned_pairs import weighted_by_impact
from workbench.models import sources
from workbench.models.hooked_model import Student
from workbench.storage import checkpoint
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head

log = logging.getLogger("workbench")


def distill(run: Run, condition: str, seed: int, *, resume: bool) -> tuple[Student, TrainedSlices]:
    """Train a fresh student under a condition; writes its log, checkpoints and (if wanted) the student itself."""
    spec, student = CONDITIONS[condition], run.fresh_student()
    if spec.trains is None:
        return student, TrainedSlices(student, [])
    config, pairs = run.recipe.training_of(spec), aligned(run, head_map_of(run, spec, seed)) if spec.aligns else ()
    heads = None if spec.trains == "all" else trained_heads(run)
    slices = trained_slices(student, heads, config, train_kv=run.recipe.train_kv, seed=seed)
    log.info("  %s of %s parameters train (%.1f %%)", f"{slices.count:,}", f"{slices.total:,}", 100 * slices.fraction)
    if config.alignment is not None and config.alignment.pair_weights == "impact":
        pairs = weighted_by_impact(pairs, profiles(run, "student", run.student)[run.recipe.matching.metric])
    processes = launched(student.device)
    with processes.main_first():
        if run.recipe.endpoint is not None:
            prompts, outputs = run.prompts.train, _endpoint_outputs(run, student)
        else:
            prompts = answered(run.prompts.train, run.teacher, student, config)
            outputs = teacher_alignment_outputs(
                partial(_teacher_outputs, run, config), run.teacher, prompts, pairs, config.alignment
            )
    training = Distillation(
        student,
        slices,
        prompts,
        outputs,
        pairs,
        config,
        seed=seed,
        validation=run.prompts.validation,
    )
    folder = run.folder.condition(condition, seed)
    reports = training.run(folder, resume=resume, label=f"{condition}, seed {seed}")
    if slices.sharded:  # one process evaluates and saves, which takes a whole student
        student = run.fresh_student()
        slices.onto(student)
    if processes.is_main:
        if run.recipe.save_students:
            student.description = described(run, condition, seed, slices, len(reports), pairs)
            student.save(folder / STUDENT)
        origin = run.condition_origin(condition, seed)
        storage.write_json(folder / TRAINING, {"steps": len(reports), KEY: origin})  # last: the training is done
    return student, slices


def _teacher_outputs(run: Run, config: TrainingConfig, prompts: PromptPairs, names: Sequence[str]) -> TeacherOutputs:
    """The teacher's outputs on some prompts as the recipe keeps them."""
    top = None if run.recipe.teacher_top is None else Top(k=run.recipe.teacher_top, temperature=config.temperature)
    folder = sources.cache_root() / "teacher"
    return teacher_outputs(run.recipe.teacher_outputs, run.teacher, prompts, names, folder, top=top)


def _endpoint_outputs(run: Run, student: Student) -> TeacherOutputs:
    """What a teacher that answers elsewhere says of the training prompts."""
    endpoint = run.recipe.endpoint
    assert endpoint is not None
    key = os.environ.get(endpoint.key_variable)
    where = Endpoint(url=endpoint.url, model=run.recipe.teacher, top=endpoint.top, key=key)
    folder = sources.cache_root() / "endpoint"
    return endpoint_outputs(where, run.prompts.train, student.tokenizer, d_vocab=student.d_vocab, folder=folder)


def is_trained(run: Run, condition: str, seed: int) -> bool:
    """Whether a training is done to its end, its student saved. Errors: `InputError` when what lies there is another
    one's, or its log has been cut off."""
    folder = run.folder.condition(condition, seed)
    if not (folder / TRAINING).exists():
        return _was_trained(run, folder)
    training = storage.read_json(folder / TRAINING)
    require_origin(folder / TRAINING, training.get(KEY), run.condition_origin(condition, seed))
    read_training(folder)
    return True


def _was_trained(run: Run, folder: Path) -> bool:
    """The same of a training from before trainings said that they were done: its log is as long as the training."""
    state = folder / "checkpoint.safetensors"
    return (
        state.exists()
        and not checkpoint.names_ingredients(state)
        and len(read_log(folder / "log.jsonl")) >= run.recipe.training.steps
    )


def trainable_heads(run: Run) -> list[Head]:
    """The student's heads of which `training.most` train: the matched ones, or its circuit."""
    if run.recipe.training.heads == "circuit":
        return list(run.circuit("student").heads)
    return [ours for ours, _ in run.head_map().pairs]


def trained_heads(run: Run) -> list[Head]:
    """The student's heads that train where a condition trains heads: those that matter most."""
    heads, most = trainable_heads(run), run.recipe.training.most
    if most is None or most >= len(heads):
        return heads
    impacts = profiles(run, "student", run.student)[run.recipe.matching.metric].mean()
    return sorted(heads, key=lambda head: float(impacts[head.layer, head.index]), reverse=True)[:most]
