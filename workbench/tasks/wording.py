"""Templates that remember where their words went, and disjoint splits by hash: what most tasks need to write a prompt.

fill("{who} opens the {thing}.", who="Ann", thing="box") -> "Ann opens the box.", {"who": ((0, 3),), "thing": ((14,
17),)}
"""

from collections.abc import Iterable, Mapping
from string import Formatter

from workbench import seeds
from workbench.tasks.base import Span, Split

Spans = Mapping[str, tuple[Span, ...]]
"""Field of a template -> the characters of each of its occurrences, in the order of the text."""


def fill(template: str, **words: str) -> tuple[str, dict[str, tuple[Span, ...]]]:
    """The text of a template and the spans of each of its fields. Errors: `KeyError` for a field without a word."""
    text, spans = "", {}
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field is not None:
            start = len(text)
            text += words[field]
            spans[field] = (*spans.get(field, ()), (start, len(text)))
    return text, spans


def fields_of(template: str) -> set[str]:
    """The names of a template's fields."""
    return {field for _, field, _, _ in Formatter().parse(template) if field is not None}


def words_of(template: str) -> tuple[str, ...]:
    """The words and marks that a template brings itself, its fields left out."""
    text = " ".join(literal for literal, _, _, _ in Formatter().parse(template))
    for mark in ".,?:()":
        text = text.replace(mark, f" {mark} ")
    return tuple(dict.fromkeys(text.split()))


def split_by_hash(words: Iterable[str]) -> Split:
    """The split that a set of words belongs to whatever their order: 80 % train, 10 % calibration, 10 % test."""
    return seeds.split(words)
