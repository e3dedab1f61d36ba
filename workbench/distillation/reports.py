"""The log of a training run: one JSON line a step, what is read from it, and the evaluation on validation prompts that
it holds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from workbench import storage
from workbench.distillation.config import TrainingConfig
from workbench.errors import InputError
from workbench.models.hooked_model import Student
from workbench.patching.ablation import plain_logits
from workbench.tasks.base import PromptPairs
from workbench.tasks.forcing import whole_answers_right
from workbench.values import metrics

LOG, TRAINING = "log.jsonl", "training.json"
"""In the folder of a training: its log, and, once it is done, how many steps it took and what it was made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One line of the training log."""

    step: int
    loss: float
    task_loss: float | None
    alignment_loss: float | None
    """SUM (or mean) over pairs of (1 - similarity), without lambda; None where it is no part of the loss."""
    ckas: dict[str, float]
    """Each pair's similarity by the run's measure, CKA unless it says otherwise."""
    gradient_norm: float
    learning_rate: float
    weight: float = 0.0
    """lambda at this step."""
    accuracy: float | None = None
    """On the validation prompts after this step (of whole answers, where they have several tokens); None where it was
    not evaluated."""

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def read_log(path: Path, *, first: int | None = None) -> list[StepReport]:
    """The (first) reports of a JSONL log. Errors: `InputError` when it is missing or damaged."""
    reports = []
    lines = [line for line in storage.read_lines(path) if line][:first]
    for number, line in enumerate(lines, 1):
        try:
            reports.append(storage.read_typed(storage.json_value(line), StepReport, what="a line of a training's log"))
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}, is damaged ({str(error).rstrip('.')}); run this condition again."
            ) from None
    return reports


def read_training(folder: Path) -> list[StepReport]:
    """The log of a finished training. Errors: `InputError` when it is missing, damaged, or shorter than the training
    was."""
    reports = read_log(folder / LOG)
    if (folder / TRAINING).exists():
        require_whole(folder / LOG, reports, int(storage.read_json(folder / TRAINING)["steps"]), "the training")
    return reports


def require_whole(log: Path, reports: Sequence[StepReport], steps: int, what: str) -> None:
    """Refuse a log that lacks steps."""
    if [report.step for report in reports[:steps]] != list(range(steps)):
        raise InputError(
            f"{log} holds {len(reports)} of the {steps} steps of {what}: it was cut off or emptied. Put it back, or "
            f"delete {log.parent} to train this anew."
        )


def evaluations(reports: Sequence[StepReport]) -> list[tuple[int, float]]:
    """(steps taken, accuracy) of each evaluation."""
    return [(report.step + 1, report.accuracy) for report in reports if report.accuracy is not None]


def best_evaluation(reports: Sequence[StepReport]) -> tuple[int, float] | None:
    """(steps taken, accuracy) of the best evaluation, the earlier of equals; None where there is none."""
    return max(evaluations(reports), key=lambda evaluation: (evaluation[1], -evaluation[0]), default=None)


def exhausted(reports: Sequence[StepReport], patience: int | None) -> bool:
    """Whether `patience` evaluations have passed since the best one."""
    best = best_evaluation(reports)
    return (
        patience is not None
        and best is not None
        and sum(taken > best[0] for taken, _ in evaluations(reports)) >= patience
    )


def steps_to_reach(reports: Sequence[StepReport], accuracy: float) -> int | None:
    """Optimizer steps to the first evaluation of at least this accuracy (so to a multiple of `evaluate_every`); None
    where none reaches it."""
    return next((taken for taken, accuracy_then in evaluations(reports) if accuracy_then >= accuracy), None)


Validation = PromptPairs | Callable[[Student], float]
"""Prompts whose accuracy is taken, or a function of the student in eval mode (higher is better)."""


def validated(student: Student, validation: Validation, *, batch: int = 256) -> float:
    """The validation accuracy (or what the function gives) of a student that is in training; it is in training mode
    again afterwards."""
    student.model.eval()
    try:
        with torch.no_grad():
            return (
                _accuracy(student, validation, batch)
                if isinstance(validation, PromptPairs)
                else float(validation(student))
            )
    finally:
        student.model.train()


def _accuracy(student: Student, prompts: PromptPairs, batch: int) -> float:
    """Of answers of one token at the prompts' last token; of longer ones, of whole answers (all tokens right)."""
    if prompts.answer_tokens is not None and prompts.answer_tokens.shape[1] > 1:
        return float(whole_answers_right(student, prompts, batch=batch).double().mean())
    right = [
        metrics.accuracy(plain_logits(student, part), part.answers, part.distractors).sum()
        for part in prompts.batches(batch)
    ]
    return float(sum(map(float, right)) / len(prompts))


def require_apart(validation: Validation, training: PromptPairs) -> None:
    """Refuse validation prompts that are trained on, and an empty set of them."""
    if not isinstance(validation, PromptPairs):
        return
    if len(validation) == 0:
        raise InputError("there are no validation prompts; give some, or leave `evaluate_every` out.")
    shared = len(validation.prompts() & training.prompts())
    if shared:
        raise InputError(
            f"{shared} of the {len(validation)} validation prompts are also training prompts; validate on others."
        )


def training_facts(config: TrainingConfig, *, count: int, fraction: float, steps: int, prompts: int) -> dict[str, str]:
    """What a model card says of a training, by name."""
    aligned = config.alignment if config.weight > 0 else None
    return {
        "trained parameters": f"{count:,} ({fraction:.1%})",
        "training": f"{steps} steps of {config.batch} of {prompts} prompts, learning rate {config.learning_rate:g}",
        "task loss": config.task_loss,
        "alignment": "none"
        if aligned is None
        else f"{aligned.weight:g} times the {aligned.pairs} of 1 - {aligned.measure} ({aligned.estimator}) "
        f"over matched heads, on {aligned.activation}",
    }
