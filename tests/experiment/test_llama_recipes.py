"""The recipes of the paper's Llama runs from end to end on random miniatures of the same architecture, and what their
plans say.

Miniature: the bundled config of each model (rope scaling `llama3`, grouped-query attention, tied or untied embeddings
as in the original) with two layers and little width, and a byte-pair tokenizer trained here on the tasks' own prompts,
with BOS, special tokens and a chat template as Llama has them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, PreTrainedTokenizerFast

from docs import full_size, tables
from docs.full_size import SPECIAL, byte_pairs, random_model
from workbench import storage
from workbench.cli import main
from workbench.distillation.reports import read_log
from workbench.experiment.recipe import RECIPES, read_recipe
from workbench.models.hooked_model import Student, Teacher
from workbench.plan.road import plan_of

NAMES = sorted(path.stem for path in RECIPES.glob("runs/llama3_*.yaml"))
ONE_OF_THEM = [NAMES[0], *(pytest.param(name, marks=pytest.mark.lengthy) for name in NAMES[1:])]
SMALL = {
    "device": "cpu",
    "data.reference_scenes": 2,
    "data.discovery_scenes": 2,
    "data.train_scenes": 4,
    "data.validation_scenes": 1,
    "data.test_scenes": 2,
    "discovery.heads": 3,
    "discovery.least_effect": 0.0,
    "discovery.confidence": 0.01,
    "matching.resamples": 0,
    "training.steps": 2,
    "training.batch": 4,
    "training.evaluate_every": 1,
    "training.checkpoint_every": 1,
    "training.learning_rate": 1e-2,
    "evaluation.random_circuits": 1,
    "evaluation.curve": False,
}
THEORY_OF_MIND = {
    "data.reference_scenes": 12,
    "data.discovery_scenes": 8,
    "data.train_scenes": 8,
    "data.validation_scenes": 4,
    "data.test_scenes": 8,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 3's."""
    return byte_pairs()


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """`miniature("meta-llama/Llama-3.2-1B")` -> a directory with random weights."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            small = {
                "hidden_size": 64,
                "head_dim": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "intermediate_size": 96,
                "vocab_size": len(tokenizer),
            }
            folder = tmp_path_factory.mktemp("miniature")
            made[name] = random_model(
                name, folder, device="cpu", dtype=torch.float32, seed=len(made) + 1, initializer_range=0.1, **small
            )
        return made[name]

    return make


@pytest.mark.parametrize("name", ONE_OF_THEM)
def test_a_recipe_from_end_to_end(
    name: str,
    miniature: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    recipe, out = read_recipe(name), tmp_path / "run"
    assert recipe.student is not None
    settings: dict[str, Any] = {**SMALL, **(THEORY_OF_MIND if recipe.data.task == "theory_of_mind" else {})}
    settings |= {"teacher": str(miniature(recipe.teacher)), "student": str(miniature(recipe.student))}
    words = [
        "evaluate",
        "--recipe",
        name,
        "--out",
        str(out),
        *(f"--set={key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in settings.items()),
    ]
    assert main(words) == 0, capsys.readouterr().err
    assert main(["report", "--out", str(out)]) == 0
    rows = {row["condition"]: row for row in json.loads((out / "results.json").read_text())}
    assert set(rows) == {*recipe.conditions, "teacher"}
    reports = read_log(out / "conditions" / "circuit_ce_cka-0" / "log.jsonl")
    assert len(reports) == 2
    assert all(
        report.alignment_loss is not None and report.task_loss is not None and report.accuracy is not None
        for report in reports
    )
    assert reports[1].loss != reports[0].loss
    assert 0 < rows["circuit_ce_cka"]["trained_parameters"] == rows["circuit_ce"]["trained_parameters"]
    assert rows["circuit_ce_cka"]["trained_fraction"] < 1
    shards = list((tmp_path / "cache").rglob("00000.safetensors"))
    assert shards, "the teacher's outputs are on disk"
    assert all(storage.read_tensors(file)[0]["logits"].dtype == torch.bfloat16 for file in shards)
    assert (out / "report.html").stat().st_size > 1000


@pytest.mark.slow
def test_the_run_at_full_size_on_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage is timed, and stands beside what the plan of the same recipe says."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(full_size, "SMALL", full_size.SMALL | {name: SMALL[name] for name in SMALL if "." in name})
    sizes = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 4000}
    full_size.main(tmp_path, device="cpu", sizes=sizes, result=tmp_path / "result.json")
    found = storage.read_json(tmp_path / "result.json")
    assert {f"train {name}" for name in full_size.CONDITIONS} <= set(found["seconds"]) & set(found["operations"])
    assert all(value > 0 for value in (*found["seconds"].values(), *found["operations"].values()))
    assert found["bytes"] is None, "there is no accelerator"
    assert found["circuits"]["teacher"] > 0


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"])
def test_a_miniature_is_of_the_originals_kind(name: str, miniature: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(miniature(name))
    assert config.model_type == "llama"
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.tie_word_embeddings == ("3.2" in name)
    model = Student.load(miniature(name))
    assert model.n_kv_heads < model.n_heads
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(SPECIAL[0])


def test_a_teacher_in_half_precision_is_the_same_teacher(miniature: Callable[[str], Path]) -> None:
    """To bfloat16's rounding, and more than rounding apart from another model."""
    full, half = (Teacher.load(miniature("meta-llama/Llama-3.1-8B"), dtype=dtype) for dtype in ("float32", "bfloat16"))
    other = Teacher.load(miniature("meta-llama/Llama-3.2-1B"))
    tokens, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.bool)
    logits = [model.final_logits(tokens, mask).float() for model in (full, half, other)]
    error, effect = (float((logits[0] - each).abs().max()) for each in logits[1:])
    assert error < 0.05 * float(logits[0].abs().max()) < effect


@pytest.mark.parametrize("name", ONE_OF_THEM)
def test_the_plan_fits_one_accelerator(name: str) -> None:
    """80 GB, with the teacher resident; the circuit is within the paper's 11 to 15 % of the heads."""
    plan = tables.planned(name)
    assert plan["total"]["memory"] < 80e9
    student = plan["models"][1]
    assert 0.11 <= student["trained_heads"] / student["heads"] <= 0.15
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert stages["train circuit_ce_cka"]["what"].startswith("1 x 3500 steps")
    assert 0 < sum(stage["operations"] for stage in plan["stages"]) == plan["total"]["operations"]


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    small = {"data.train_scenes": 30, "data.validation_scenes": 10, "data.test_scenes": 10}
    assert main(["plan", NAMES[0], "--json", *(f"--set={key}={value}" for key, value in small.items())]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(json.dumps(plan_of(NAMES[0], overrides=small).to_json()))
    assert shown != tables.planned(NAMES[0]), "it is of the recipe as it was changed"


def test_the_page_of_costs_is_what_the_plans_say() -> None:
    """Here and not beside the other tables: each plan takes twenty seconds, and is made once in a process."""
    page = tables.ROOT / "docs/guides/what_a_run_costs.md"
    assert tables.filled(page.read_text()) == page.read_text(), "make tables"


def test_a_live_teacher_costs_operations_and_no_disk() -> None:
    overrides = {"data.train_scenes": 30, "data.test_scenes": 10}
    shards = plan_of("llama3_1b_entity", overrides=dict(overrides))
    live = plan_of(
        "llama3_1b_entity",
        overrides={**overrides, "teacher_outputs": "live"},
        flops=2 * shards.flops,
        utilisation=shards.utilisation / 2,
    )
    assert live.disk < shards.disk
    assert live.operations > shards.operations
    assert live.hours(live.operations) / live.operations == pytest.approx(
        shards.hours(shards.operations) / shards.operations
    )


def test_plans_of_studies_and_what_a_plan_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "study_entity", "--set", "train_scenes=[3, 6]", "--set", "seeds=[10, 11]"]) == 0
    shown = capsys.readouterr().out
    assert "sibling, 3 scenes: choose lambda" in shown
    assert "6 x 80 steps" in shown, "three weights on two validation seeds"
    assert "2 x 80 steps" in shown
    assert main(["plan", "demo", "--set", "teacher=owner/unheard-of"]) == 2
    assert "--config owner/unheard-of=DIRECTORY" in capsys.readouterr().err
    assert (
        main(
            ["plan", "demo", "--set", "teacher=owner/unheard-of", "--config", "owner/unheard-of=assets/models/teacher"]
        )
        == 0
    )
    assert main(["plan", "demo", "--config", str(tmp_path)]) == 2
    assert main(["plan", "demo", "--utilisation", "2"]) == 2
