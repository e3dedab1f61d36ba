"""A run folder's results are of that run: another's, under whatever name they lie there, are refused and not taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from workbench.circuits.circuit import Circuit
from workbench.cli import main
from workbench.experiment.conditions import TITLES
from workbench.experiment.runs import RunFolder
from workbench.matching.head_map import HeadMap
from workbench.models.sources import quiet

Made = dict[str, Path]


@pytest.fixture(scope="module")
def made(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A finished run of two conditions and seeds, and another with other models, with what they were made from."""
    place = tmp_path_factory.mktemp("whose")
    models = place / "models"
    for name, seed, layers in (("teacher", 1, 3), ("student", 2, 2), ("other", 5, 3)):
        shutil.copytree(model_folder("llama", seed=seed, layers=layers), models / name)
    recipe = {
        "teacher": str(models / "teacher"),
        "student": str(models / "student"),
        "data": {
            "options": {"boxes": 3},
            "reference_scenes": 4,
            "discovery_scenes": 4,
            "train_scenes": 6,
            "test_scenes": 5,
        },
        "discovery": {"heads": 2, "least_effect": 0.0, "confidence": 0.01},
        "training": {"steps": 2, "batch": 6, "checkpoint_every": 1},
        "evaluation": {"random_circuits": 1, "curve": False},
        "conditions": ["full_ce", "circuit_ce_cka"],
        "seeds": [0, 1],
    }
    patch = pytest.MonkeyPatch()
    patch.setenv("WORKBENCH_CACHE", str(place / "cache"))
    found = {"place": place, "models": models}
    for name, teacher in (("run", "teacher"), ("other", "other")):
        file = place / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**recipe, "teacher": str(models / teacher)}))
        assert main(["evaluate", "--recipe", str(file), "--out", str(place / name)]) == 0
        found |= {name: place / name, f"{name} recipe": file}
    patch.undo()
    return found


@pytest.fixture
def again(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A copy of the run, and what resuming it says."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(made["place"] / "cache"))
    out = tmp_path / "run"
    shutil.copytree(made["run"], out)
    for note in out.rglob(".*.sha256"):  # they would notice every copied file first; here it is asked whose it is
        note.unlink()

    def resumed(command: str = "evaluate", recipe: str = "run recipe", *words: str) -> tuple[int, str]:
        code = main([command, "--recipe", str(made[recipe]), "--out", str(out), "--resume", *words])
        return code, capsys.readouterr().err

    return out, resumed


def test_a_conditions_student_says_what_it_is_of(made: Made) -> None:
    """Its card: the recipe (without where the models lay) and the table of its seed; the circuits and the head map that
    it was aligned by are files beside it."""
    run = RunFolder(made["run"])
    for condition, aligned in (("full_ce", False), ("circuit_ce_cka", True)):
        student = run.condition(condition, 1) / "student"
        text = str(ModelCard.load(student / "README.md").text)
        for words in ("## Recipe", "teacher: teacher\n", "## Results", f"| {TITLES[condition]} | 1 |"):
            assert words in text, words
        assert str(made["models"]) not in text
        assert f"| {TITLES[condition]} | 0 |" not in text
        for name in ("student", "teacher"):
            assert Circuit.load(student, f"{name}_circuit.json") == run.circuit(name)
        assert (student / HeadMap.FILE).exists() == aligned
    assert HeadMap.load(student) == run.head_map()


def test_nothing_changed_is_taken_as_it_is(again: Any) -> None:
    out, resumed = again
    before = (out / "results.json").read_bytes()
    assert resumed() == (0, "")
    assert (out / "results.json").read_bytes() == before
    rows = json.loads(before)
    assert {row["origin"]["condition"] for row in rows} == {"full_ce", "circuit_ce_cka", "teacher"}


def test_a_conditions_folder_under_anothers_name(again: Any) -> None:
    out, resumed = again
    shutil.rmtree(out / "conditions" / "circuit_ce_cka-0")
    shutil.copytree(out / "conditions" / "full_ce-0", out / "conditions" / "circuit_ce_cka-0")
    code, said = resumed()
    assert code == 2
    assert "condition full_ce, not circuit_ce_cka" in said


def test_a_row_of_another_seed(again: Any) -> None:
    out, resumed = again
    shutil.copy(out / "conditions" / "full_ce-0" / "result.json", out / "conditions" / "full_ce-1" / "result.json")
    code, said = resumed()
    assert code == 2
    assert "seed 0, not 1" in said


def test_outcomes_of_another_seed(again: Any) -> None:
    out, resumed = again
    name = "outcomes.safetensors"
    shutil.copy(out / "conditions" / "full_ce-0" / name, out / "conditions" / "full_ce-1" / name)
    code, said = resumed()
    assert code == 2
    assert "outcomes.safetensors is not of this run: seed 0, not 1" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conditions/full_ce-0/result.json", "another teacher"),
        ("circuits/teacher.json", "another weights"),
        ("head_map.json", "another teacher circuit"),
    ],
)
def test_results_of_another_run(made: Made, again: Any, name: str, message: str) -> None:
    out, resumed = again
    shutil.copy(made["other"] / name, out / name)
    code, said = resumed()
    assert code == 2
    assert message in said


def test_scores_of_another_run(made: Made, again: Any) -> None:
    out, resumed = again
    (out / "circuits" / "teacher.json").unlink()
    shutil.copy(made["other"] / "scores" / "teacher-path-A.safetensors", out / "scores" / "teacher-path-A.safetensors")
    assert resumed("discover")[0] == 2


def test_a_checkpoint_of_another_condition(again: Any) -> None:
    out, resumed = again
    target = out / "conditions" / "full_ce-1"
    for file in ("result.json", "training.json"):
        (target / file).unlink()
    shutil.copy(out / "conditions" / "full_ce-0" / "checkpoint.safetensors", target / "checkpoint.safetensors")
    code, said = resumed()
    assert code == 2
    assert "here: seed" in said


def test_a_log_shorter_than_its_training(again: Any) -> None:
    out, resumed = again
    target = out / "conditions" / "full_ce-1"
    (target / "result.json").unlink()
    (target / "log.jsonl").write_text("")
    code, said = resumed()
    assert code == 2
    assert "holds 0 of the 2 steps" in said
    assert (target / "log.jsonl").read_text() == ""


def test_weights_that_have_changed_since(made: Made, again: Any) -> None:
    """A teacher alone, whose circuit would else be kept."""
    _, resumed = again
    teacher = made["models"] / "teacher"
    kept = (teacher / "model.safetensors").read_bytes()
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(teacher)
            with torch.no_grad():
                model.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
            model.save_pretrained(teacher)
        code, said = resumed("discover")
    finally:
        (teacher / "model.safetensors").write_bytes(kept)
    assert code == 2
    assert "teacher.json is not of this run: another weights" in said


def test_rows_from_before_origins_are_taken(again: Any) -> None:
    out, resumed = again
    for file in out.glob("conditions/*/result.json"):
        row = json.loads(file.read_text())
        del row["origin"]
        file.write_text(json.dumps(row))
    for file in (*out.glob("circuits/*.json"), out / "head_map.json"):
        value = json.loads(file.read_text())
        value.pop("origin", None)
        file.write_text(json.dumps(value))
    assert resumed() == (0, "")
