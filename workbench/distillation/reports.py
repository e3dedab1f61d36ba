"""The log of a training run: one JSON line a step, and what is read from it (the best evaluation, early stopping, steps to an accuracy)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workbench.errors import InputError


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
    """On the validation prompts after this step; None where it was not evaluated."""

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def read_log(path: Path, *, first: int | None = None) -> list[StepReport]:
    """The (first) reports of a JSONL log. Errors: `InputError` when it is missing or damaged."""
    try:
        return [StepReport(**json.loads(line)) for line in path.read_text().splitlines()[:first]]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); run this condition again.") from None


def evaluations(reports: Sequence[StepReport]) -> list[tuple[int, float]]:
    """(steps taken, accuracy) of each evaluation."""
    return [(report.step + 1, report.accuracy) for report in reports if report.accuracy is not None]


def best_evaluation(reports: Sequence[StepReport]) -> tuple[int, float] | None:
    """(steps taken, accuracy) of the best evaluation, the earlier of equals; None where there is none."""
    return max(evaluations(reports), key=lambda found: (found[1], -found[0]), default=None)


def exhausted(reports: Sequence[StepReport], patience: int | None) -> bool:
    """Whether `patience` evaluations have passed since the best one."""
    best = best_evaluation(reports)
    return patience is not None and best is not None and sum(taken > best[0] for taken, _ in evaluations(reports)) >= patience


def steps_to_reach(reports: Sequence[StepReport], accuracy: float) -> int | None:
    """Optimizer steps to the first evaluation of at least this accuracy (so to a multiple of `evaluate_every`); None where none reaches it."""
    return next((taken for taken, found in evaluations(reports) if found >= accuracy), None)
