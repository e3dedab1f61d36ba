"""Execute every notebook of this folder (a glob, no list): `python notebooks/run.py [--save] [BEGINNING ...]`;
beginnings of names pick some.

`--save` writes the outputs back, figures as pictures that a code host shows, without timings, counters and progress
bars. Without it nothing is written: that is how CI runs them, in their fast mode.
"""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
"""A progress bar, or the explorer: nothing that a code host could show."""


def executed(path: Path) -> Any:
    """The notebook after a run in a fresh kernel. Raises what a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
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
    if not save:
        os.environ["WORKBENCH_FAST"] = "1"
    wanted = tuple(word for word in sys.argv[1:] if not word.startswith("-"))
    for path in sorted(path for path in HERE.glob("*.ipynb") if path.name.startswith(wanted or "")):
        print(f"running {path.name}", flush=True)
        notebook = executed(path)
        if save:
            nbformat.write(stripped(notebook), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
