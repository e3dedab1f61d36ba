"""`make demo` from the first to the last line with one worker and with two: wall-clock seconds, and the same results to
the bit.

Conditions are independent; discovery, matching and the report are not, and each worker starts once. One thread each, so
that the numbers can be the same.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run() -> dict[str, Any]:
    """One result: seconds with each, and their ratio."""
    with tempfile.TemporaryDirectory() as place:
        seconds, results = zip(*(_demo(Path(place) / str(workers), workers) for workers in (1, 2)), strict=True)
    assert results[0] == results[1], "the same to the bit with one worker and with two"
    return {
        "name": "demo",
        "ratio": round(seconds[0] / seconds[1], 2),
        "seconds_one": round(seconds[0]),
        "seconds_two": round(seconds[1]),
        "conditions": len(results[0]),
        "load_after": round(os.getloadavg()[0], 2),
        "cores": os.cpu_count(),
    }


def _demo(out: Path, workers: int) -> tuple[float, Any]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORKBENCH_CACHE": str(out / "cache")}
    words = [
        "-m",
        "workbench",
        "demo",
        "--out",
        str(out / "run"),
        "--workers",
        str(workers),
        "--threads",
        "1",
        "--quiet",
    ]
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=settings)
    return time.perf_counter() - start, json.loads((out / "run" / "results.json").read_text())
