"""Pairs as a stream, and as a Parquet file: the same rows as `task_dataset` in both."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from workbench import storage
from workbench.tasks.base import Split, Task, checked_row, features_of, load_pairs


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
    for number, pair in enumerate(task.pairs(tokenizer, split=split, scenes=scenes, seed=seed), 1):
        yield checked_row(number, pair, tokenizer, multi_token=multi_token)


def save_pairs(dataset: Dataset, path: str | Path) -> None:
    """Write pairs as a Parquet file, whole or not at all."""
    storage.write_atomically(Path(path), lambda temporary: dataset.to_parquet(str(temporary)))


def read_pairs(path: str | Path, tokenizer: Any, *, multi_token: bool = False) -> Dataset:
    """Pairs of a Parquet file, checked against the tokenizer; equal to what was saved."""
    return load_pairs(path, tokenizer, multi_token=multi_token)
