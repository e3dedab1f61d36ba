"""What the front door says to a slip: the nearest name, or the remedy, before anything is computed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import workbench as wb
from tests.house.slips import SLIPS, Bundle


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle()


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What a user's own process is told to each slip."""
    command = [sys.executable, "-m", "tests.house.slips"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_told_its_remedy(slip: str, said: dict[str, str]) -> None:
    assert not said[slip].startswith(("raw ", "no error")), said[slip]
    assert re.search(SLIPS[slip][1], said[slip]), said[slip]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(wb.InputError, match="leave the device out"):
        wb.Teacher.load("teacher", device="cuda")


def test_a_copy_of_a_student_shares_nothing_with_it(bundle: Bundle) -> None:
    before, copy = bundle.student.fingerprint(), bundle.student.copy()
    assert copy.fingerprint() == before
    with torch.no_grad():
        for parameter in copy.parameters().values():
            parameter.mul_(0.5)
    assert bundle.student.fingerprint() == before != copy.fingerprint()


def test_figures_are_saved_under_a_path_as_text(bundle: Bundle, tmp_path: Path) -> None:
    figure = wb.plots.heads(
        wb.Scores.of_heads(torch.linspace(0, 1, 32).view(4, 8), unit="fall of accuracy"), circuit=bundle.ours
    )
    with pytest.raises(wb.InputError, match="ends in none of png, svg, pdf"):
        wb.plots.save_figure(figure, str(tmp_path / "heads.bmp"))
