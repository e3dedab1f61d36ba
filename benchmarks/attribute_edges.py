"""EAP-IG over 5 steps on a 12-layer model of GPT-2's shape: `attribute_edges` against the algorithm of the authors'
library (`eap_ig.py`), on the same pairs, at the same end of the Riemann sum.

The arithmetic, in forwards F: a run and five forwards with a backward take 1 + 5 * 2 = 11 F (no gradient of a weight is
needed; the library computes those too, and `ratio_frozen` is against the same without them; it makes the run at the
corrupt end twice). The products of 157 senders with 445 receivers, of which each meets half, take about a third of F:
the library takes them at every step, ours once, of the gradients' sum. The library's way runs the projections from 36
copies of the residual stream a layer and keeps them, with the norms', for the backward pass: that, and not the dense
array of changes, is its memory. Memory is each way's peak above what the loaded model takes, in a process of its own;
time is the processor's.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from benchmarks import subjects
from benchmarks.eap_ig import eap_ig
from benchmarks.timing import medians
from workbench.models.hooked_model import Teacher
from workbench.patching.attribution import attribute_edges
from workbench.patching.execution import Execution
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import METRICS

STEPS, PROMPTS, LENGTH = 5, 8, 24
METRIC = METRICS["logit_difference"]


def run() -> dict[str, Any]:
    """One result: ratio of the medians, ratio of the peaks of memory, and how alike the scores are."""
    model, pairs = _subject()
    runs = [way(model, pairs) for way in WAYS.values()]
    found, expected = (way() for way in runs)
    real = ~found.isnan()
    correlation = float(stats.spearmanr(found[real], expected[real])[0])  # pyright: ignore[reportArgumentType]
    frozen = partial(eap_ig, model, pairs, METRIC, steps=STEPS, frozen=True)
    fast, slow, without = medians(*runs, frozen, repeats=2, warm=True, clock=time.process_time)
    memory = {name: _peak(name) for name in WAYS}
    return {
        "name": "attribute-edges",
        "ratio": round(slow / fast, 2),
        "ratio_frozen": round(without / fast, 2),
        "memory_ratio": round(memory["reference"] / memory["ours"], 2),
        "peak_mib": {name: round(value / 2**20) for name, value in memory.items()},
        "spearman": correlation,
        "max_abs_difference": float((found - expected)[real].abs().max()),
        "effect_over_difference": round(
            float(expected.abs().max() / (found - expected)[real].abs().max().clamp(min=1e-30)), 1
        ),
        "edges": int(real.sum()),
        "seconds": round(fast, 3),
        "threads": torch.get_num_threads(),
    }


def _subject() -> tuple[Teacher, PromptPairs]:
    return subjects.gpt2(layers=12, heads=12, d_model=768), subjects.random_pairs(PROMPTS, LENGTH)


def _ours(model: Teacher, pairs: PromptPairs) -> Callable[[], Tensor]:
    execution = Execution(progress=False)
    return lambda: attribute_edges(model, pairs, metric=METRIC, steps=STEPS, end="corrupt", execution=execution).mean()


def _reference(model: Teacher, pairs: PromptPairs) -> Callable[[], Tensor]:
    return lambda: eap_ig(model, pairs, METRIC, steps=STEPS)


WAYS = {"ours": _ours, "reference": _reference}


def _peak(name: str) -> int:
    """Bytes of a way's peak above the loaded model, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attribute_edges", name],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def _memory(field: str) -> int:
    """A size of this process in bytes, as the system counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    subject = _subject()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory("VmRSS")
    WAYS[sys.argv[1]](*subject)()
    print(_memory("VmHWM") - before)
