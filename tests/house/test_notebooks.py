"""Every notebook of the folder runs from top to bottom in its fast mode (a glob, no list)."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


def runner() -> Any:
    """notebooks/run.py, which `make notebooks` uses too."""
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings(
    "ignore"
)  # of the kernel's own machinery; a cell that warns is not hidden by it: cells run in another process
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PLOTLY_RENDERER", "json")
    notebook = runner().executed(path)
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_there_are_notebooks_and_they_keep_nothing_volatile():
    import nbformat

    paths = list(FOLDER.glob("*.ipynb"))
    assert paths
    for path in paths:
        saved = nbformat.read(path, as_version=4)
        kept = runner().stripped(nbformat.from_dict(saved.copy()))
        assert nbformat.writes(kept) == nbformat.writes(saved), (
            f"{path.name} was saved by something else; run `make notebooks`"
        )
        text = path.read_text()
        assert "%|" not in text, f"{path.name} keeps a progress bar; run `make notebooks`"
        assert str(FOLDER.parent) not in text, f"{path.name} names a directory of the machine that ran it"
