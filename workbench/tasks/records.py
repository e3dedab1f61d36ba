"""The records of a file as they stand in it: JSONL, CSV, Parquet, a dataset or a hub id, each with its row's number."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, load_dataset

from workbench.errors import InputError
from workbench.storage import json_value

FORM = "one pair a row, with the columns clean, corrupt, answer, distractor and (optionally) positions"
Record = tuple[int, Any]


class RowError(InputError):
    """A row that can't be used: its number, counted from 1, the column that is wrong (empty where it is the whole row),
    and the reason with its remedy."""

    def __init__(self, number: int, reason: str, field: str = "") -> None:
        super().__init__(f"row {number}: {reason}")
        self.number, self.reason, self.field = number, reason, field

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"row": self.number, "field": self.field, "reason": self.reason}


def records_of(source: str | Path | Dataset, *, split: str = "train") -> Iterator["Record | RowError"]:
    """(number, record) of every row, or why it is none. Errors: `InputError` for a source that can't be read."""
    if isinstance(source, Dataset):
        return ((number, _without_gaps(row)) for number, row in enumerate(source, 1))
    if not isinstance(source, str | Path):
        raise InputError(f"{type(source).__name__} holds no pairs; give a file, a hub id or a `datasets.Dataset`.")
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv, ".parquet": _parquet}
    path = Path(source)
    read = readers.get(path.suffix.lower())
    try:
        there, is_file = path.exists(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL
        raise InputError(f"{str(source)!r:.80} is no file's name ({error}); give {FORM}.") from None
    if read is not None or there:
        if not is_file:
            what = "a directory" if path.is_dir() else "not a file"
            raise InputError(f"{path} is {what}; give a JSONL, CSV or Parquet file with {FORM}.")
        if read is None:
            raise InputError(f"{path} is neither .jsonl, .csv nor .parquet; name it by what it holds: {FORM}.")
        return read(path)
    return _hub(str(source), split)


def _hub(name: str, split: str) -> Iterator["Record | RowError"]:
    """A dataset of the hub: `owner/name`, or `owner/name:configuration`."""
    repository, _, configuration = name.partition(":")
    try:
        rows = load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # of the hub's client, of the network, of the dataset's own files
        raise InputError(
            f"{name!r} is neither a file nor a dataset that can be loaded ({type(error).__name__}: {error}); give a "
            f"JSONL, CSV or Parquet file with {FORM}."
        ) from None
    return ((number, _without_gaps(row)) for number, row in enumerate(rows, 1))


def _without_gaps(row: Any) -> Any:
    """A column of objects gives every row the names of all rows, null where a row has none of its own."""
    if not isinstance(row, Mapping):
        return row
    gaps = {
        column: {name: value for name, value in row[column].items() if value is not None}
        for column in ("positions", "corrupt_positions", "facts")
        if isinstance(row.get(column), Mapping)
    }
    return {**row, **gaps}


def text_of(path: Path) -> str:
    """A file's text, with or without a byte order mark. Errors: `InputError` naming the line that is not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); give a file with {FORM}.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: byte {content[error.start]:#04x} is not UTF-8; save the file as UTF-8 (it may be "
            "Latin-1 or UTF-16)."
        ) from None


def _json_lines(path: Path) -> Iterator["Record | RowError"]:
    for number, line in enumerate(text_of(path).split("\n"), 1):  # splitlines would cut at U+2028 inside a text
        if line.strip():
            try:
                yield number, json_value(line)
            except ValueError as error:
                yield RowError(number, f"not JSON ({error}); write one object a line.")


def _csv(path: Path) -> Iterator["Record | RowError"]:
    rows = csv.reader(io.StringIO(text_of(path), newline=""), strict=True)
    try:
        names = next(rows, [])
        if len(set(names)) != len(names):
            raise InputError(f"{path} names a column twice in its first line ({', '.join(names)}); name each once.")
        for number, cells in enumerate((cells for cells in rows if cells), 1):
            if len(cells) == len(names):
                yield number, {name: _list_or_text(name, cell) for name, cell in zip(names, cells, strict=True)}
            else:
                yield RowError(
                    number, f"{len(cells)} cells where the first line names {len(names)} columns; mind quotes."
                )
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not CSV ({error}); mind quotes and commas.") from None


def _list_or_text(column: str, cell: str) -> Any:
    """A cell; of an answer or a distractor that is a JSON list, the list."""
    if column not in ("answer", "distractor") or not cell.startswith("["):
        return cell
    try:
        value = json_value(cell)
    except ValueError:
        return cell
    return value if isinstance(value, list) else cell


def _parquet(path: Path) -> Iterator["Record | RowError"]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:  # arrow raises many kinds on damaged bytes
        raise InputError(
            f"{path} is no Parquet file that can be read ({type(error).__name__}: {str(error).splitlines()[:1]}); "
            "write it again."
        ) from None
    return ((number, _without_gaps(row)) for number, row in enumerate(rows, 1))
