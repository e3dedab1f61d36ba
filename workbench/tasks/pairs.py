"""A pair of prompts as text, and reading a user's own from a file, a dataset or the hub."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from workbench.errors import InputError, nearest
from workbench.seeds import Split as Split

Span = tuple[int, int]
"""Characters [start, end) of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One clean prompt, its corrupt counterpart of equal length, the right answer, a wrong one, and named positions in
    both."""

    clean: str
    corrupt: str
    answer: str
    distractor: str
    positions: Mapping[str, Any]
    """Name -> token indices (an int or several; negative counts from the end), character spans, or a piece of the clean
    text."""
    corrupt_answer: str | None = None
    """The right answer to the corrupt prompt, where it has one; None where it was made to have none."""
    facts: Mapping[str, int] | None = None
    """Whole numbers that results may be broken down by (`workbench.tasks.breakdown`), such as how many operations touch
    the queried box."""


def numbered_pairs(source: str | Path | Dataset, *, split: str = "train") -> Iterator[tuple[int, Pair]]:
    """The numbered pairs of a file, a dataset or a hub id, not yet checked against a tokenizer. Errors: `InputError`
    with the row's number."""
    if isinstance(source, Dataset):
        records: Iterable[tuple[int, Any]] = enumerate(source)
    elif str(source).endswith((".jsonl", ".json")):
        records = _json_lines(Path(source))
    elif str(source).endswith((".csv", ".parquet")):
        kind = "csv" if str(source).endswith(".csv") else "parquet"
        records = enumerate(load_dataset(kind, data_files=str(source), split="train"))
    else:
        records = enumerate(load_dataset(str(source), split=split))
    return ((number, _pair(number, record)) for number, record in records)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise InputError(
            f"{path} is not a file; give a JSONL file with one pair a line (clean, corrupt, answer, distractor, "
            "positions)."
        )
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"row {number} of {path} is not JSON ({error}); write one object a line.") from None


def _pair(number: int, record: Any) -> Pair:
    if not isinstance(record, Mapping):
        raise InputError(f"row {number} is not an object with columns clean, corrupt, answer, distractor.")
    for column in ("clean", "corrupt", "answer", "distractor"):
        if not isinstance(record.get(column), str):
            raise InputError(f"row {number} has no text in column {column!r}; {nearest(column, record)}")
    text = {name: record[name] for name in ("clean", "corrupt", "answer", "distractor")}
    return Pair(
        **text,
        positions=_mapping(record, "positions"),
        corrupt_answer=record.get("corrupt_answer"),
        facts=_mapping(record, "facts") or None,
    )


def _mapping(record: Mapping[str, Any], column: str) -> dict[str, Any]:
    """A column that holds an object, or its JSON (in a CSV file)."""
    value = record.get(column) or {}
    return dict(json.loads(value) if isinstance(value, str) else value)
