"""Every notebook of the folder runs from top to bottom in its fast form, and opens as it should (a glob, no list)."""

import copy
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def runner() -> Any:
    """notebooks/run.py, which `make notebooks` uses too."""
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> Any:
    """A notebook; importing nbformat costs seconds, which the tests' collection need not wait for."""
    import nbformat

    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """One for all notebooks, each of which begins without names: in a fresh one the imports take longer than most
    notebooks do."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PLOTLY_RENDERER", "json")
        yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings(
    "ignore"
)  # of the kernel's own machinery; a cell that warns is not hidden by it: cells run in another process
def test_a_notebook_runs(path, kernel):
    notebook = runner().executed(path, kernel=kernel)
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_there_are_notebooks_and_they_keep_nothing_volatile():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        saved = read(path)
        assert runner().stripped(copy.deepcopy(saved)) == saved, (
            f"{path.name} was saved by something else; run `make notebooks`"
        )
        text = path.read_text()
        assert "%|" not in text, f"{path.name} keeps a progress bar; run `make notebooks`"
        assert str(FOLDER.parent) not in text, f"{path.name} names a directory of the machine that ran it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_badge_installation_and_one_import(path):
    cells = read(path).cells
    badge, install, imports = runner().opening(path.stem)
    assert (cells[0].cell_type, cells[0].source) == ("markdown", badge), "run `make notebooks`"
    assert cells[1].cell_type == "markdown"
    assert cells[1].source.startswith("# ")
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert code[:2] == [install, imports]
    assert imports == "import workbench as wb"
    for text in code[2:]:
        assert "environ" not in text, "no switches of the tests in a notebook; they are in FAST of notebooks/run.py"
        assert not re.search(r"\b_\w+\(|\.handle\(", text), "only what is public"


def test_the_badge_leads_to_the_repository_once_its_address_is_known():
    make = runner().badge
    assert "(https://colab.research.google.com/)" in make("x", '[project.urls]\nPaper = "https://arxiv.org/abs/1"')
    for end in ("", ".git", "/"):
        known = make("x", f'[project.urls]\nRepository = "https://github.com/OWNER/NAME{end}"\n')
        assert known.endswith("(https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/x.ipynb)")


def test_installation_does_nothing_where_the_workbench_is_there():
    """The cell as Python, with the magic line as what it would do."""
    asked: list[str] = []
    install = re.sub(r"%pip (.*)", lambda line: f"asked.append({line[1]!r})", runner().INSTALL)
    exec(install, {"asked": asked})
    assert not asked
    exec(install.replace('"workbench"', '"no_such_workbench"'), {"asked": asked})
    assert asked == ['install -q "circuit-distillation-workbench[explorer]"']


def test_the_fast_form_names_a_change_that_no_longer_fits():
    module = runner()
    assert module.FAST.keys() <= {path.stem for path in NOTEBOOKS}
    for path in NOTEBOOKS:
        before = read(path)
        after = module.fast(read(path), module.FAST.get(path.stem, {}))
        changed = sum(a.source != b.source for a, b in zip(before.cells, after.cells, strict=True))
        assert (changed > 0) == (path.stem in module.FAST)
    for wrong in ({"prompts=25": "prompts=1"}, {"wb.": "wb."}):
        with pytest.raises(ValueError, match="change FAST"):
            module.fast(read(NOTEBOOKS[1]), wrong)
