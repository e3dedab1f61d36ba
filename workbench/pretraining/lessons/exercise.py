"""One training sequence as words, with its answers and the targets of temporary probes; and batches of them as tensors.

An answer is marked at the token that predicts it: the one before the answer stands in the text. A probe's mark is a
word that the residual stream at a token is asked for by a linear map of its own, after a layer that the lesson names. A
look is where one head, named by the lesson, is to attend to from a token. Probes and looks end with the lesson; neither
is part of a model.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.tasks.base import Span
from workbench.values.refs import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A word that is asked for at a token."""

    at: int
    """Index of the token."""
    word: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A token that a head is to attend to from another one."""

    at: int
    to: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exercise:
    """A training sequence: a context and its queries, each followed by its answer."""

    words: tuple[str, ...]
    answers: tuple[Mark, ...]
    """In the order of the text: the first one is asked as the task itself asks, the others stand after answered
    ones."""
    probes: Mapping[str, tuple[Mark, ...]]
    looks: Mapping[str, tuple[Look, ...]]


@runtime_checkable
class Lesson(Protocol):
    """A family of exercises from easy (level 0) to the task itself (the last level)."""

    name: ClassVar[str]
    probe_layers: ClassVar[Mapping[str, int]]
    """Probe -> the layer after which it reads the residual stream (1 = the first)."""
    looking: ClassVar[Mapping[str, Head]]
    """Look -> the head that looks."""

    @property
    def levels(self) -> int: ...

    def exercise(self, draw: random.Random, level: int) -> Exercise: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Marks:
    """Marks of a batch: rows, tokens and what is asked for (a word's id; of a look the token looked at), side by
    side."""

    rows: Int[Tensor, " marks"]
    at: Int[Tensor, " marks"]
    targets: Int[Tensor, " marks"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Exercises as tensors, padded on the right (a causal model does not see the padding)."""

    tokens: Int[Tensor, "batch pos"]
    first: Marks
    """The first answer of each exercise."""
    later: Marks
    """All others."""
    probes: Mapping[str, Marks]
    looks: Mapping[str, Marks]


def cut(text: str) -> list[str]:
    """A text as words and marks, as the word-level tokenizer cuts it."""
    return re.findall(r"\w+|[^\w\s]", text)


def token_at(text: str, span: Span) -> int:
    """The index of the token that begins where a span begins."""
    return len(cut(text[: span[0]]))


def collate(exercises: Sequence[Exercise], vocabulary: Mapping[str, int], *, pad: int = 0) -> Batch:
    """Exercises -> tensors."""
    width = max(len(exercise.words) for exercise in exercises)
    tokens = torch.full((len(exercises), width), pad)
    for row, exercise in enumerate(exercises):
        tokens[row, : len(exercise.words)] = torch.tensor([vocabulary[word] for word in exercise.words])

    def marks(of_rows: Iterable[Sequence[Mark]]) -> Marks:
        return _marks([[(mark.at, vocabulary[mark.word]) for mark in row] for row in of_rows])

    return Batch(
        tokens=tokens,
        first=marks(exercise.answers[:1] for exercise in exercises),
        later=marks(exercise.answers[1:] for exercise in exercises),
        probes={name: marks(exercise.probes[name] for exercise in exercises) for name in exercises[0].probes},
        looks={
            name: _marks([[(look.at, look.to) for look in exercise.looks[name]] for exercise in exercises])
            for name in exercises[0].looks
        },
    )


def _marks(of_rows: Iterable[Sequence[tuple[int, int]]]) -> Marks:
    flat = [(row, at, target) for row, marks in enumerate(of_rows) for at, target in marks]
    columns = torch.tensor(flat, dtype=torch.long).reshape(-1, 3).unbind(1)
    return Marks(rows=columns[0], at=columns[1], targets=columns[2])
