"""A user's own rows: JSONL, CSV, Parquet and datasets with something wrong, read and encoded."""

import csv
import io
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset

from tests.fuzz.case import Case, damaged, mutated
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import encode, load_pairs

TOKENIZER = word_tokenizer()
ROWS: list[dict[str, Any]] = [
    {
        "clean": "The apple is in Box F, the book is in Box Q. Box F contains the",
        "corrupt": "The cup is in Box A, the bell is in Box C. Box B contains the",
        "answer": " apple",
        "distractor": " book",
        "corrupt_answer": " cup",
        "positions": {"object": "apple", "label": 6, "both": [6, -3]},
        "facts": {"boxes": 2},
    },
    {
        "clean": "The key is in Box G, the map is in Box H. Box H contains the",
        "corrupt": "The pen is in Box J, the pot is in Box K. Box L contains the",
        "answer": " map",
        "distractor": " key",
        "corrupt_answer": " pot",
        "positions": {"object": "map", "label": 14, "both": [6, -3]},
        "facts": {"boxes": 3},
    },
]


def cases(seed: int, count: int) -> Iterator[Case]:
    """Rows with one thing wrong, in turns in each kind of file."""
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="rows-"))
    try:
        for number in range(count):
            kind = ("jsonl", "csv", "jsonl", "parquet", "dataset")[number % 5]
            yield _case(kind, folder / f"{number}.{kind}", draw)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _case(kind: str, path: Path, draw: random.Random) -> Case:
    rows, said = list(ROWS), "as they are"
    if draw.random() < 0.75:
        place = draw.randrange(len(rows))
        rows[place], said = mutated(rows[place], draw)
        said = f"row {place + 1} {said}"
    if kind == "dataset":
        return Case(name=f"dataset: {said}", run=lambda: _read(Dataset.from_list(_like_a_file(rows))))
    try:
        content = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}[kind](rows)
    except (pyarrow.ArrowException, UnicodeEncodeError, csv.Error, OverflowError):
        content, said = _jsonl(ROWS), "JSONL under another name"
    if said == "as they are" or draw.random() < 0.1:
        content, how = damaged(content, draw)
        said = f"{said}, {how}"
    if draw.random() < 0.01:
        path.mkdir()
        return Case(name=f"{kind}: a directory", run=lambda: _read(path))
    path.write_bytes(content)
    return Case(name=f"{kind}: {said}", run=lambda: _read(path))


def _like_a_file(rows: list[Any]) -> list[Any]:
    """The rows, where a dataset can hold them at all."""
    try:
        Dataset.from_list(rows)
    except Exception:
        return ROWS
    return rows


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _csv(rows: list[Any]) -> bytes:
    file = io.StringIO()
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    writer = csv.writer(file)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name, "") for name in names] if isinstance(row, dict) else [row]
        writer.writerow([json.dumps(cell) if isinstance(cell, dict | list) else cell for cell in cells])
    return file.getvalue().encode()


def _parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    plain = [{**row, "positions": json.dumps(row.get("positions"))} for row in rows if isinstance(row, dict)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), file)
    return file.getvalue()


def _read(source: Any) -> None:
    encode(load_pairs(source, TOKENIZER), TOKENIZER)
