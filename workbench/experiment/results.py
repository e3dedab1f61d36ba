"""The rows of the results table: a condition with one seed, evaluated; gathered, tested against each other, and written
as text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from workbench import storage
from workbench.errors import InputError, nearest
from workbench.experiment.runs import RunFolder
from workbench.values.scores import mcnemar

COMPARED_WITH = ("full_ce", "circuit_ce")
"""The conditions that McNemar's test sets every other one against."""
TITLES: Mapping[str, str] = {
    "base": "base (untrained)",
    "full_ce": "full / CE",
    "circuit_ce": "circuit / CE",
    "circuit_cka": "circuit / CKA",
    "circuit_ce_random_cka": "circuit / CE + random CKA",
    "circuit_ce_shuffled_cka": "circuit / CE + shuffled CKA",
    "circuit_ce_paper_cka": "circuit / CE + CKA, paper's matching",
    "circuit_ce_cka": "circuit / CE + CKA",
    "full_kl": "full / KL",
    "full_ce_cka": "full / CE + CKA",
    "teacher": "teacher",
}
"""The conditions in the words of the paper, in the order of its table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionResult:
    """One row of the results table: a condition after training with one seed, evaluated on held-out test prompts."""

    condition: str
    """A key of `CONDITIONS`, or `teacher`."""
    seed: int
    full_accuracy: float
    full_interval: tuple[float, float]
    """95 % Wilson interval over prompts."""
    circuit_accuracy: float
    circuit_interval: tuple[float, float]
    random_circuit_accuracy: float
    faithfulness: float | None
    mean_cka: float | None
    """Mean CKA of the matched pairs on test prompts (None for the teacher)."""
    cka_floor: float | None
    """The same with the prompts shuffled."""
    trained_parameters: int
    trained_fraction: float
    """Share of all parameters."""
    steps: int
    mcnemar: Mapping[str, float]
    """Condition compared with -> two-sided p of McNemar's exact test on the same test prompts."""
    whole_answers: float | None = None
    """With `data.multi_token`: the share of test prompts whose whole answer is more probable than the whole distractor.
    Accuracies are of first tokens."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ConditionResult":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        row = storage.read_typed(value, cls, what="a row of results", remedy="run the evaluation again")
        if row.condition not in TITLES:
            raise InputError(
                f"this is not a row of results: there is no condition {row.condition!r}; "
                f"{nearest(row.condition, TITLES)} Run the evaluation again."
            )
        return row


def read_results(file: Path) -> list[ConditionResult]:
    """The rows of a `results.json`. Errors: `InputError` when it is missing or damaged."""
    rows = storage.read_typed(storage.read_json(file), list[Any], what=f"rows of results ({file})")
    return [ConditionResult.from_json(row) for row in rows]


def collect(folder: RunFolder) -> list[ConditionResult]:
    """Every row of a run folder in the order of the paper's table, with McNemar's tests; writes `results.json`."""
    files = sorted((folder.trial_path / "conditions").glob("*/result.json"))
    if not files:
        raise InputError(
            f"{folder.path} holds no evaluated condition; run `workbench evaluate` or `workbench demo` into it first."
        )
    rows = [ConditionResult.from_json(storage.read_json(file)) for file in files]
    rows.sort(key=lambda row: (list(TITLES).index(row.condition), row.seed))
    tested = [_tested(row, rows, folder) for row in rows]
    storage.write_json(folder.trial_path / "results.json", [row.to_json() for row in tested])
    return tested


def _tested(row: ConditionResult, rows: Sequence[ConditionResult], folder: RunFolder) -> ConditionResult:
    """The row with its p values against full CE and circuit CE of the same seed (none for the teacher, and none against
    itself)."""
    there = {(other.condition, other.seed) for other in rows}
    against = [
        other for other in COMPARED_WITH if row.condition not in (other, "teacher") and (other, row.seed) in there
    ]
    values = {other: _mcnemar(folder, (row.condition, row.seed), (other, row.seed)) for other in against}
    return ConditionResult.from_json({**row.to_json(), "mcnemar": values})


def _mcnemar(folder: RunFolder, first: tuple[str, int], second: tuple[str, int]) -> float:
    paired = [
        storage.read_tensors(folder.condition(*which) / "outcomes.safetensors")[0]["full"].to(torch.bool)
        for which in (first, second)
    ]
    return mcnemar(paired[0], paired[1])[2]


def table(results: Sequence[ConditionResult]) -> str:
    """The results as text: full accuracy and circuit accuracy with intervals, and every row's controls beside them."""
    head = (
        "condition",
        "seed",
        "full accuracy",
        "circuit accuracy",
        "random",
        "faithful",
        "CKA",
        "floor",
        "trained",
        "p vs full CE",
        "p vs circuit CE",
    )
    lines = [head, *(_cells(row) for row in results)]
    if any(row.whole_answers is not None for row in results):
        lines = [
            (*line, cell)
            for line, cell in zip(
                lines, ["whole answers", *(_number(row.whole_answers, 3) for row in results)], strict=True
            )
        ]
    return in_columns(lines)


def in_columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells as text, each column as wide as its widest cell, a rule under the first line."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _cells(row: ConditionResult) -> tuple[str, ...]:
    return (
        TITLES[row.condition],
        str(row.seed),
        f"{row.full_accuracy:.3f} [{row.full_interval[0]:.2f}, {row.full_interval[1]:.2f}]",
        f"{row.circuit_accuracy:.3f} [{row.circuit_interval[0]:.2f}, {row.circuit_interval[1]:.2f}]",
        f"{row.random_circuit_accuracy:.3f}",
        _number(row.faithfulness, 2),
        _number(row.mean_cka, 2),
        _number(row.cka_floor, 2),
        f"{row.trained_parameters:,} ({row.trained_fraction:.0%})",
        _number(row.mcnemar.get("full_ce"), 4),
        _number(row.mcnemar.get("circuit_ce"), 4),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def run_logs(folder: RunFolder) -> dict[str, Path]:
    """The training logs of a run folder: condition folder name -> JSONL file."""
    return {file.parent.name: file for file in sorted((folder.trial_path / "conditions").glob("*/log.jsonl"))}
