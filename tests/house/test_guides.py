"""The Python of Start and of every guide runs, a page a session, and says what the page says it does."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs/start.md", *sorted((ROOT / "docs/guides").glob("*.md"))]
BLOCK = re.compile(r"(?P<skipped><!-- not run -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not block["skipped"] for block in blocks(page))], ids=lambda page: page.stem
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # of a trainer without an accelerator
@pytest.mark.usefixtures("others_randomness")
def test_the_python_of_a_guide_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a guide writes stays out of the repository
    names: dict[str, object] = {}
    for block in blocks(page):
        if not block["skipped"]:
            exec(compile(block["code"], page.name, "exec"), names)
    assert "wb" in names


def test_most_python_of_the_guides_is_run() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    skipped = [block for block in found if block["skipped"]]
    assert len(found) > 20
    assert len(skipped) <= len(found) // 4


def test_guides_use_public_names_that_exist() -> None:
    import workbench

    asked = {name for page in PAGES for name in re.findall(r"\bwb\.(\w+)", page.read_text())}
    assert len(asked) > 10
    assert asked <= set(workbench.__all__), asked - set(workbench.__all__)
