"""The examples that the README quotes: run as they stand, in an empty folder, and what they come to."""

import contextlib
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from workbench.matching import HeadMap
from workbench.plots import to_frame

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs/examples"


def run(name: str, folder: Path) -> dict[str, Any]:
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else _chdir(folder):
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@contextlib.contextmanager
def _chdir(folder: Path) -> Any:  # Python 3.10 has none
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def lines_of_code(name: str) -> int:
    text = (EXAMPLES / f"{name}.py").read_text().split('"""', 2)[2]
    return sum(bool(line.strip()) and not line.startswith("#") for line in text.splitlines())


def test_from_nothing_to_a_heat_map(tmp_path: Path) -> None:
    assert lines_of_code("heat_map") <= 6
    made = run("heat_map", tmp_path)
    search = made["search"]
    recorded = HeadMap.load(ROOT / "assets/results/demo/head_map.json")
    stored = set(recorded.teacher_heads)  # the demo searched other stages too, on prompts of its own
    strongest = search.scores.top(5)
    assert set(strongest) <= set(search.circuit.heads)
    assert len(set(strongest) & stored) >= 4
    assert set(search.by_stage) >= {"A", "B"}
    frame = to_frame(made["figure"])
    drawn = frame.loc[frame["mean"].idxmax()]
    assert f"L{drawn['layer']}H{drawn['head']}" == str(strongest[0])
    assert (tmp_path / "heat_map.html").stat().st_size > 10_000


@pytest.mark.slow
def test_from_nothing_to_a_distilled_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of_code("distill") <= 15
    made = run("distill", tmp_path)
    table = made["table"]
    assert repr(table) in capsys.readouterr().out
    base, plain, aligned, teacher = (table[name] for name in made["models"])
    assert base.full_accuracy + 0.05 < min(plain.full_accuracy, aligned.full_accuracy)
    assert max(plain.full_accuracy, aligned.full_accuracy) < teacher.full_accuracy
    assert base.p is None, "the first model is the one that others are compared with"
    assert all(0 < row.p <= 1 for row in (plain, aligned, teacher) if row.p is not None)
    assert teacher.p is not None
    assert teacher.p < 0.01, "70 questions tell the teacher from the base; forty steps need more of them"
    assert aligned.mean_cka > plain.mean_cka + 0.1 > base.mean_cka > base.cka_floor + 0.2
    for row in table.rows:  # the circuits carry far more than random heads do
        assert row.circuit_accuracy > row.random_circuit_accuracy + 0.08
    assert not list(tmp_path.iterdir())  # nothing is written where nothing was asked for
    start = made["student"]
    assert start.fingerprint() != made["aligned"].student.fingerprint() != made["plain"].student.fingerprint()
