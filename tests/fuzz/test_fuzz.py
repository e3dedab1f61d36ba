"""No door of the workbench answers bad input with a raw traceback: a few hundred cases of each; more by
`python -m tests.fuzz`."""

import importlib

import pytest

from tests.fuzz.__main__ import DOORS
from tests.fuzz.case import outcome_of

COUNT = 150


@pytest.mark.parametrize("door", ["rows", "recipes", "runfiles"])
def test_no_raw_traceback(door: str) -> None:
    assert door in DOORS
    answers = [(case.name, *outcome_of(case)) for case in importlib.import_module(f"tests.fuzz.{door}").cases(1, COUNT)]
    assert len(answers) == COUNT
    assert [answer for answer in answers if answer[1] == "raw"] == []
    for wanted in ("accepted", "refused"):
        assert sum(outcome == wanted for _, outcome, _ in answers) >= COUNT // 20, "the cases are of both kinds"


def test_every_refusal_is_worth_reading() -> None:
    for case in importlib.import_module("tests.fuzz.rows").cases(2, 60):
        outcome, said = outcome_of(case)
        if outcome == "refused":
            assert len(said) > 20
            assert not said.startswith("Traceback")
