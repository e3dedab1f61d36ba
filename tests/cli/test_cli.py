"""The commands from end to end on tiny models: run folder, resume after a kill, and bad input with its remedy."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from workbench.cli import main
from workbench.distillation.reports import read_log
from workbench.errors import InputError
from workbench.experiment import Run
from workbench.experiment.recipe import parse_config, parse_recipe, read_recipe, read_yaml, to_plain
from workbench.experiment.results import ConditionResult, collect, table
from workbench.experiment.runs import RunFolder
from workbench.patching.ablation import plain_logits
from workbench.pretraining.finetuning import FinetuningConfig
from workbench.study.config import read_study
from workbench.values.metrics import METRICS
from workbench.values.scores import Scores

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(small_recipe: Callable[..., Any], tmp_path: Path) -> Path:
    """A small recipe, under many conditions."""
    value = small_recipe(
        evaluation={"edges": 3},
        conditions=[
            "base",
            "full_ce",
            "circuit_ce",
            "circuit_cka",
            "circuit_ce_random_cka",
            "circuit_ce_cka",
            "full_kl",
            "full_ce_cka",
        ],
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def folder_edges(out: Path) -> int:
    """On how many prompts the edges of the circuits' graphs were measured."""
    counts = {RunFolder(out).scores(name)["edges"].values.shape[-1] for name in ("teacher", "student")}
    return counts.pop() if len(counts) == 1 else 0


def test_the_whole_road(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("demo", "--recipe", recipe, "--out", out) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    conditions = [row["condition"] for row in results]
    assert conditions == [
        "base",
        "full_ce",
        "circuit_ce",
        "circuit_cka",
        "circuit_ce_random_cka",
        "circuit_ce_cka",
        "full_kl",
        "full_ce_cka",
        "teacher",
    ]
    wanted = {
        "condition",
        "seed",
        "full_accuracy",
        "circuit_accuracy",
        "random_circuit_accuracy",
        "faithfulness",
        "mean_cka",
        "cka_floor",
        "trained_parameters",
        "steps",
    }
    assert all(wanted <= set(row) for row in results)
    trained = {row["condition"]: row["trained_parameters"] for row in results}
    assert (
        0
        == trained["base"]
        == trained["teacher"]
        < trained["circuit_ce"]
        == trained["circuit_ce_cka"]
        < trained["full_ce"]
    )
    assert "circuit / CE + CKA" in printed
    assert "whole answers" not in printed, "an answer is one token"
    page = (out / "report.html").read_text()
    assert "Plotly.react" in page
    assert len(page) < 10e6
    for heading in (
        "The circuit of the teacher",
        "Matching",
        "CKA of all pairs of circuit heads",
        "Impact of matched heads",
        "Training",
    ):
        assert f">{heading}</h2>" in page
    matrices = {
        row["condition"]: out / "conditions" / f"{row['condition']}-0" / "circuit_ckas.safetensors" for row in results
    }
    assert {name for name, file in matrices.items() if file.exists()} == set(conditions) - {"teacher"}
    base, aligned = (Scores.load(matrices[name]) for name in ("base", "circuit_ce_cka"))
    assert base.labels == aligned.labels
    assert (base.values - aligned.values).abs().max() > 1e-3, "training has moved them"
    assert folder_edges(out) == 3
    folder = RunFolder(out)
    assert folder.circuit("teacher").heads
    assert folder.head_map().matches
    assert {"path-A", "ablation-accuracy"} <= set(folder.scores("student"))
    assert not list(out.rglob("*.bin")) + list(out.rglob("*.pt")) + list(out.rglob("*.pkl"))
    assert (out / "conditions" / "circuit_ce_cka-0" / "student" / "model.safetensors").exists()
    before = (out / "results.json").read_bytes()
    assert run("demo", "--recipe", recipe, "--out", out) == 2
    assert "--resume" in capsys.readouterr().err
    assert run("demo", "--recipe", recipe, "--out", out, "--resume") == 0
    assert (out / "results.json").read_bytes() == before


def test_stages_one_by_one_equal_the_whole_road(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("evaluate", "--recipe", recipe, "--out", whole, "--set", "conditions=[circuit_ce_cka]") == 0
    setting = ["--recipe", recipe, "--out", parts, "--set", "conditions=[circuit_ce_cka]"]
    assert run("discover", *setting) == 0
    assert run("match", *setting, "--resume") == 0
    assert run("distill", *setting, "--resume", "--condition", "circuit_ce_cka") == 0
    assert run("report", "--out", parts) == 0
    assert (whole / "results.json").read_bytes() == (parts / "results.json").read_bytes()
    capsys.readouterr()
    assert run("match", "--recipe", recipe, "--out", parts, "--set", "training.steps=9", "--resume") == 2
    assert "another recipe" in capsys.readouterr().err


def test_whole_answers_are_in_the_table_where_answers_may_have_several_tokens(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of answers of one token, as here, the whole is preferred where its logit is the higher one."""
    out, setting = tmp_path / "run", {"conditions": ["base"], "data.multi_token": True}
    assert (
        run(
            "evaluate", "--recipe", recipe, "--out", out, "--set", "conditions=[base]", "--set", "data.multi_token=true"
        )
        == 0
    )
    assert "whole answers" in capsys.readouterr().out
    rows = {row.condition: row for row in collect(RunFolder(out))}
    experiment = Run(read_recipe(recipe, overrides=setting), RunFolder(out))
    for name, model in (("base", experiment.student), ("teacher", experiment.teacher)):
        test = experiment.prompts.test
        slow = float(
            (METRICS["logit_difference"](plain_logits(model, test), test.answers, test.distractors) > 0).float().mean()
        )
        assert 0 < slow < 1
        assert rows[name].whole_answers == pytest.approx(slow)
        assert rows[name].whole_accuracy == pytest.approx(rows[name].full_accuracy), "one token is the whole answer"


def test_training_settings_from_a_recipe(recipe: Path, tmp_path: Path) -> None:
    """Low-rank changes of the whole circuit, teacher from shards, early stopping on validation scenes; the table says
    what was done."""
    out = tmp_path / "run"
    setting = {
        "conditions": "[circuit_ce_cka]",
        "training.heads": "circuit",
        "training.lora_rank": 1,
        "teacher_outputs": "shards",
        "data.validation_scenes": 2,
        "training.evaluate_every": 1,
        "training.patience": 1,
        "training.restore_best": True,
        "training.steps": 30,
        "training.learning_rate": 1e-9,
        "training.accumulate": 2,
    }
    assert (
        run(
            "evaluate",
            "--recipe",
            recipe,
            "--out",
            out,
            *(word for key, value in setting.items() for word in ("--set", f"{key}={value}")),
        )
        == 0
    )
    folder = RunFolder(out)
    log = read_log(folder.condition("circuit_ce_cka", 0) / "log.jsonl")
    assert [report.accuracy is not None for report in log] == [True, True], "nothing gets better at this learning rate"
    row = next(row for row in collect(folder) if row.condition == "circuit_ce_cka")
    assert row.steps == 2
    matrices = {
        (head.layer, matrix, head.index // (2 if matrix in "kv" else 1))
        for head in folder.circuit("student").heads
        for matrix in "qkvo"
    }
    assert row.trained_parameters == len(matrices) * (32 + 8), (
        "rank 1: a row and a column of each matrix of the circuit's heads"
    )
    assert list((tmp_path / "cache" / "teacher").glob("*/index.json"))
    prompts = Run(read_recipe(recipe, overrides={**setting, "conditions": ["circuit_ce_cka"]}), folder).prompts
    assert prompts.validation is not None
    assert len(prompts.validation) == 2 * 3
    assert not prompts.validation.prompts() & (prompts.train.prompts() | prompts.test.prompts())


@pytest.mark.slow
def test_killed_for_real_and_resumed(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL in mid-training; the resumed run ends with the same student to the bit."""
    setting = [
        "--set",
        "conditions=[circuit_ce_cka]",
        "--set",
        "training.steps=16",
        "--set",
        "training.checkpoint_every=1",
    ]
    assert run("evaluate", "--recipe", recipe, "--out", tmp_path / "whole", *setting) == 0
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "workbench.cli",
        "evaluate",
        "--recipe",
        str(recipe),
        "--out",
        str(out),
        "--threads",
        "1",
        *setting,
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    state = out / "conditions" / "circuit_ce_cka-0" / "checkpoint.safetensors"
    deadline = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "conditions" / "circuit_ce_cka-0" / "result.json").exists(), "killed too late to show anything"
    assert run("evaluate", "--recipe", recipe, "--out", out, *setting, "--resume") == 0
    name = Path("conditions/circuit_ce_cka-0/student/model.safetensors")
    assert (tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes()
    assert (tmp_path / "whole/results.json").read_bytes() == (out / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trainning.steps": 4}, "unknown recipe key 'trainning'.*'training'"),
        ({"training.stepz": 4}, "unknown recipe key 'training.stepz'.*'steps'"),
        ({"training.steps": "many"}, "training.steps.*integer"),
        ({"matching.rule": "papr"}, "matching.rule.*'paper'"),
        ({"data.boxes": 12}, "recipe key data: .*3 to 9 boxes"),
    ],
)
def test_a_bad_recipe_key_is_named_with_the_nearest(recipe: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe(recipe, overrides=overrides)


def test_recipes(recipe: Path, tmp_path: Path) -> None:
    assert parse_recipe(to_plain(read_recipe(recipe))) == read_recipe(recipe)
    for bundled in (ROOT / "workbench" / "recipes").glob("*/*.yaml"):
        if bundled.parent.name == "accelerate":
            continue
        value = read_yaml(bundled.stem)
        if "model" in value:  # of `workbench finetune`
            assert parse_config(FinetuningConfig, value).task
            continue
        read: Callable[..., Any] = read_study if "students" in value else read_recipe
        assert read(bundled.stem).title
    with pytest.raises(InputError, match=r"neither a file nor a bundled recipe.*'demo'"):
        read_recipe("demoo")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(InputError, match="not a mapping"):
        read_recipe(tmp_path / "list.yaml")


def test_bad_input_exits_with_its_remedy(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: Any) -> str:
        assert run(*words) == 2
        return capsys.readouterr().err

    assert "not a run folder" in refused("report", "--out", tmp_path / "absent")
    out = tmp_path / "damaged"
    assert run("discover", "--recipe", recipe, "--out", out) == 0
    (out / "circuits" / "teacher.json").write_text("{half a")
    assert "damaged" in refused("match", "--recipe", recipe, "--out", out, "--resume")
    (out / "run.json").write_text("{half a")
    assert "damaged" in refused("match", "--recipe", recipe, "--out", out, "--resume")
    assert "no student" in refused("match", "--recipe", recipe, "--out", tmp_path / "a", "--set", "student=null")
    assert "neither a local path nor in the hub cache" in refused(
        "discover", "--recipe", recipe, "--out", tmp_path / "b", "--set", "teacher=nobody/nothing"
    )
    assert "KEY=VALUE" in refused("discover", "--recipe", recipe, "--out", tmp_path / "c", "--set", "teacher")


def test_own_pairs_by_mean_ablation(recipe: Path, tmp_path: Path) -> None:
    rows = [
        {
            "clean": f"The {a} is in Box F . Box F contains the",
            "corrupt": f"The {b} is in Box G . Box H contains the",
            "answer": f" {a}",
            "distractor": f" {b}",
        }
        for a, b in [("apple", "ball"), ("bag", "bell"), ("boat", "bomb"), ("bone", "book")]
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "data": {"pairs": str(tmp_path / "pairs.jsonl"), "reference": "corrupt"},
        "discovery": {"method": "mean_ablation", "heads": 3, "least_effect": 0.0, "confidence": 0.01},
    }
    value = {**yaml.safe_load(recipe.read_text()), **own, "student": None}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(value))
    assert run("discover", "--recipe", tmp_path / "own.yaml", "--out", tmp_path / "run") == 0
    folder = RunFolder(tmp_path / "run")
    top = folder.scores("teacher")["ablation-log_probability"].top(3, by="highest")
    assert set(folder.circuit("teacher").heads) <= set(top)


def test_results_round_trip_and_table() -> None:
    row = ConditionResult(
        condition="circuit_ce_cka",
        seed=0,
        full_accuracy=0.75,
        full_interval=(0.7, 0.8),
        circuit_accuracy=0.7,
        circuit_interval=(0.6, 0.8),
        random_circuit_accuracy=0.01,
        faithfulness=0.93,
        mean_cka=0.8,
        cka_floor=0.0,
        trained_parameters=1234,
        trained_fraction=0.1,
        steps=5,
        mcnemar={"full_ce": 0.01},
    )
    assert ConditionResult.from_json(json.loads(json.dumps(row.to_json()))) == row
    assert "1,234 (10%)" in table([row])
    with pytest.raises(InputError, match="not a row"):
        ConditionResult.from_json({"condition": "x", "full_interval": [0, 1], "circuit_interval": [0, 1]})


def test_collect_needs_conditions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no evaluated condition"):
        collect(RunFolder(tmp_path))
