"""A study over a local Ray of two workers: the sequential study's numbers to the bit, also when a worker dies; finished
trials are not run again."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ModelFolder

from workbench import storage
from workbench.cli import main
from workbench.errors import InputError
from workbench.study.config import read_study
from workbench.study.grid import Study
from workbench.study.launch import Trial, arms, choices, run_trial

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small study as a file; thresholds at 0 so that circuits are found in noise."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    base = {
        "teacher": str(model_folder("llama", seed=1)),
        "data": {
            "boxes": 3,
            "reference_scenes": 4,
            "discovery_scenes": 4,
            "train_scenes": 6,
            "validation_scenes": 2,
            "test_scenes": 5,
        },
        "discovery": {"heads": 2, "least_effect": 0.0, "confidence": 0.01},
        "training": {"steps": 4, "batch": 6, "checkpoint_every": 2, "evaluate_every": 2},
        "evaluation": {"random_circuits": 1, "curve": False},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "recipe": str(tmp_path / "base.yaml"),
        "students": {"short": {"source": str(model_folder("llama", seed=2, layers=2))}},
        "train_scenes": [6],
        "weights": [0.1, 1.0],
        "validation_seeds": [7],
        "seeds": [1, 2],
        "conditions": ["base", "circuit_ce", "circuit_ce_random_cka", "circuit_ce_cka"],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def on_ray(recipe: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "workbench.cli",
        "study",
        "--recipe",
        str(recipe),
        "--out",
        str(out),
        "--threads",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["RAY_worker_niceness"] = "0"  # at Ray's own 15 they hardly run where other tests are at work
    environment.pop("RAY_ADDRESS", None)
    command += ["--launcher", "ray", "--workers", "2", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def kill_a_worker(driver: int) -> bool:
    """Kill the first process of the driver's Ray that is at work on a trial (Ray names it so; its own agents are
    `ray::` too, and must live)."""
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "ray::_remote" in " ".join(process.cmdline()):
                process.kill()
                return True
        except psutil.Error:
            continue
    return False


def files(out: Path) -> dict[str, Any]:
    """What the trainings left: results, outcomes and students' weights, by name."""
    found: dict[str, Any] = {
        str(path.relative_to(out)): storage.read_json(path) for path in sorted(out.rglob("*result*.json"))
    }
    for path in sorted(
        out.rglob("*.safetensors")
    ):  # not byte by byte: the order of its metadata is left to chance; `repr`, as NaN is not NaN
        if "checkpoint" not in path.name:
            tensors, described = storage.read_tensors(path)
            found[str(path.relative_to(out))] = (
                described,
                {key: (str(value.dtype), repr(value.tolist())) for key, value in sorted(tensors.items())},
            )
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
def test_a_study_on_ray_is_the_sequential_one(recipe: Path, tmp_path: Path) -> None:
    """Two waves of two trials, so that both workers are at work in each: the choice of lambda, then the arms."""
    few = {**yaml.safe_load(recipe.read_text()), "seeds": [1], "conditions": ["base", "circuit_ce_cka"]}
    recipe.write_text(yaml.safe_dump(few, sort_keys=False))
    assert main(["study", "--recipe", str(recipe), "--out", str(tmp_path / "one"), "--threads", "1"]) == 0
    driver, killed = on_ray(recipe, tmp_path / "ray"), False
    while driver.poll() is None and not killed:
        killed = kill_a_worker(driver.pid)
        time.sleep(0.1)
    shown, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, shown[-3000:]
    assert killed, "a worker died on the way"
    assert storage.read_json(tmp_path / "ray" / "summary.json") == storage.read_json(tmp_path / "one" / "summary.json")
    one, other = files(tmp_path / "one"), files(tmp_path / "ray")
    assert one.keys() == other.keys()
    assert len(one) > 20
    assert [name for name, value in one.items() if other[name] != value] == []
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").rglob("log.jsonl")}
    study = Study(read_study(recipe), tmp_path / "ray")
    assert not [*choices(study), *arms(study)], "nothing is left to do"
    assert main(["study", "--recipe", str(recipe), "--out", str(tmp_path / "ray"), "--resume", "--threads", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in logs} == logs


@pytest.mark.lengthy
def test_trials_by_hand_in_another_order_are_the_sequential_study(recipe: Path, tmp_path: Path) -> None:
    """What Ray relies on, without Ray: a trial is a function of its name. Each is done by a study opened anew, last
    ones first."""
    whole = Study(read_study(recipe), tmp_path / "one")
    whole.begin(resume=False)
    whole.run()
    study = Study(read_study(recipe), tmp_path / "other")
    study.begin(resume=False)
    with pytest.raises(InputError, match="workbench match"):
        run_trial(study.path, Trial(student="short", scenes=6, condition="circuit_ce", seed=1))
    study.prepare()
    with pytest.raises(InputError, match="has not been chosen"):
        run_trial(study.path, Trial(student="short", scenes=6, condition="circuit_ce", seed=1))
    for wave, count in ((choices, 2), (arms, 7)):
        trials = list(wave(study))
        assert len(trials) == count
        for trial in reversed(trials):
            run_trial(study.path, trial)
        study.choose()
        assert list(wave(study)) == []
    study.run()
    assert files(study.path) == files(whole.path)


def test_ray_that_is_not_there(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    assert main(["study", "--recipe", str(recipe), "--out", str(tmp_path / "none"), "--launcher", "ray"]) == 2
    assert "[ray]" in capsys.readouterr().err
