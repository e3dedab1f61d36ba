"""Pairs as a stream, and as a Parquet file: the same rows as `task_dataset` in both."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from workbench import storage
from workbench.tasks.base import Split, Task, checked_row, features_of, load_pairs
from workbench.tasks.pairs import SETS
from workbench.tasks.records import RowError


def task_stream(
    task: Task, tokenizer: Any, *, split: Split, scenes: int, seed: int, multi_token: bool = False
) -> IterableDataset:
    """The rows of `task_dataset`, drawn and checked one by one as they are asked for; it may be iterated again. Errors:
    `InputError` with the row's number."""
    settings = {"task": task, "tokenizer": tokenizer, "split": split, "seed": seed, "multi_token": multi_token}
    first = next(_rows(**settings, scenes=1))
    return IterableDataset.from_generator(_rows, features=features_of(first), gen_kwargs={**settings, "scenes": scenes})


def _rows(
    *, task: Task, tokenizer: Any, split: Split, scenes: int, seed: int, multi_token: bool
) -> Iterator[dict[str, Any]]:
    first: dict[str, Any] | None = None
    for number, pair in enumerate(task.pairs(tokenizer, split=split, scenes=scenes, seed=seed), 1):
        row = checked_row(number, pair, tokenizer, multi_token=multi_token)
        first = row if first is None else first
        yield _like(first, row, number)


def _like(first: dict[str, Any], row: dict[str, Any], number: int) -> dict[str, Any]:
    """A row with lists where the first row has them: a stream's columns are known from that row."""
    for column in SETS:
        if isinstance(first[column], str) and isinstance(row[column], list):
            raise RowError(number, f"has several texts in {column!r}, the stream's first row one; use `task_dataset`.")
    lists = {
        column: [row[column]] for column in SETS if isinstance(first[column], list) and isinstance(row[column], str)
    }
    return {**row, **lists}


def save_pairs(dataset: Dataset, path: str | Path) -> None:
    """Write pairs as a Parquet file, whole or not at all."""
    storage.write_atomically(Path(path), lambda temporary: dataset.to_parquet(str(temporary)))


def read_pairs(path: str | Path, tokenizer: Any, *, multi_token: bool = False) -> Dataset:
    """Pairs of a Parquet file, checked against the tokenizer; equal to what was saved."""
    return load_pairs(path, tokenizer, multi_token=multi_token)
