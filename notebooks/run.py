"""Execute every notebook of this folder (a glob, no list): `python notebooks/run.py [--save] [BEGINNING ...]`;
beginnings of names pick some.

`--save` writes the outputs back, figures as pictures that a code host shows, without timings, counters and progress
bars, and the Colab badge that opens the notebook where pyproject.toml says that the repository is. Without it nothing
is written, and the notebooks run in their fast form: that is how the tests run them.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
"""A progress bar, or the explorer: nothing that a code host could show."""
FAST: Mapping[str, Mapping[str, str]] = {
    "01_explore_a_model": {"prompts=24": "prompts=6"},
    "02_find_a_circuit": {
        'scenes=4, split="calibration"': 'scenes=2, split="calibration"',
        'scenes=12, split="test"': 'scenes=3, split="test"',
        "random_rankings=5": "random_rankings=2",
        "draws=3": "draws=1",
        "draws=8": "draws=2",
        "few = pairs[:7]": "few = pairs[:3]",
    },
    "03_match_and_distil": {
        'scenes=10, split="train"': 'scenes=6, split="train"',
        'scenes=40, split="test"': 'scenes=10, split="test"',
        "steps=80": "steps=20",
        "random_circuits=3": "random_circuits=1",
    },
    "04_your_own_model_and_task": {
        "scenes=600": "scenes=120",
        'scenes=40, split="calibration"': 'scenes=16, split="calibration"',
        'scenes=120, split="test"': 'scenes=40, split="test"',
    },
    "06_elimination_and_edges": {
        'scenes=40, split="calibration"': 'scenes=14, split="calibration"',
        'scenes=80, split="test"': 'scenes=30, split="test"',
        "random_rankings=2": "random_rankings=1",
        "few = test[:40]": "few = test[:12]",
    },
    "07_the_loss_in_your_trainer": {"boxes=5": "boxes=3", "max_steps=12": "max_steps=6"},
}
"""Of a notebook: what its code says -> what it says in the fast form (fewer prompts, draws and steps)."""
INSTALL = """\
import importlib.util

if importlib.util.find_spec("workbench") is None:  # on Colab, say; where the workbench is installed, nothing happens
    %pip install -q "circuit-distillation-workbench[explorer]\""""
IMPORT = "import workbench as wb"
COLAB = "https://colab.research.google.com"


def badge(name: str, project: str) -> str:
    """The Colab badge of a notebook. `project`: the text of pyproject.toml, whose URL `Repository` (on GitHub) it opens
    the notebook from; without one it opens Colab, for a notebook that was downloaded."""
    picture = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"
    repository = re.search(r'^Repository = "https://github\.com/([^/"]+/[^/"]+?)(?:\.git)?/?"$', project, re.MULTILINE)
    if repository is None:
        return f"{picture}({COLAB}/) (*File, Upload notebook* takes this file once it is downloaded)"
    return f"{picture}({COLAB}/github/{repository[1]}/blob/main/notebooks/{name}.ipynb)"


def opening(name: str) -> tuple[str, str, str]:
    """What every notebook begins with: the text of its first cell (a badge), and of its first two cells of code."""
    return badge(name, (HERE.parent / "pyproject.toml").read_text(encoding="utf-8")), INSTALL, IMPORT


def fast(notebook: Any, changes: Mapping[str, str]) -> Any:
    """The notebook with fewer prompts, draws and steps. Raises where a change fits no line, or more than one."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for slow, quick in changes.items():
        count = sum(cell.source.count(slow) for cell in cells)
        if count != 1:
            raise ValueError(f"{slow!r} is in the code {count} times, not once; change FAST in notebooks/run.py")
        for cell in cells:
            cell.source = cell.source.replace(slow, quick)
    return notebook


def executed(path: Path, *, whole: bool = False, kernel: KernelManager | None = None) -> Any:
    """The notebook after a run in a fresh kernel, in its fast form unless `whole`. Raises what a cell raises.

    `kernel`: one that several notebooks share, each beginning without names; what they import is imported once.
    """
    notebook = nbformat.read(path, as_version=4)
    if not whole:
        fast(notebook, FAST.get(path.stem, {}))
    settings: dict[str, Any] = {"timeout": 900, "resources": {"metadata": {"path": str(HERE)}}}
    if kernel is None:
        NotebookClient(notebook, kernel_name="python3", **settings).execute()
        return notebook
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(notebook, km=kernel, **settings)
    client.execute()
    client.kc.stop_channels()
    notebook.cells.pop(0)
    return notebook


def stripped(notebook: Any) -> Any:
    """Without what differs from run to run."""
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]
            for output in cell.outputs:
                if "execution_count" in output or output["output_type"] == "execute_result":
                    output["execution_count"] = None  # the format wants the key
                for kind in ("application/vnd.plotly.v1+json", "text/html"):
                    if "image/png" in output.get("data", {}):
                        output.data.pop(kind, None)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def main() -> int:
    """Run all."""
    save = "--save" in sys.argv[1:]
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ["PLOTLY_RENDERER"] = "png" if save else "json"
    wanted = tuple(word for word in sys.argv[1:] if not word.startswith("-"))
    for path in sorted(path for path in HERE.glob("*.ipynb") if path.name.startswith(wanted or "")):
        print(f"running {path.name}", flush=True)
        notebook = executed(path, whole=save)
        if save:
            notebook.cells[0].source = opening(path.stem)[0]
            nbformat.write(stripped(notebook), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
