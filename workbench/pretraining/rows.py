"""Rows of text to fine-tune on, such as GOAT's arithmetic or Alpaca's instructions: a prompt and what follows it, made
of a data set's columns."""

import logging
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench import seeds
from workbench.errors import InputError, nearest
from workbench.pretraining.config import FinetuningConfig
from workbench.seeds import Split
from workbench.tasks.records import FORM, RowError, records_of

log = logging.getLogger("workbench")
COLUMNS = "rows of text columns, which `prompt` and `answer` name in braces"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt and its answer, in a pair's names."""

    clean: str
    answer: str


def rows_of(config: FinetuningConfig, tokenizer: Any) -> dict[Split, list[Row]]:
    """The rows of a file or hub id, by split; equal prompts share a split.

    Errors: `InputError` for a source that can't be read, a column that is not there, a bad row with its number, and a
    split without rows.
    """
    assert config.rows is not None
    split_rows: dict[Split, list[Row]] = {"train": [], "calibration": [], "test": []}
    end, left_out = tokenizer.eos_token or "", 0
    for row in _filled(config):
        row = Row(clean=row.clean, answer=row.answer + end)
        texts = tokenizer([row.clean, row.answer], add_special_tokens=False)["input_ids"]
        if sum(map(len, texts)) > config.longest or not all(texts):
            left_out += 1
            continue
        split_rows[seeds.split([row.clean])].append(row)
    if left_out:
        log.info("%s: %d rows are empty or longer than %d tokens, and left out", config.rows, left_out, config.longest)
    empty = [split for split, rows in split_rows.items() if not rows]
    if empty:
        raise InputError(f"{config.rows} has no rows for {', '.join(empty)}; give more rows, or a larger `longest`.")
    return split_rows


def _filled(config: FinetuningConfig) -> Sequence[Row]:
    assert config.rows is not None
    try:
        records = list(records_of(config.rows))
    except InputError as error:
        raise InputError(str(error).replace(FORM, COLUMNS)) from None
    rows = []
    for record in records:
        if isinstance(record, RowError):
            raise record
        number, values = record
        if not isinstance(values, Mapping):
            raise RowError(number, f"a {type(values).__name__} where columns are needed; give {COLUMNS}.")
        rows.append(Row(clean=_prompt(config.prompt, values, number), answer=_text(config.answer, values, number)))
    return rows


def _prompt(templates: Sequence[str], values: Mapping[str, Any], number: int) -> str:
    """By the first template whose columns are all filled."""
    for template in templates:
        if all(str(values.get(column) or "").strip() for column in _columns(template)):
            return _text(template, values, number)
    return _text(templates[-1], values, number)


def _text(template: str, values: Mapping[str, Any], number: int) -> str:
    missing = [column for column in _columns(template) if column not in values]
    if missing:
        raise RowError(number, f"no column {missing[0]!r}; {nearest(missing[0], [str(name) for name in values])}")
    return template.format(**{column: _shown(values[column]) for column in _columns(template)})


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def _columns(template: str) -> list[str]:
    """The columns that a template names. Errors: `InputError` for braces that name none."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(f"the template {template!r} can't be read ({error}); name columns in braces.") from None
    wrong = [name for name in names if not name.isidentifier()]
    if wrong:
        raise InputError(f"the template {template!r} names {wrong[0]!r}, which is no column; double a brace of text.")
    return names
