"""The rows of the results table: a condition with one seed, evaluated; gathered, tested against each other, and written
as text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench import storage
from workbench.errors import InputError
from workbench.experiment.conditions import CONDITIONS, TEACHER, TITLES
from workbench.experiment.origins import Origin, of_metadata, require_origin
from workbench.experiment.runs import RunFolder
from workbench.values.display import plain
from workbench.values.scores import mcnemar

OUTCOMES = "outcomes.safetensors"
"""In a condition's folder: which test prompts were answered right."""


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
    whole_accuracy: float | None = None
    """With `data.multi_token`: the share of test prompts whose whole answer greedy decoding gives (all tokens right).
    None in rows from before."""
    origin: Origin | None = None
    """What the row rests on (`workbench.experiment.origins`); None in rows from before it was kept."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "ConditionResult":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        return storage.read_typed(value, cls, what="a row of results", remedy="run the evaluation again")

    def __post_init__(self) -> None:
        if self.condition not in TITLES:
            raise InputError(
                f"this row of results is of no condition that is known, {self.condition!r}; run the evaluation again."
            )


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
    rows = [read_row(file) for file in files]
    _require_one_run(files, rows)
    rows.sort(key=lambda row: (list(TITLES).index(row.condition), row.seed))
    tested = [_tested(row, rows, folder) for row in rows]
    storage.write_json(folder.trial_path / "results.json", [row.to_json() for row in tested])
    return tested


def read_row(file: Path, expected: Origin | None = None) -> ConditionResult:
    """The row in a condition's folder. Errors: `InputError` when it is another condition's or seed's than the folder's
    name says, or not of the expected origin."""
    row = ConditionResult.from_json(storage.read_json(file))
    require_origin(file, {"condition": row.condition, "seed": str(row.seed)}, _named(file.parent))
    require_origin(file, row.origin, expected or _named(file.parent))
    return row


def read_outcomes(folder: Path, file: str = OUTCOMES) -> dict[str, Tensor]:
    """Which prompts a condition's model answered right, by part. Errors: `InputError` when they are another's."""
    tensors, metadata = storage.read_tensors(folder / file)
    require_origin(folder / file, of_metadata(metadata), _named(folder))
    return {name: value.to(torch.bool) for name, value in tensors.items()}


def _named(folder: Path) -> Origin:
    """The condition and seed that a folder's name says."""
    condition, _, seed = folder.name.rpartition("-")
    return {"condition": condition, "seed": seed}


def _require_one_run(files: Sequence[Path], rows: Sequence[ConditionResult]) -> None:
    """Refuse rows that rest on other weights or another recipe than the first that says so."""
    with_origin = [(file, row.origin) for file, row in zip(files, rows, strict=True) if row.origin is not None]
    for file, origin in with_origin[1:]:
        first = {name: value for name, value in (with_origin[0][1] or {}).items() if name not in ("condition", "seed")}
        require_origin(file, origin, first)


def _tested(row: ConditionResult, rows: Sequence[ConditionResult], folder: RunFolder) -> ConditionResult:
    """The row with its p values against full CE and circuit CE of the same seed (none for the teacher, and none against
    itself)."""
    there = {(other.condition, other.seed) for other in rows}
    against = [
        other
        for other in (CONDITIONS[row.condition].compared_with if row.condition != TEACHER else ())
        if (other, row.seed) in there
    ]
    values = {other: _mcnemar(folder, (row.condition, row.seed), (other, row.seed)) for other in against}
    return ConditionResult.from_json({**row.to_json(), "mcnemar": values})


def _mcnemar(folder: RunFolder, first: tuple[str, int], second: tuple[str, int]) -> float:
    paired = [read_outcomes(folder.condition(*which))["full"] for which in (first, second)]
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
    if any(row.whole_accuracy is not None for row in results):
        cells = ["all tokens right", *(_number(row.whole_accuracy, 3) for row in results)]
        lines = [(*line, cell) for line, cell in zip(lines, cells, strict=True)]
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
    return "-" if value is None else plain(value, digits)


def run_logs(folder: RunFolder) -> dict[str, Path]:
    """The training logs of a run folder: condition folder name -> JSONL file."""
    return {file.parent.name: file for file in sorted((folder.trial_path / "conditions").glob("*/log.jsonl"))}
