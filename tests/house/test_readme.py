"""README: short, its Python runs as it stands, its links lead somewhere; and the tables of README and site are what the
committed results say."""

import re
from pathlib import Path

import pytest

from docs import tables

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LINES, WIDTH = 130, 120


def test_it_fits_on_a_screen_or_two() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= LINES
    assert not [line for line in lines if len(line) > WIDTH]


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"(?<!<!-- not run -->\n)```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks, "README has no Python example"
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "L" in capsys.readouterr().out, "the example prints heads"


def test_what_it_names_is_there() -> None:
    text = README.read_text()
    paths = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)", text, re.MULTILINE)
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_tables_are_what_the_committed_results_say() -> None:
    there: set[str] = set()
    for page in tables.pages():
        text = page.read_text()
        assert tables.filled(text) == text, f"{page.name}: make tables"
        there |= {block["name"] for block in tables.BLOCK.finditer(text)}
    assert there == set(tables.TABLES), "every table is used"


def test_a_number_changed_by_hand_does_not_stay() -> None:
    for page in tables.pages():
        block = tables.BLOCK.search(page.read_text())
        assert block is not None
        digit = re.search(r"\d(?= )", block[0])
        assert digit is not None
        wrong = block[0][: digit.start()] + str((int(digit[0]) + 1) % 10) + block[0][digit.end() :]
        assert tables.filled(wrong) == block[0], page.name
