"""Trainings an hour of a study with one worker and with two: short trainings of the bundled student under two
conditions, each with its evaluation; circuits and head map are there before.

Trainings are independent, so two cores should do twice as many; what is lost is the start of every worker (its imports
and models, once) and the last training, beside which a worker stands idle. Wall-clock time. The rows are the same to
the bit. Beside it what the machine itself gives two processes: bare matrix products, alone and two at once
(`bare_ratio`; cores that share what they compute with do less than twice as much).
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.study.config import StudentConfig, StudyConfig
from workbench.study.grid import Study
from workbench.study.launch import run_in_processes

SCENES = 10


def run(*, steps: int = 12, seeds: int = 8) -> dict[str, Any]:
    """One result: the trainings an hour with each, and their ratio."""
    logging.getLogger("workbench").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as place, _cache(place):
        prepared = Study(_config(steps, seeds), Path(place) / "prepared")
        prepared.begin(resume=False)
        prepared.prepare()
        hours, rows = [], []
        for workers in (1, 2):
            folder = Path(place) / f"workers-{workers}"
            shutil.copytree(prepared.path, folder, ignore=shutil.ignore_patterns(".lock"))
            study = Study(prepared.config, folder)
            study.begin(resume=True)
            start = time.perf_counter()
            run_in_processes(study, workers)
            hours.append((time.perf_counter() - start) / 3600)
            rows.append(_rows(study))
    assert rows[0] == rows[1], "the same to the bit with one worker and with two"
    trainings = len(rows[0])
    rates = [trainings / each for each in hours]
    return {
        "name": "study-throughput",
        "ratio": round(rates[1] / rates[0], 2),
        "bare_ratio": round(bare_ratio(), 2),
        "trainings": trainings,
        "trainings_an_hour_one": round(rates[0]),
        "trainings_an_hour_two": round(rates[1]),
        "load_after": round(os.getloadavg()[0], 2),
        "cores": os.cpu_count(),
    }


BARE = """
import sys, time, torch
torch.set_num_threads(1)
a = torch.randn(384, 384)
a @ a
print("ready", flush=True)
sys.stdin.readline()
start, count = time.perf_counter(), 0
while time.perf_counter() - start < 6:
    for _ in range(50):
        a @ a
    count += 50
print(count)
"""


def bare_ratio() -> float:
    """How many times as many matrix products two processes do at once as one does alone."""

    def products(count: int) -> int:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen([sys.executable, "-c", BARE], **pipes) for _ in range(count)]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(int(process.communicate()[0]) for process in processes)

    return products(2) / products(1)


def _config(steps: int, seeds: int) -> StudyConfig:
    small = {
        "data.discovery_scenes": 4,
        "data.reference_scenes": 20,
        "data.validation_scenes": 2,
        "data.test_scenes": 20,
        "training.steps": steps,
        "training.evaluate_every": steps,
        "evaluation.random_circuits": 2,
        "evaluation.curve": False,
    }
    return StudyConfig(
        recipe="demo",
        overrides=small,
        students={"sibling": StudentConfig(source="student")},
        train_scenes=(SCENES,),
        weights=(1.0,),
        seeds=tuple(range(seeds)),
        conditions=("circuit_ce", "circuit_ce_cka"),
    )


def _rows(study: Study) -> dict[str, Any]:
    folder, arms = replace(study.folder("sibling"), trial=f"scenes-{SCENES}"), study.arms("sibling", SCENES)
    return {f"{arm}": json.loads((folder.condition(*arm) / "result.json").read_text()) for arm in arms}


class _cache:
    """A cache of its own, so that both runs find what the first of all has made."""

    def __init__(self, place: str) -> None:
        self.place, self.before = place, os.environ.get("WORKBENCH_CACHE")

    def __enter__(self) -> None:
        os.environ["WORKBENCH_CACHE"] = str(Path(self.place) / "cache")

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del os.environ["WORKBENCH_CACHE"]
        else:
            os.environ["WORKBENCH_CACHE"] = self.before
