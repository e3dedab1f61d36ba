"""Conditions and seeds of a run on several processes of this machine, to the same bits for every number of them.

An arm (a training and its evaluation) is a function of the run's folder, its condition and its seed, and writes into a
folder of its own, so arms need no order among each other. Circuits and head map are there before. Every worker computes
with one thread: the numbers are those of `--workers 1`, and, to the rounding of sums over threads, those of no workers.
A worker that dies takes the others with it; the run resumes, each arm from its last checkpoint.
"""

import functools
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from workbench.errors import InputError
from workbench.experiment.arms import run_condition
from workbench.experiment.conditions import TITLES
from workbench.experiment.recipe import to_plain, written_recipe
from workbench.experiment.results import read_row
from workbench.experiment.run import Run
from workbench.experiment.runs import RunFolder
from workbench.values.bar import bar

log = logging.getLogger("workbench")
Arm = tuple[str, int]
"""Condition and seed."""


def free_cores() -> int:
    """Cores that this process may use, less what others keep busy (the load of the last minute); at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, round(allowed - busy))


def run_in_processes(run: Run, arms: Sequence[Arm], workers: int) -> None:
    """Train and evaluate arms whose rows are not there yet, each in the run's folder. Errors: `InputError` where an
    accelerator would be shared, and when an arm fails or a worker dies (the rest goes on with `--resume`)."""
    if run.recipe.device != "cpu":
        raise InputError(
            f"workers are processes on CPU cores, and this recipe computes on {run.recipe.device}; leave --workers out."
        )
    if not arms:
        return
    plain = json.dumps(to_plain(run.recipe))
    context = multiprocessing.get_context("spawn")  # a fork of a process that has computed with threads may hang
    pool = ProcessPoolExecutor(min(workers, len(arms)), mp_context=context, initializer=_one_thread)
    with bar(total=len(arms), desc=f"conditions, {workers} at once", unit="training") as progress:
        try:
            waiting = {pool.submit(_arm, plain, str(run.folder.path), run.folder.trial, *arm): arm for arm in arms}
            for done in as_completed(waiting):
                condition, seed = waiting[done]
                done.result()
                progress.update()
                row = read_row(run.folder.condition(condition, seed) / "result.json")
                log.info(
                    "%s, seed %d: full %.3f, circuit %.3f, random circuit %.3f",
                    TITLES[condition],
                    seed,
                    row.full_accuracy,
                    row.circuit_accuracy,
                    row.random_circuit_accuracy,
                )
        except BaseException as error:
            for worker in multiprocessing.active_children():
                worker.terminate()  # a training that is cut off has its checkpoint
            if isinstance(error, BrokenProcessPool):
                raise InputError(
                    "a worker died (out of memory, or killed); what was trained is kept: go on with --resume and fewer "
                    "--workers."
                ) from None
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """In a worker, at its start: an interruption is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)


def _arm(plain: str, path: str, trial: str, condition: str, seed: int) -> None:
    """In a worker."""
    run_condition(_run(plain, path, trial), condition, seed, resume=True)


@functools.cache
def _run(plain: str, path: str, trial: str) -> Run:
    """The run as this process knows it: its models are loaded once."""
    return Run(written_recipe(json.loads(plain)), RunFolder(Path(path), trial))
