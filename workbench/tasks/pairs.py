"""A pair of prompts as text, and what a row of a user's own file must hold to be one.

Rows are counted from 1 wherever they are named: a line of a JSONL file, a record of a CSV or Parquet file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from workbench.errors import InputError, nearest
from workbench.seeds import Split as Split
from workbench.storage import json_value
from workbench.tasks.mib import is_mib, pair_columns
from workbench.tasks.records import RowError, records_of

Span = tuple[int, int]
"""Characters [start, end) of a prompt."""
TEXTS = ("clean", "corrupt", "answer", "distractor")
SETS = ("answer", "distractor")
"""Columns that may hold a list of texts, each of which is one."""
MOST_SHOWN = 20
"""How many bad rows an error lists; it counts them all."""
LARGEST_FACT = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One clean prompt, its corrupt counterpart (of equal length, unless `corrupt_positions` names its tokens too), the
    right answer, a wrong one, and named positions in both."""

    clean: str
    corrupt: str
    answer: str
    distractor: str
    positions: Mapping[str, Any]
    """Name -> token indices (an int or several; negative counts from the end), character spans, or a piece of the clean
    text."""
    corrupt_answer: str | None = None
    """The right answer to the corrupt prompt, where it has one; None where it was made to have none."""
    corrupt_positions: Mapping[str, Any] | None = None
    """The same names -> their places in the corrupt prompt, where that is of another length; None: the same tokens."""
    more_answers: tuple[str, ...] = ()
    """Other right answers, each one token: with `answer` a set (all years above)."""
    more_distractors: tuple[str, ...] = ()
    """Other wrong answers: with `distractor` a set."""
    facts: Mapping[str, int] | None = None
    """Whole numbers that results may be broken down by (`workbench.tasks.breakdown`), such as how many operations touch
    the queried box."""

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.answer, *self.more_answers)

    @property
    def distractors(self) -> tuple[str, ...]:
        """All wrong answers."""
        return (self.distractor, *self.more_distractors)


def numbered_pairs(
    source: str | Path | Dataset,
    *,
    split: str = "train",
    counterfactual: str | None = None,
    problems: list[RowError] | None = None,
) -> list[tuple[int, Pair]]:
    """The numbered pairs of a file, a dataset or a hub id, not yet checked against a tokenizer; rows count from 1.

    `source`: a JSONL file (UTF-8, one object a line), a CSV or Parquet file, a `datasets.Dataset`, or a hub id, with
    the columns clean, corrupt, answer, distractor and (optionally) positions, corrupt_positions, corrupt_answer and
    facts (objects as JSON text in a CSV file). An answer or a distractor is a text, or a list of texts that are each
    one (JSON text in a CSV file too). A position is a token's number (0 is the first token, without
    BOS; -1 the last), a list of them, a piece of the clean prompt (meant is the last token of its last occurrence), or
    a list of character spans [[start, end], ...]. Rows of MIB's tasks (`workbench.tasks.mib`) are known by their
    columns; `counterfactual`: which of theirs is the corrupt prompt. `problems` takes up the bad rows, which are left
    out. Errors: `InputError` for a source that can't be read, and, without `problems`, with a table of all bad rows.
    """
    pairs: list[tuple[int, Pair]] = []
    bad: list[RowError] = []
    for record in records_of(source, split=split):
        try:
            if isinstance(record, RowError):
                raise record
            number, values = record
            values = pair_columns(number, values, counterfactual) if is_mib(values) else values
            pairs.append((number, _pair(number, values)))
        except RowError as problem:
            bad.append(problem)
    if problems is not None:
        problems += bad
    elif bad:
        raise bad_rows(bad, of=len(bad) + len(pairs), source=named(source))
    return pairs


def named(source: Any) -> str:
    """A source in words."""
    return str(source) if isinstance(source, str | Path) else "the dataset"


def bad_rows(problems: Iterable[RowError], *, of: int, source: str) -> InputError:
    """One error for all bad rows of a source: how many, the first twenty with row, reason and column, and the
    remedies."""
    ordered = sorted(problems, key=lambda problem: problem.number)
    lines = [
        f"  row {problem.number}: {problem.reason}" + (f" [{problem.field}]" if problem.field else "")
        for problem in ordered[:MOST_SHOWN]
    ]
    more = len(ordered) - len(lines)
    return InputError(
        f"{len(ordered)} of {of} rows of {source} can't be used (rows count from 1; in brackets the column):\n"
        + "\n".join(lines)
        + (f"\n  ... and {more} more" if more else "")
        + "\nMend them, or leave them out: `skip_bad_rows=True`, in a recipe `data.skip_bad_rows: true`, of a command "
        "--skip-bad-rows."
    )


def _pair(number: int, record: Any) -> Pair:
    if not isinstance(record, Mapping):
        raise RowError(number, f"not an object with the columns {', '.join(TEXTS)}.")
    texts = {column: _texts(number, record, column) for column in TEXTS}
    corrupt_answer = record.get("corrupt_answer")
    if not isinstance(corrupt_answer, str | None):
        raise RowError(
            number, f"corrupt_answer is {corrupt_answer!r}; write a text, or leave it out.", "corrupt_answer"
        )
    refuse_broken_text(number, "corrupt_answer", corrupt_answer or "", "corrupt_answer")
    return Pair(
        **{column: values[0] for column, values in texts.items()},
        more_answers=texts["answer"][1:],
        more_distractors=texts["distractor"][1:],
        positions=_mapping(number, record, "positions"),
        corrupt_answer=corrupt_answer or None,
        corrupt_positions=_corrupt_positions(number, record),
        facts=_facts(number, record),
    )


def _texts(number: int, record: Mapping[Any, Any], column: str) -> tuple[str, ...]:
    """The text of a column; of an answer or a distractor, all texts of a list."""
    value = record.get(column)
    if isinstance(value, list | tuple) and column in SETS:
        if not value:
            raise RowError(number, f"column {column!r} is an empty list; give one text or several.", column)
        listed: list[Any] = list(value)
    else:
        listed = [value]
    for text in listed:
        if not isinstance(text, str):
            what = "no column" if column not in record else f"{type(text).__name__}, not text, in column"
            raise RowError(number, f"{what} {column!r}; {nearest(column, map(str, record))}", column)
        refuse_broken_text(number, f"column {column!r}", text, column)
    return tuple(listed)


def refuse_broken_text(number: int, what: str, text: str, field: str = "") -> None:
    """Refuse what is no text in any encoding (a lone half of a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            number, f"{what} holds half of a character ({text[error.start]!r}); write the whole one, as UTF-8.", field
        ) from None


def _mapping(number: int, record: Mapping[str, Any], column: str) -> dict[str, Any]:
    """A column that holds an object, or its JSON (in a CSV file)."""
    value = record.get(column)
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json_value(value)
        except ValueError as error:
            raise RowError(
                number, f"{column} is not JSON ({error}); write for example {EXAMPLES[column]}.", column
            ) from None
        if value is None:
            return {}
    if not isinstance(value, Mapping):
        raise RowError(number, f"{column} is {value!r:.60}, no object; write for example {EXAMPLES[column]}.", column)
    for name in value:
        refuse_broken_text(number, f"{column}: the name {name!r}", str(name), column)
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise RowError(number, f"{column} has the name {name!r}; give it a name of plain characters.", column)
    return dict(value)


def _corrupt_positions(number: int, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """None where the column is not there, or is empty."""
    empty = record.get("corrupt_positions") in (None, "")
    return None if empty else _mapping(number, record, "corrupt_positions")


PLACES = '{"subject": "Peter", "verb": 3}'
EXAMPLES = {"positions": PLACES, "corrupt_positions": PLACES, "facts": '{"boxes": 5}'}


def _facts(number: int, record: Mapping[str, Any]) -> dict[str, int] | None:
    facts = _mapping(number, record, "facts")
    for name, value in facts.items():
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > LARGEST_FACT:
            raise RowError(
                number, f"fact {name!r} is {value!r:.60}; facts are whole numbers of at most 2**31 - 1.", "facts"
            )
    return facts or None


def repeated(pairs: Sequence[tuple[int, Pair]]) -> list[tuple[int, int]]:
    """(row, the earlier row that it repeats) for every clean prompt that came before."""
    first: dict[str, int] = {}
    return [(number, first[pair.clean]) for number, pair in pairs if first.setdefault(pair.clean, number) != number]
