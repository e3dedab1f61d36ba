"""Conditions and seeds of a run on several processes of this machine, to the same bits for every number of them.

An arm (a training and its evaluation) is a function of the run's folder, its condition and its seed, and writes into a
folder of its own, so arms need no order among each other. Circuits and head map are there before. Every worker computes
with one thread: the numbers are those of `--workers 1`, and, to the rounding of sums over threads, those of no workers.
"""

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from workbench.experiment.arms import run_condition
from workbench.experiment.conditions import TITLES
from workbench.experiment.discover import discover_one, say
from workbench.experiment.pool import Pool, peak_memory
from workbench.experiment.recipe import to_plain, written_recipe
from workbench.experiment.results import read_row
from workbench.experiment.run import Run
from workbench.experiment.runs import RunFolder

log = logging.getLogger("workbench")
Arm = tuple[str, int]
"""Condition and seed."""


def discover_in_processes(run: Run, workers: int) -> None:
    """The circuits that are not there yet, each model's in a process of its own; matching reads them then."""
    names = ["teacher", "student"] if run.recipe.endpoint is None else ["student"]
    missing = [name for name in names if not run.folder.circuit_file(name).exists()]
    if run.recipe.student is None or not missing:
        return
    plain = json.dumps(to_plain(run.recipe))
    pool = Pool(workers=workers, unit="model", what="circuits", need=peak_memory(), device=run.recipe.device)
    jobs = [(plain, str(run.folder.path), run.folder.trial, name) for name in missing]
    pool.run(_search, jobs, lambda number, _: say(run, missing[number]))


def _search(plain: str, path: str, trial: str, name: str) -> None:
    """In a worker."""
    discover_one(_run(plain, path, trial), name)


def run_in_processes(run: Run, arms: Sequence[Arm], workers: int) -> None:
    """Train and evaluate arms whose rows are not there yet, each in the run's folder. An accelerator is shared: small
    models leave most of it idle. Errors: `InputError` when an arm fails, and as `Pool.run`."""
    if not arms:
        return
    plain = json.dumps(to_plain(run.recipe))

    def tell(number: int, _: None) -> None:
        condition, seed = arms[number]
        row = read_row(run.folder.condition(condition, seed) / "result.json")
        log.info(
            "%s, seed %d: full %.3f, circuit %.3f, random circuit %.3f",
            TITLES[condition],
            seed,
            row.full_accuracy,
            row.circuit_accuracy,
            row.random_circuit_accuracy,
        )

    pool = Pool(workers=workers, unit="training", what="conditions", need=peak_memory(), device=run.recipe.device)
    pool.run(_arm, [(plain, str(run.folder.path), run.folder.trial, *arm) for arm in arms], tell)


def _arm(plain: str, path: str, trial: str, condition: str, seed: int) -> None:
    """In a worker."""
    run_condition(_run(plain, path, trial), condition, seed, resume=True)


@functools.cache
def _run(plain: str, path: str, trial: str) -> Run:
    """The run as this process knows it: its models are loaded once."""
    return Run(written_recipe(json.loads(plain)), RunFolder(Path(path), trial))
