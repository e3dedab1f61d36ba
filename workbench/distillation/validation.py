"""Evaluation during training, on prompts that are neither trained nor tested on."""

from collections.abc import Callable

import torch

from workbench import metrics
from workbench.errors import InputError
from workbench.models import Student
from workbench.tasks.base import PromptPairs

Validation = PromptPairs | Callable[[Student], float]
"""Prompts whose accuracy is taken, or a function of the student in eval mode (higher is better)."""


def validated(student: Student, validation: Validation, *, batch: int = 256) -> float:
    """The validation accuracy (or what the function gives) of a student that is in training; it is in training mode again afterwards."""
    student.model.eval()
    try:
        with torch.no_grad():
            return _accuracy(student, validation, batch) if isinstance(validation, PromptPairs) else float(validation(student))
    finally:
        student.model.train()


def _accuracy(student: Student, prompts: PromptPairs, batch: int) -> float:
    right = [metrics.accuracy(student.final_logits(part.clean, part.mask), part.answers, part.distractors).sum() for part in prompts.batches(batch)]
    return float(sum(map(float, right)) / len(prompts))


def require_apart(validation: Validation, training: PromptPairs) -> None:
    """Refuse validation prompts that are trained on, and an empty set of them."""
    if not isinstance(validation, PromptPairs):
        return
    if len(validation) == 0:
        raise InputError("there are no validation prompts; give some, or leave `evaluate_every` out.")
    shared = len(validation.prompts() & training.prompts())
    if shared:
        raise InputError(f"{shared} of the {len(validation)} validation prompts are also training prompts; validate on others.")
