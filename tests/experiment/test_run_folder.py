"""A run folder: free after a failure, one process at a time, nothing left over from a kill, refused before it costs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from workbench import storage
from workbench.cli import main
from workbench.errors import InputError
from workbench.experiment.runs import RunFolder
from workbench.models.hooked_model import HookedModel
from workbench.models.sources import quiet
from workbench.pretraining import word_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(small_recipe: Callable[..., Any], tmp_path: Path) -> Path:
    value = small_recipe(
        training={"steps": 2, "batch": 6},
        evaluation={"random_circuits": 1, "curve": False},
        conditions=["circuit_ce_cka"],
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def test_a_run_that_fails_before_a_result_leaves_its_folder_free(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert run("discover", "--recipe", recipe, "--out", out, "--set", "teacher=nobody/nothing") == 2
    assert not list(out.iterdir())
    assert run("discover", "--recipe", recipe, "--out", out) == 0
    assert not (out / ".lock").exists()
    assert run("discover", "--recipe", recipe, "--out", out) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["", "{}", '{"recipe": {"teacher": "another"}}'])
def test_a_description_alone_is_begun_anew(tmp_path: Path, left: str) -> None:
    """What a process that was killed before its first result leaves."""
    (tmp_path / "run.json").write_text(left)
    RunFolder(tmp_path).begin({"recipe": {"teacher": "mine"}}, resume=False)
    assert RunFolder(tmp_path).described()["recipe"]["teacher"] == "mine"
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "teacher-path-A.partial").write_text("")
    with pytest.raises(InputError, match="already holds a run"):
        RunFolder(tmp_path).begin({"recipe": {"teacher": "mine"}}, resume=False)
    storage.release(tmp_path)


HOLDING = """
import sys, time
from pathlib import Path
from workbench import storage
storage.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "run" / "conditions" / "full_ce-0" / "log.jsonl"
    first = holder(folder)
    try:
        log.parent.mkdir(parents=True)
        log.write_text("a line\n")
        with pytest.raises(InputError, match=rf"in use by process {first.pid} on {socket.gethostname()} since 20"):
            RunFolder(folder).begin({"recipe": {"teacher": "mine"}}, resume=True)
        assert log.read_text() == "a line\n"
        assert not (folder / "run.json").exists()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert first.stdout is not None
        first.stdout.close()
    assert json.loads((folder / ".lock").read_text())["process"] == first.pid, "the dead leave their lock"
    leftovers = [folder / ".run.json.abcd1234", log.parent / ".student.zz_9xy01"]
    leftovers[0].write_text("half")
    leftovers[1].mkdir()
    (leftovers[1] / "model.safetensors").write_text("half")
    storage.hold(folder)
    assert not any(path.exists() for path in leftovers)
    assert log.read_text() == "a line\n"
    assert json.loads((folder / ".lock").read_text())["process"] == os.getpid()
    storage.hold(folder)  # its own process goes on
    storage.release(folder)
    assert not (folder / ".lock").exists()


def test_a_lock_of_another_machine_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"process": 1, "host": "elsewhere", "since": "2026"}))
    with pytest.raises(InputError, match=r"process 1 on elsewhere.*If it has died there, delete"):
        storage.hold(tmp_path)


def test_a_study_holds_the_folders_of_its_students(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "study.json", {})
    first = holder(tmp_path)
    try:
        with pytest.raises(InputError, match="in use by process"):
            RunFolder(tmp_path / "student").begin({"recipe": {"teacher": "mine"}}, resume=False)
    finally:
        first.kill()
        first.wait()
        assert first.stdout is not None
        first.stdout.close()


def _terminated() -> None:
    """This process gets SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def test_sigterm_ends_like_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), storage.command():
        _terminated()
    assert signal.getsignal(signal.SIGTERM) is before


# Said before anything is computed


def saved(folder: Path, config: Any) -> Path:
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
    return folder


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def bloom(folder: Path) -> Path:
    """It keeps queries, keys and values in one matrix, in an order that no export knows."""
    return saved(
        folder, BloomConfig(vocab_size=len(word_tokenizer()), hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    )


def padded(folder: Path) -> Path:
    return saved(folder, LlamaConfig(vocab_size=len(word_tokenizer()) + 7, **SIZES))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.batch": 400}, "fewer than a batch of 400"),
        ({"student": bloom}, "save_students: false"),
        ({"student": padded, "conditions": "[full_kl]"}, "leave the condition full_kl out"),
        ({"dtype": "float16"}, "training.precision: bf16"),
        ({"training.evaluate_every": 1}, "no validation prompts"),
        ({"training.accumulate": 5}, "does not split evenly"),
        ({"alignment.weight": 0, "conditions": "[circuit_cka]"}, "neither a task loss nor an alignment loss"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_said_before_anything_is_computed(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    settings: dict[str, Any],
    message: str,
) -> None:
    words = [
        word
        for key, value in settings.items()
        for word in ("--set", f"{key}={value(tmp_path / 'model') if callable(value) else value}")
    ]
    assert run("plan", recipe, *words) == 2, "the plan says it too"
    assert message in capsys.readouterr().err
    monkeypatch.setattr(HookedModel, "activations", lambda *_, **__: pytest.fail("a forward"))
    monkeypatch.setattr(HookedModel, "final_logits", lambda *_, **__: pytest.fail("a forward"))
    if settings.get("dtype") == "float16":
        monkeypatch.setattr("workbench.models.hooked_model.self_check", lambda *_: None)
    for command in ("evaluate", "distill"):
        chosen = (
            ["--condition", settings["conditions"].strip("[]")]
            if command == "distill" and "conditions" in settings
            else []
        )
        assert run(command, "--recipe", recipe, "--out", tmp_path / command, *words, *chosen) == 2
        assert message in capsys.readouterr().err
        assert not list((tmp_path / command).glob("*")), "and the folder is free"


def test_a_link_that_leads_nowhere_is_named(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    assert run("discover", "--recipe", recipe, "--out", tmp_path / "link") == 2
    assert "does not exist; make that" in capsys.readouterr().err
    (tmp_path / "absent").mkdir()
    assert run("discover", "--recipe", recipe, "--out", tmp_path / "link") == 0


@pytest.mark.parametrize("method", ["path_patching", "mean_ablation"])
def test_an_empty_circuit_is_refused_with_what_would_fill_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """Twelve prompts can't be as significant as this."""
    out = tmp_path / "run"
    settings = ("--set", f"discovery.method={method}", "--set", "discovery.selection=significance")
    settings += ("--set", "discovery.confidence=0.999999")
    assert run("discover", "--recipe", recipe, "--out", out, *settings) == 2
    told = capsys.readouterr().err
    assert "no head is chosen" in told
    assert "false-discovery rate of 1e-06" in told
    assert "`discovery.selection: top`" in told
    assert list((out / "scores").glob("teacher-*.safetensors"))
    assert not (out / "circuits/teacher.json").exists()


def test_a_circuit_smaller_than_asked_for_is_explained(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="workbench"):
        assert run("discover", "--recipe", recipe, "--out", tmp_path / "run", "--set", "discovery.heads=30") == 0
    assert "of up to 30 heads asked for" in caplog.text
    assert "in A" in caplog.text
    caplog.clear()
    settings = ("--set", "discovery.selection=top", "--set", "discovery.method=mean_ablation")
    with caplog.at_level("INFO", logger="workbench"):
        assert run("discover", "--recipe", recipe, "--out", tmp_path / "other", *settings) == 0
    assert "asked for" not in caplog.text
