"""The summary of a study as it is written: what each reader of `summary.json` may rely on."""

from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import NotRequired

from workbench import storage


class Interval(TypedDict):
    """A mean over seeds with its 95 % interval; None where one seed gives none."""

    mean: float
    low: float | None
    high: float | None
    count: int


class Validated(TypedDict):
    """A point of a validation curve."""

    step: int
    mean: float
    low: float | None
    high: float | None


class InCell(TypedDict):
    """A condition of a cell."""

    full: Interval
    circuit: Interval
    random_circuit: Interval
    faithfulness: Interval | None
    cka: Interval | None
    cka_floor: Interval | None
    steps_to_circuit_ce: list[int | None]
    curve: list[Validated]


class Difference(TypedDict):
    """Two conditions on the same seeds and prompts."""

    over_seeds: Interval
    pooled_p: float


class Against(TypedDict):
    """A condition against another one."""

    full: Difference
    circuit: Difference


class Trained(TypedDict):
    """How many heads train, and of what."""

    heads: int
    of: int
    teacher_heads_used: int
    matched: NotRequired[int]


class CellSummary(TypedDict):
    """One student at one data size."""

    student: str
    train_scenes: int
    train_prompts: int
    test_prompts: int
    weight: float
    heads_trained: Trained
    conditions: dict[str, InCell]
    comparisons: dict[str, dict[str, Against]]
    transfer: NotRequired[dict[str, Any]]


class Point(TypedDict):
    """A training with alignment: where its pairs began, and what it gained."""

    student: str
    train_scenes: int
    condition: str
    seed: int
    cka: float
    floor: float
    gain: float


class Diagnostic(TypedDict):
    """All trainings with alignment."""

    points: list[Point]
    rank_correlation: float | None


class Summary(TypedDict):
    """A whole study."""

    title: str
    task: NotRequired[str | None]
    cells: list[CellSummary]
    diagnostic: Diagnostic


def read_summary(file: Path) -> Summary:
    """The summary of a study. Errors: `InputError` naming the place where it is none."""
    return storage.read_typed(
        storage.read_json(file), Summary, what=f"the summary of a study ({file})", remedy="run `workbench report` again"
    )
