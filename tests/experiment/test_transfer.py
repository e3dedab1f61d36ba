"""Transfer: the table's numbers are those of the saved students, asked again on the other task's prompts by a plain
loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from workbench.experiment import Run
from workbench.experiment.arms import run_arms
from workbench.experiment.match import match
from workbench.experiment.recipe import parse_recipe
from workbench.experiment.runs import RunFolder
from workbench.experiment.transfer import read_outcomes, transfer_table, transfer_text
from workbench.models.sources import quiet
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import task_dataset
from workbench.tasks.entity_tracking import EntityTracking
from workbench.values.statistics import mean_interval

OTHER = {"task": "entity_tracking", "options": {"boxes": 4}, "scenes": 6, "seed": 3}


@pytest.fixture
def experiment(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    recipe: dict[str, Any] = {
        "teacher": str(model_folder("llama", seed=1)),
        "student": str(model_folder("llama", seed=2, layers=2)),
        "data": {"boxes": 3, "reference_scenes": 4, "discovery_scenes": 4, "test_scenes": 5},
        "discovery": {"heads": 2, "least_effect": 0.0, "confidence": 0.01},
        "training": {"steps": 12, "batch": 6, "learning_rate": 0.02},
        "evaluation": {"random_circuits": 1, "curve": False, "transfer": [OTHER]},
    }
    made = Run(parse_recipe(recipe), RunFolder(tmp_path / "run"))
    made.begin(resume=False)
    return made


def asked_again(folder: Path) -> float:
    """Accuracy on the other task, prompt by prompt, without this package's forwards."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = word_tokenizer()
    rows = task_dataset(EntityTracking(boxes=4), tokenizer, split="test", scenes=6, seed=3)
    with torch.no_grad():
        said = [
            model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].argmax().item()
            for text in rows["clean"][:]
        ]
    return sum(
        tokenizer.convert_ids_to_tokens(token) == answer.strip()
        for token, answer in zip(said, rows["answer"][:], strict=True)
    ) / len(said)


def test_accuracy_on_another_task(experiment: Run) -> None:
    match(experiment)
    run_arms(experiment, [("base", 0), ("full_ce", 0), ("full_ce", 1)])
    folders = {
        name: [experiment.folder.condition(name, seed) for seed in seeds]
        for name, seeds in {"base": [0], "full_ce": [0, 1], "teacher": [0]}.items()
    }
    found = transfer_table({name: read_outcomes(paths) for name, paths in folders.items()})["entity_tracking"]
    again = [asked_again(folder / "student") for folder in folders["full_ce"]]
    before = asked_again(Path(str(experiment.recipe.student)))
    assert found["full_ce"]["accuracy"] == mean_interval(again).to_json()
    assert found["base"]["accuracy"]["mean"] == pytest.approx(before)
    assert found["base"]["change"]["over_seeds"]["mean"] == 0.0
    assert found["full_ce"]["change"]["over_seeds"]["mean"] == pytest.approx(sum(again) / 2 - before)
    assert found["full_ce"]["change"]["only_first"] + found["full_ce"]["change"]["only_second"] > 0, (
        "training changed some answers"
    )
    assert "full / CE" in transfer_text({"entity_tracking": found})


def test_nothing_is_told_where_nothing_was_asked(tmp_path: Path) -> None:
    assert read_outcomes([tmp_path]) == []
    assert transfer_table({}) == {}
