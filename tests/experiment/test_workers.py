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
import yaml

from workbench import cli, storage
from workbench.experiment.pool import LEAST, fitting, free_cores, free_memory, peak_memory
from workbench.experiment.road import run_recipe
from workbench.experiment.runs import RunFolder
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
def test_two_workers_give_the_bits_of_none(recipe: Path, tmp_path: Path) -> None:
    """The tests compute with one thread, as workers do."""
    one, two = tmp_path / "one", tmp_path / "two"
    run_recipe(recipe, one)
    assert cli.main(["evaluate", "--recipe", str(recipe), "--out", str(two), "--workers", "2"]) == 0
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
