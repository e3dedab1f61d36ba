"""A training step of the bundled student on two threads, alone and beside a busy process, with threads that sleep while
they wait (`OMP_WAIT_POLICY=PASSIVE`, which importing the workbench sets) and with threads that spin (`ACTIVE`).

Two threads and a neighbour on two cores are three runners: a fair share makes a step 1.5 times as long, or twice where
a sum waits for the thread that shares its core. Threads that spin use up their share in waiting. Wall-clock seconds:
what is measured is the waiting. On a machine with more cores as many neighbours run as leave one core too few.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from typing import Any

THREADS, BATCH = 2, 64
STEP = "from benchmarks.busy_neighbour import report; report({steps})"


def run(*, steps: int = 5) -> dict[str, Any]:
    """One result: how many times longer a step takes beside the neighbour, passive and active."""
    passive, active = (_measured(policy, steps) for policy in ("PASSIVE", "ACTIVE"))
    assert passive["losses"] == active["losses"], "how threads wait changes no number"
    return {
        "name": "busy-neighbour",
        "ratio": round(active["beside"] / passive["beside"], 2),
        "passive_beside_over_alone": round(passive["beside"] / passive["alone"], 2),
        "active_beside_over_alone": round(active["beside"] / active["alone"], 2),
        "passive_over_active_alone": round(passive["alone"] / active["alone"], 2),
        **{f"seconds_{kind}_{where}": round(each[where], 4)
           for kind, each in (("passive", passive), ("active", active)) for where in ("alone", "beside")},
        "neighbours": passive["neighbours"],
        "load_before": round(os.getloadavg()[0], 2),
        "threads": THREADS,
    }  # fmt: skip


def _measured(policy: str, steps: int) -> dict[str, Any]:
    settings = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    settings.pop("GOMP_SPINCOUNT", None)
    words = [sys.executable, "-c", STEP.format(steps=steps)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True, env=settings).stdout)


def report(steps: int) -> None:
    """In the measuring process: alone, then beside the neighbours, as JSON."""
    import torch

    from benchmarks.subjects import entity_pairs
    from workbench.models.hooked_model import Student

    torch.set_num_threads(THREADS)
    student, pairs = Student.load("student", check=False), entity_pairs(BATCH)
    parameters = list(student.parameters().values())
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    losses = []

    def step() -> None:
        logits = student.final_logits(pairs.clean, pairs.mask)
        loss = torch.nn.functional.cross_entropy(logits, pairs.answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    step()
    alone = _median(step, steps)
    neighbours = max(1, len(os.sched_getaffinity(0)) - THREADS + 1) if hasattr(os, "sched_getaffinity") else 1
    busy = [multiprocessing.get_context("spawn").Process(target=_busy, daemon=True) for _ in range(neighbours)]
    for process in busy:
        process.start()
    time.sleep(1.0)
    beside = _median(step, steps)
    for process in busy:
        process.terminate()
    print(json.dumps({"alone": alone, "beside": beside, "losses": losses, "neighbours": neighbours}))


def _median(step: Any, count: int) -> float:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _busy() -> None:
    while True:
        pass
