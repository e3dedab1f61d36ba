"""Somebody's first hour: models of their own, a file of their own, and fifteen lines, in a folder that holds no file of
ours."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from workbench import seeds
from workbench.tasks.vocabulary import word_level_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
COLOURS = "red blue green white black grey pink brown".split()
PLACES = "north south east west hills sea woods town".split()
ANIMALS = "cat dog fox hen cow pig owl bat rat bee".split()
SCRIPT = """
import workbench as wb

teacher, student = wb.Teacher.load("./big"), wb.Student.load("./small")
pairs = wb.read_pairs("pairs.jsonl", student)
mine, training, test = pairs[:80], pairs[80:240], pairs[240:]
theirs, ours = (wb.find_circuit(model, mine, heads=2, selection="top") for model in (teacher, student))
report = wb.evaluate_circuit(teacher, test, theirs)
matching = wb.match(student, teacher, ours, theirs, mine)
trained = wb.distill(student, teacher, matching, training, steps=60, learning_rate=0.01, weight=0.1).student
trained.save("trained")
models = {"before": student, "after": trained, "teacher": teacher}
table = wb.compare(models, test, circuits={"student": ours, "teacher": theirs}, matching=matching)
wb.plots.heads({"teacher": theirs, "student": ours}).write_html("heads.html")
print(table)
"""
CHECK = """
import json
again = wb.Student.load("./trained")
same = wb.compare({"after": again}, test).rows[0].full_accuracy == table["after"].full_accuracy
facts = {row.name: [row.full_accuracy, row.circuit_accuracy, row.random_circuit_accuracy, row.p] for row in table.rows}
shown = all(word in repr(table) for word in ("before", "after", "teacher", "p vs before"))
print("FACTS", json.dumps({"rows": facts, "same": same, "shown": shown, "method": theirs.method,
    "reference": theirs.reference, "report": report.circuit_accuracy, "heads": len(theirs.circuit.heads)}))
"""


def rows() -> Iterator[dict[str, Any]]:
    """The first of two colours decides the last word: its information, and no other's, has to be moved there, which
    heads alone can do."""
    draw = random.Random(0)
    colours = [(first, second) for first in COLOURS for second in COLOURS if first != second]
    every = [(*pair, animal, other) for pair in colours for animal in ANIMALS for other in ANIMALS]
    for first, second, animal, other in draw.sample(every, 400):
        clean, corrupt = (f"{one} {animal} walks with {two} {other} to" for one, two in permutations((first, second)))
        answer, distractor = (f" {PLACES[COLOURS.index(colour)]}" for colour in (first, second))
        yield {"clean": clean, "corrupt": corrupt, "answer": answer, "distractor": distractor}


def save_miniature(folder: Path, *, layers: int, steps: int, pairs: list[dict[str, Any]]) -> None:
    """A GPT-2 of a few thousand parameters, trained for so many steps, as transformers saves it."""
    tokenizer = word_level_tokenizer([*COLOURS, *PLACES, *ANIMALS, "walks", "with", "to"])
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=layers, n_head=4, n_positions=32, pad_token_id=0)
    with seeds.local(0, "miniature"):
        model = GPT2LMHeadModel(config)
    model.eval()  # no dropout: nothing random is left
    tokens, answers = (
        torch.tensor(tokenizer([row[column] for row in pairs], add_special_tokens=False)["input_ids"])
        for column in ("clean", "answer")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = cross_entropy(model(tokens).logits[:, -1], answers[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but their two models and their file."""
    path, pairs = tmp_path_factory.mktemp("theirs"), list(rows())
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    save_miniature(path / "big", layers=2, steps=200, pairs=pairs)
    save_miniature(path / "small", layers=1, steps=11, pairs=pairs)
    return path


@pytest.fixture(scope="module")
def outcome(folder: Path) -> dict[str, Any]:
    assert len([line for line in SCRIPT.splitlines() if line.strip()]) <= 15
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + CHECK],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("FACTS ")[1])


def test_the_table_says_what_training_did(outcome: dict[str, Any]) -> None:
    before, after, teacher = (outcome["rows"][name] for name in ("before", "after", "teacher"))
    assert teacher[0] > 0.95
    assert after[0] > before[0] + 0.2
    assert before[3] is None
    assert after[3] < 0.01
    assert outcome["shown"]


def test_the_circuit_is_one_and_random_heads_are_none(outcome: dict[str, Any]) -> None:
    assert outcome["method"] == "mean_ablation"
    assert "corrupt prompts" in outcome["reference"]
    assert outcome["heads"] == 2
    assert outcome["report"] == outcome["rows"]["teacher"][1] > outcome["rows"]["teacher"][2]
    full, circuit, random_heads, _ = outcome["rows"]["after"]  # trained on its two matched heads alone
    assert full - 0.1 < circuit
    assert circuit > random_heads + 0.3


def test_what_was_saved_is_an_ordinary_model_that_loads_again(outcome: dict[str, Any], folder: Path) -> None:
    assert outcome["same"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (folder / "trained").iterdir()
    }
    assert {path.name for path in folder.iterdir()} == {"pairs.jsonl", "big", "small", "trained", "heads.html"}
