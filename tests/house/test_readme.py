"""The README's Python example runs as it stands."""

import re
from pathlib import Path

import pytest

from docs import tables

ROOT = Path(__file__).parents[2]


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks, "the README has no Python example"
    monkeypatch.chdir(ROOT)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "Head(layer=" in capsys.readouterr().out, "the example finds value fetchers"


def test_what_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path


def test_its_tables_are_what_the_committed_results_say() -> None:
    text = (ROOT / "README.md").read_text()
    assert tables.filled(text) == text, "make tables"
    there = {block["name"] for block in tables.BLOCK.finditer(text)}
    assert there == set(tables.TABLES), "every table is used"
    assert tables.filled(text.replace("0.675 [0.62, 0.73]", "0.875 [0.62, 0.73]", 1)) == text, (
        "a number changed by hand does not stay"
    )
