"""Learning rates that validation prompts choose, each condition its own: the choice by hand on made-up accuracies, and
a small study in waves."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from workbench.study.choice import Point, choose, method_points, other_points
from workbench.study.config import StudyConfig, read_study
from workbench.study.grid import Study
from workbench.study.launch import Trial, run_in_waves
from workbench.study.summary import summarise, text

CONDITIONS = ("base", "full_ce", "circuit_ce_random_cka", "circuit_ce_cka")


@pytest.fixture
def config() -> StudyConfig:
    return StudyConfig(
        recipe="demo",
        students={},
        train_scenes=(6,),
        weights=(0.1, 1.0),
        learning_rates=(1e-3, 1e-2),
        validation_seeds=(7, 8),
        seeds=(1,),
        conditions=CONDITIONS,
    )


def test_each_condition_has_the_rate_of_its_own_highest_mean(config: StudyConfig) -> None:
    accuracies = {
        ("circuit_ce_cka", 0.1, 1e-3): [0.2, 0.4],
        ("circuit_ce_cka", 0.1, 1e-2): [0.9, 0.1],
        ("circuit_ce_cka", 1.0, 1e-3): [0.3, 0.5],
        ("circuit_ce_cka", 1.0, 1e-2): [0.7, 0.7],
        ("full_ce", 0.1, 1e-3): [0.6, 0.5],
        ("full_ce", 0.1, 1e-2): [0.1, 0.9],
        ("circuit_ce_random_cka", 1.0, 1e-3): [0.5, 0.5],
        ("circuit_ce_random_cka", 1.0, 1e-2): [0.5, 0.5],
    }
    choice = choose(config, CONDITIONS, lambda point: accuracies[point.condition, point.weight, point.rate])  # pyright: ignore[reportArgumentType]
    assert choice["weight"] == 1.0
    assert choice["validation_accuracy"] == {"0.1": [0.9, 0.1], "1.0": [0.7, 0.7]}, "of each lambda at its best rate"
    assert choice.get("learning_rates") == {"circuit_ce_cka": 1e-2, "full_ce": 1e-3, "circuit_ce_random_cka": 1e-3}
    assert choice.get("learning_rate_accuracy", {})["full_ce"] == {"0.001": [0.6, 0.5], "0.01": [0.1, 0.9]}


def test_what_has_no_alignment_waits_for_nothing(config: StudyConfig) -> None:
    now = list(other_points(config, CONDITIONS, None))
    assert {point.condition for point in now} == {"full_ce"}
    later = list(other_points(config, CONDITIONS, 1.0))
    assert {(point.condition, point.weight) for point in later} == {("full_ce", 0.1), ("circuit_ce_random_cka", 1.0)}
    assert len(method_points(config)) == 4


def test_rates_need_validation_seeds_and_no_best(config: StudyConfig) -> None:
    with pytest.raises(ValidationError, match="without `validation_seeds`"):
        replace(config, weights=(1.0,), validation_seeds=())
    with pytest.raises(ValidationError, match="give those conditions to the students"):
        replace(config, best=("circuit_ce_random_cka",))


@pytest.fixture
def begun(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Study]:
    """A small study, prepared, with settings of its recipe and of its own."""

    def begin(recipe: dict[str, Any], **own: Any) -> Study:
        base = {
            "teacher": str(model_folder("llama", seed=1)),
            "data": {
                "boxes": 3,
                "reference_scenes": 4,
                "discovery_scenes": 4,
                "test_scenes": 5,
                "validation_scenes": 3,
            },
            "discovery": {"method": "mean_ablation", "selection": "top", "heads": 2},
            "training": {"steps": 2, "batch": 6, "evaluate_every": 2},
            "evaluation": {"random_circuits": 1, "curve": False},
            "save_students": False,
        }
        value = {
            "recipe": str(tmp_path / "base.yaml"),
            "students": {"short": {"source": str(model_folder("llama", seed=2, layers=2))}},
            "train_scenes": [6],
            "weights": [0.5],
            "seeds": [1],
            "conditions": ["circuit_ce", "circuit_ce_random_cka", "circuit_ce_cka"],
        }
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base | recipe))
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(value | own))
        study = Study(read_study(tmp_path / "study.yaml"), tmp_path / "study")
        study.begin(resume=False)
        study.prepare()
        return study

    return begin


def rate_of(study: Study, condition: str) -> float:
    """The learning rate that a training's log says."""
    log = study.path / "short/scenes-6/conditions" / f"{condition}-1" / "log.jsonl"
    return json.loads(log.read_text().splitlines()[0])["learning_rate"]


def test_where_none_is_chosen_the_recipes_own_rates_stay(begun: Callable[..., Study]) -> None:
    study = begun({"learning_rates": {"full_ce": 0.25}}, conditions=["full_ce", "circuit_ce"])
    study.run()
    assert (rate_of(study, "full_ce"), rate_of(study, "circuit_ce")) == (0.25, 1e-3)


def test_a_study_trains_every_condition_at_its_own_rate(begun: Callable[..., Study]) -> None:
    """In waves of trials that don't wait for each other, after which nothing is left to be chosen or trained; the log
    of each training says its rate."""
    study, sizes = begun({}, learning_rates=[1e-3, 0.3], validation_seeds=[7]), []

    def run_all(trials: Sequence[Trial]) -> None:
        sizes.append(len(trials))
        for trial in trials:
            study.run_trial(trial.student, trial.scenes, trial.condition, trial.seed, at=trial.at)

    run_in_waves(study, run_all)
    assert sizes == [4, 2, 3, 0]
    summary = summarise(study)
    (cell,) = summary["cells"]
    chosen, tried = cell["learning_rates"], cell["learning_rate_accuracy"]
    assert set(chosen) == set(study.config.conditions)
    for condition, rate in chosen.items():
        assert tried[condition][str(rate)] == max(tried[condition].values())
        assert rate_of(study, condition) == rate
    assert "learning rates chosen on validation prompts" in text(summary)
    assert not list(study.path.glob("*/*/weight-*/**/result.json")), "no choice sees a test prompt"


def test_a_point_has_a_folder_of_its_own() -> None:
    folders = {
        Point(condition="full_ce", weight=weight, rate=rate).folder for weight in (0.1, 1.0) for rate in (None, 1e-3)
    }
    assert folders == {"weight-0.1", "weight-1", "weight-0.1-rate-0.001", "weight-1-rate-0.001"}
