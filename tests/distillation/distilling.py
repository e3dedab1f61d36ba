"""A small distillation that several test files run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conftest import entity_pairs
from workbench.distillation.config import AlignmentConfig, TrainingConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_everything, slices_of_heads
from workbench.matching.aligned_pairs import AlignedPair
from workbench.models.hooked_model import Student
from workbench.values.refs import Head

PAIRS = tuple(
    AlignedPair(student=Head(*s), teacher=Head(*t), student_positions=(p,), teacher_positions=(r,))
    for s, t, p, r in [
        ((1, 0), (2, 1), "last", "last"),
        ((2, 3), (0, 2), "earlier_label", "query_label"),
        ((2, 1), (2, 2), "labels", "labels"),
    ]
)
HEADS = [pair.student for pair in PAIRS]
CONFIG = TrainingConfig(
    steps=6,
    batch=8,
    alignment=AlignmentConfig(weight=0.5),
    learning_rate=1e-2,
    weight_decay=0.1,
    checkpoint_every=2,
)
PLAIN = replace(CONFIG, alignment=None)
"""The same without alignment."""
PROMPTS = entity_pairs(split="train", scenes=8)


def aligning(config: TrainingConfig = CONFIG, **settings: Any) -> TrainingConfig:
    """A configuration with another alignment."""
    return replace(config, alignment=replace(config.alignment or AlignmentConfig(), **settings))


def values(student: Student) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in student.parameters().items()}


def inside(student: Student, heads: list[Head], *, train_kv: bool = True) -> dict[str, Tensor]:
    """Parameter name -> True inside the heads' slices."""
    masks = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in student.parameters().items()}
    for part in slices_of_heads(student, heads, train_kv=train_kv):
        masks[part.parameter][part.index] = True
    return masks


def furthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference between two models' parameters."""
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def trained(
    student: Student,
    teacher: Any,
    config: TrainingConfig,
    folder: Path,
    *,
    everything: bool = False,
    validation: Any = None,
    **run: Any,
) -> Any:
    """The reports of a run on the matched heads, or on all parameters."""
    parts = slices_of_everything(student) if everything else slices_of_heads(student, HEADS)
    pairs = PAIRS if config.weight else ()
    return Distillation(
        student, TrainedSlices(student, parts), PROMPTS, teacher, pairs, config, seed=3, validation=validation
    ).run(folder, **run)
