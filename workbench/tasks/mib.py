"""Rows of MIB's circuit track (Mueller et al. 2025) as pairs, known by their columns: from the hub, or a file like it.

    read_pairs("mib-bench/ioi", model, split="test")
    read_pairs("mib-bench/copycolors_mcqa:4_answer_choices", model)      # a configuration of the dataset
    read_pairs("mib-bench/arithmetic_addition", model, skip_bad_rows=True)
    read_pairs("mib-bench/arc_easy", model, counterfactual="answerPosition_counterfactual")

| task | columns read | answer, distractor | corrupt prompt |
| --- | --- | --- | --- |
| IOI | prompt, metadata | indirect_object, subject | s2_io_flip_counterfactual |
| MCQA, ARC | prompt, choices.label, answerKey | the choice's label, the corrupt prompt's | symbol_counterfactual |
| arithmetic | prompt, label | label, that of the corrupt prompt | random_counterfactual |
| greater-than | clean, corrupted, year | all two-digit years above, all others (sets) | corrupted |

The default counterfactuals are the track's own. An answer has a space before it, unless its prompt ends in white space
or it continues a number (greater-than). The track's filters are rows that are refused here (answers of several tokens,
prompts of unequal length); `skip_bad_rows` leaves them out.
"""

from collections.abc import Mapping
from typing import Any

from workbench.errors import nearest
from workbench.tasks.records import RowError

SUFFIX = "_counterfactual"
DEFAULTS = {"ioi": "s2_io_flip", "choices": "symbol", "arithmetic": "random"}


def is_mib(record: Any) -> bool:
    """Whether a row has the columns of one of MIB's tasks and not those of a pair."""
    if not isinstance(record, Mapping) or "answer" in record:
        return False
    return ("prompt" in record and bool(_counterfactuals(record))) or {"clean", "corrupted", "year"} <= set(record)


def pair_columns(number: int, record: Mapping[str, Any], counterfactual: str | None = None) -> dict[str, Any]:
    """A row with the columns of a pair. Errors: `RowError` naming the column that is missing or empty."""
    if "prompt" not in record:
        return _greater_than(number, record)
    kind = "ioi" if "metadata" in record else "choices" if "choices" in record else "arithmetic"
    column = counterfactual or DEFAULTS[kind] + SUFFIX
    if column not in record:
        known = _counterfactuals(record)
        raise RowError(number, f"no counterfactual {column!r}; {nearest(column, known)}", column)
    corrupt = _object(number, record, column)
    if kind == "ioi":
        names = _object(number, record, "metadata")
        answer, wrong = (_said(number, names, name, "metadata") for name in ("indirect_object", "subject"))
        other = _choice(number, corrupt, column) if corrupt.get("choices") else wrong
    else:
        read = _choice if kind == "choices" else _label
        answer, other = read(number, record, ""), read(number, corrupt, column)
        wrong = other
    clean = _said(number, record, "prompt", "prompt")
    space = "" if clean[-1:].isspace() else " "
    pair = {"clean": clean, "corrupt": _said(number, corrupt, "prompt", column)}
    return {**pair, "answer": space + answer, "distractor": space + wrong, "corrupt_answer": space + other}


def _greater_than(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """ "... from the year 1741 to the year 17": every year from 42 on is right."""
    year = str(record["year"])
    if len(year) != 4 or not year.isdecimal() or year[2:] in ("99", ""):
        raise RowError(number, f"year is {record['year']!r}; give one of four digits, below 99.", "year")
    last = int(year[2:])
    return {
        "clean": record["clean"],
        "corrupt": record["corrupted"],
        "answer": [f"{other:02d}" for other in range(last + 1, 100)],
        "distractor": [f"{other:02d}" for other in range(last + 1)],
    }


def _counterfactuals(record: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in record if str(name).endswith(SUFFIX)]


def _object(number: int, record: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    value = record[column]
    if not isinstance(value, Mapping):
        raise RowError(number, f"{column} is {value!r:.60}, no object; leave this row out.", column)
    return value


def _said(number: int, record: Mapping[str, Any], name: str, field: str) -> str:
    """A text or a number, as text."""
    value = record.get(name)
    if value is None or isinstance(value, bool | Mapping | list) or str(value) == "":
        raise RowError(number, f"{name} is {value!r:.60}; give a text, or leave this row out.", field)
    return str(value)


def _label(number: int, record: Mapping[str, Any], field: str) -> str:
    return _said(number, record, "label", field or "label")


def _choice(number: int, record: Mapping[str, Any], field: str) -> str:
    """The label (of IOI the name) of the right choice."""
    choices, key = record.get("choices"), record.get("answerKey")
    labels = choices.get("label") if isinstance(choices, Mapping) else choices
    if isinstance(labels, list) and isinstance(key, int) and not isinstance(key, bool) and 0 <= key < len(labels):
        return str(labels[key])
    reason = f"answerKey is {key!r}, which is no place among the choices {labels!r:.60}; leave this row out."
    raise RowError(number, reason, field or "answerKey")
