"""Rows that a model writes itself: after which beginnings, the same from seed to seed and from kill to resume, and as
the rows of a fine-tuning."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import ModelFolder
from workbench.cli import main
from workbench.errors import InputError
from workbench.models.sources import open_source
from workbench.pretraining import generated
from workbench.pretraining.config import FinetuningConfig, GenerationConfig
from workbench.pretraining.finetuning import finetune
from workbench.pretraining.generated import generate
from workbench.tasks.entity_tracking import EntityTracking


def config(folder: Path, **settings: object) -> GenerationConfig:
    defaults = {"options": {"boxes": 3}, "rows": 10, "tokens": 5, "batch": 4, "seed": 3}
    return GenerationConfig(model=str(folder), **(defaults | settings))  # pyright: ignore[reportArgumentType]


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_begin_as_train_prompts_do_and_go_on_as_the_model_says(model_folder: ModelFolder, tmp_path: Path) -> None:
    """At temperature 0, each row's continuation is the model's likeliest token, one forward without padding a token."""
    folder = model_folder("llama")
    made = rows(generate(config(folder, temperature=0.0), tmp_path / "rows.jsonl"))
    source = open_source(folder, dtype=torch.float32)
    texts = [
        source.tokenizer.decode(source.tokenizer(pair.clean, add_special_tokens=False)["input_ids"])
        for pair in EntityTracking(boxes=3).pairs(source.tokenizer, split="train", scenes=10, seed=3)
    ]
    assert len(made) == 10
    whole = [row for row in made if row["prompt"]]
    assert all(any(text.startswith(row["prompt"]) for text in texts) for row in whole)
    assert len({len(row["prompt"]) for row in whole}) > 3, "cut off at a drawn token"
    for row in whole:
        tokens = source.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        start, answer = len(tokens), []
        with torch.no_grad():
            for _ in range(5):
                token = int(source.model(torch.tensor([tokens])).logits[0, -1].argmax())
                if token == source.tokenizer.eos_token_id:
                    break
                tokens.append(token)
        answer = tokens[start:]
        assert source.tokenizer.decode(answer, skip_special_tokens=True) == row["answer"]


def test_a_killed_run_goes_on_to_the_same_rows(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(model_folder("llama"))
    expected = generate(settings, tmp_path / "whole.jsonl").read_text()
    batches = generated._continued
    calls = []

    def killed(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batches(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(generated, "_continued", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(settings, tmp_path / "stopped.jsonl")
    assert len(rows(tmp_path / "stopped.jsonl")) == 4
    assert generate(settings, tmp_path / "stopped.jsonl").read_text() == expected
    assert len(calls) == 4, "the finished batch is not drawn again"
    assert generate(settings, tmp_path / "stopped.jsonl").read_text() == expected
    assert len(calls) == 4
    with pytest.raises(InputError, match="other settings"):
        generate(config(model_folder("llama"), seed=4), tmp_path / "stopped.jsonl")
    assert generate(config(model_folder("llama"), seed=4), tmp_path / "other.jsonl").read_text() != expected


def test_the_command_writes_rows_that_a_fine_tuning_reads(
    model_folder: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = model_folder("llama", layers=3), tmp_path / "rows.jsonl"
    words = ["--set", "rows=30", "--set", "tokens=3", "--set", "options.boxes=3", "--threads", "1"]
    assert main(["generate", str(folder), "--out", str(out), *words]) == 0
    assert "30 rows" in capsys.readouterr().out
    about = json.loads((tmp_path / "rows.jsonl.json").read_text())
    assert about["generation"]["rows"] == 30
    assert about["versions"]
    healed = finetune(
        FinetuningConfig(
            model=str(folder),
            rows=str(out),
            keep_layers=(0, 2),
            scenes=4,
            steps=2,
            evaluate_every=2,
            evaluation_scenes=2,
        ),
        tmp_path / "student",
        tmp_path / "work",
    )
    assert healed["steps"] == 2
    assert main(["generate", str(folder), "--out", str(out), "--set", "rowz=3"]) == 2
    assert "'rows'" in capsys.readouterr().err
