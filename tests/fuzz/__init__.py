"""Fuzzed doors: `python -m tests.fuzz DOOR --seed 0 --count 200` opens a door with so many seeded mutations and counts.

A door is a module of this folder with `cases(seed, count)` (an iterator of named cases) and, where accepting a case is
not right by itself, `outcome(case)` (one of OUTCOMES, and what was said). A new one is added by its line in DOORS.
"""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tests.fuzz.case import outcome_of

DOORS = {
    "models": "a model's folder, broken in one place",
    "rows": "a user's own pairs: JSONL, CSV, Parquet, datasets",
    "recipes": "YAML and --set",
    "runfiles": "files of a run, and whole run folders",
}
OUTCOMES = {
    "right": "accepted (of models: with the right fingerprint)",
    "refused": "refused by InputError",
    "silent": "loaded something else in silence",
    "raw": "raw traceback",
}
HARMFUL = ("silent", "raw")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How often a door did what, and the harmful cases with what was said."""

    counts: dict[str, int]
    harmful: tuple[str, ...]

    def text(self) -> str:
        """One line a figure, then the harmful cases."""
        lines = [f"{self.counts[outcome]:5d}  {title}" for outcome, title in OUTCOMES.items()]
        return "\n".join([*lines, *self.harmful])


def door(name: str) -> Any:
    """The module behind a door."""
    return import_module(f".{name}", __package__)


class TooLong(BaseException):
    """A case took longer than it may."""


@contextmanager
def _at_most(seconds: int | None) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TooLong

    if seconds is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _opened(case: Any) -> tuple[str, str]:
    outcome, said = outcome_of(case)
    return {"accepted": "right"}.get(outcome, outcome), said


def figures(name: str, *, seed: int, count: int, limit: int | None = None) -> Figures:
    """Every case of a door through it; one that takes more than `limit` seconds counts as raw."""
    module = door(name)
    counts, harmful = Counter(dict.fromkeys(OUTCOMES, 0)), []
    for case in module.cases(seed, count):
        try:
            with _at_most(limit):
                outcome, said = getattr(module, "outcome", _opened)(case)
        except TooLong:
            outcome, said = "raw", f"still running after {limit} s"
        counts[outcome] += 1
        if outcome in HARMFUL:
            harmful.append(f"{outcome}: {case.name}: {said}")
    return Figures(counts=dict(counts), harmful=tuple(harmful))
