"""What a run is put together from, as its configuration asks: the trained parameters and the teacher's outputs."""

from collections.abc import Sequence
from pathlib import Path

from workbench.distillation.adapters import LowRankSlices
from workbench.distillation.config import TeacherSource, TrainingConfig
from workbench.distillation.masks import TrainedSlices, slices_of_everything, slices_of_heads
from workbench.distillation.teacher_cache import LiveTeacher, TeacherOutputs, teacher_cache
from workbench.distillation.teacher_shards import Top, teacher_shards
from workbench.errors import InputError
from workbench.models.hooked_model import Student, Teacher
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head


def trained_slices(
    student: Student, heads: Sequence[Head] | None, config: TrainingConfig, *, train_kv: bool, seed: int
) -> TrainedSlices:
    """The heads' slices, or low-rank changes of them; None: every parameter, whole."""
    if heads is None:
        return TrainedSlices(student, slices_of_everything(student))
    parts = slices_of_heads(student, heads, train_kv=train_kv)
    if config.lora_rank is None:
        return TrainedSlices(student, parts)
    return LowRankSlices(student, parts, rank=config.lora_rank, alpha=config.lora_alpha, seed=seed)


def teacher_outputs(
    source: TeacherSource,
    teacher: Teacher,
    prompts: PromptPairs,
    names: Sequence[str],
    folder: Path,
    *,
    top: Top | None = None,
) -> TeacherOutputs:
    """The teacher's outputs on the training prompts, with the activations of these hooks; caches lie in `folder`.

    `top`: of shards, keep only so many logits. Errors: `InputError` for `top` with another source, or on prompts in two
    models' tokens, where the answers' logits are needed whatever their rank.
    """
    if top is not None and source != "shards":
        raise InputError("only shards can hold a part of the teacher's logits; set `teacher_outputs: shards`.")
    if top is not None and prompts.teacher is not None:
        raise InputError(
            "a teacher with another tokenizer answers by the logits of the task's words, which need not be among its "
            "largest; leave `teacher_top` out."
        )
    match source:
        case "memory":
            return teacher_cache(teacher, prompts, names, folder)
        case "shards":
            return teacher_shards(teacher, prompts, names, folder, top=top)
        case "live":
            return LiveTeacher(teacher, prompts, names)
