"""README: short, its Python runs as it stands, its links lead somewhere; and the tables of README and site are what the
committed results say."""

import re
from pathlib import Path

from docs import tables

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LINES, WIDTH = 130, 120
PLANS = "what_a_run_costs"
"""The one page whose table takes minutes."""


def test_it_fits_on_a_screen_or_two() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= LINES
    assert not [line for line in lines if len(line) > WIDTH]


def test_its_first_example_is_the_one_that_is_run_and_drawn() -> None:
    """`test_examples.py` runs it; `make figures` draws its picture."""
    (first, *_) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    quoted = (ROOT / "docs/examples/heat_map.py").read_text().split('"""\n', 1)[1]
    assert first.strip() == quoted.strip()


def test_what_its_python_calls_is_there() -> None:
    import workbench

    asked = set(re.findall(r"\bwb\.(\w+)", README.read_text()))
    assert len(asked) > 6
    assert asked <= set(workbench.__all__)


def test_what_it_names_is_there() -> None:
    text = README.read_text()
    paths = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)", text, re.MULTILINE)
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_tables_are_what_the_committed_results_say() -> None:
    """The table of plans is made in `tests/experiment/test_llama_recipes.py`."""
    there: set[str] = set()
    for page in tables.pages():
        text = page.read_text()
        if page.stem != PLANS:
            assert tables.filled(text) == text, f"{page.name}: make tables"
        there |= {block["name"] for block in tables.BLOCK.finditer(text)}
    assert there == set(tables.TABLES), "every table is used"


def test_a_number_changed_by_hand_does_not_stay() -> None:
    for page in (page for page in tables.pages() if page.stem != PLANS):
        block = tables.BLOCK.search(page.read_text())
        assert block is not None
        digit = list(re.finditer(r"\d(?= )", block[0]))[-1]
        wrong = block[0][: digit.start()] + str((int(digit[0]) + 1) % 10) + block[0][digit.end() :]
        assert wrong != block[0]
        assert tables.filled(wrong) == block[0], page.name
