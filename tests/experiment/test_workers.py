"""Arms on several processes: the numbers of one process with one thread; what is there is left alone; a worker that
dies is said."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from workbench import cli, storage
from workbench.experiment.pool import (
    CONTEXT,
    LEAST,
    Pool,
    fitting,
    fitting_on,
    free_cores,
    free_memory,
    number_of_workers,
    peak_memory,
)
from workbench.experiment.road import run_recipe
from workbench.experiment.runs import RunFolder
from workbench.patching.engine.chunks import MEMORY
from workbench.patching.execution import Execution
from workbench.study.config import read_study
from workbench.study.grid import Study
from workbench.study.launch import run_in_processes
from workbench.study.summary import summarise

CONDITIONS = ["base", "circuit_ce_cka"]


@pytest.fixture
def recipe(small_recipe: Callable[..., Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(conditions=CONDITIONS)))
    return path


def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_two_workers_give_the_bits_of_none(recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tests compute with one thread, as workers do; what a worker found is said here."""
    one, two = tmp_path / "one", tmp_path / "two"
    run_recipe(recipe, one)
    with caplog.at_level("INFO"):
        assert cli.main(["evaluate", "--recipe", str(recipe), "--out", str(two), "--workers", "2"]) == 0
    for name in ("teacher", "student"):
        assert caplog.text.count(f"{name}: circuit of ") == 1
        assert re.search(rf"{name}: \d+ of \d+ heads alone", caplog.text)
    assert rows(one) == rows(two)
    for condition in CONDITIONS[1:]:
        first, second = (RunFolder(out).condition(condition, 0) for out in (one, two))
        assert (first / "log.jsonl").read_text() == (second / "log.jsonl").read_text()
        assert storage.sha256(first / "student/model.safetensors") == storage.sha256(
            second / "student/model.safetensors"
        )
    untouched = {path: path.stat().st_mtime_ns for path in two.rglob("result.json")}
    run_recipe(recipe, two, resume=True, workers=2)
    assert {path: path.stat().st_mtime_ns for path in two.rglob("result.json")} == untouched


@pytest.mark.slow
@pytest.mark.lengthy
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_study_whose_worker_dies_ends_with_the_bits_of_none(
    small_recipe: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, path, me = tmp_path / "base.yaml", tmp_path / "study.yaml", psutil.Process()
    recipe = small_recipe()
    student = recipe.pop("student")
    recipe["data"]["validation_scenes"], recipe["training"]["evaluate_every"] = 2, recipe["training"]["steps"]
    base.write_text(yaml.safe_dump({key: recipe[key] for key in recipe if key not in ("conditions", "seeds")}))
    plain = {"recipe": str(base), "students": {"one": {"source": student}}, "train_scenes": [8], "weights": [1.0]}
    path.write_text(yaml.safe_dump({**plain, "seeds": [0], "conditions": CONDITIONS, "anew": []}))
    before = {child.pid for child in me.children(recursive=True)}

    def kill_the_first() -> None:
        for _ in range(1200):
            workers = [
                child
                for child in me.children()
                if child.pid not in before and "spawn_main" in " ".join(child.cmdline())
            ]
            if workers:
                os.kill(workers[0].pid, signal.SIGKILL)
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=kill_the_first)
    watcher.start()
    shared = Study(read_study(path), tmp_path / "shared")
    shared.begin(resume=False)
    with caplog.at_level("WARNING"):
        run_in_processes(shared, 2)
    watcher.join()
    assert re.search(r"a worker died \(out of memory, or killed\); its (model|trial) goes on", caplog.text)
    alone = Study(read_study(path), tmp_path / "alone")
    alone.begin(resume=False)
    alone.run()
    assert summarise(shared) == summarise(alone)
    place = "one/scenes-8/conditions"
    logs = [sorted((tmp_path / out / place).glob("*/log.jsonl")) for out in ("shared", "alone")]
    assert len(logs[0]) == len(CONDITIONS) - 1
    assert [file.read_text() for file in logs[0]] == [file.read_text() for file in logs[1]]


def test_workers_are_as_many_as_memory_has_room_for(caplog: pytest.LogCaptureFixture) -> None:
    free = free_memory()
    assert free is None or 2**20 < free < 2**50
    assert fitting(2, 1) == 2
    if free is not None:
        assert fitting(10, free) == 1, "one at least, though it is tight"
        assert "1 of 10 workers" in caplog.text
    assert peak_memory() >= LEAST


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_that_is_none_is_refused_at_once(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--recipe", "demo", "--out", "x", f"--workers={number}"])
    assert "1 or more, or auto" in capsys.readouterr().err


def test_there_is_always_a_core() -> None:
    assert 1 <= free_cores() <= (os.cpu_count() or 1)


def test_processes_are_kept_from_wave_to_wave() -> None:
    seen: list[int] = []

    def tell(_: int, worker: int) -> None:
        seen.append(worker)

    with Pool(workers=1) as pool:
        for _ in range(2):
            pool.run(os.getpid, [(), ()], tell)
    assert len(set(seen)) == 1
    assert os.getpid() not in seen
    pool.run(os.getpid, [()], tell)
    assert len(set(seen)) == 2


def test_an_accelerator_is_not_asked_for_where_there_is_none() -> None:
    assert fitting_on("cpu", 12) == 12
    assert number_of_workers("auto", "cuda") is None, "how many a device has room for is the user's to say"
    assert number_of_workers(3, "cuda") == 3


class Card:
    """What torch says of an accelerator of 10 GB, of which this process has held 1.4 at most."""

    @staticmethod
    def max_memory_reserved(_: str) -> int:
        return 2000 * 2**20 - CONTEXT

    @staticmethod
    def mem_get_info(_: object) -> tuple[int, int]:
        return 9000 * 2**20, 10240 * 2**20


def test_as_many_workers_as_an_accelerator_has_memory_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Card)
    assert fitting_on("cuda:0", 3) == 3
    with caplog.at_level("WARNING"):
        assert fitting_on("cuda:0", 12) == 4
    assert "4 of 12 workers: each needs about 2.1 GB on cuda:0, and 9.4 GB are free" in caplog.text
    assert Execution().memory_on(torch.device("cuda:0")) == 640 * 2**20
    assert Execution(memory=5).memory_on(torch.device("cuda:0")) == 5
    assert Execution().memory_on(torch.device("cpu")) == MEMORY
