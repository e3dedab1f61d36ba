"""The committed models of thin heads: what they know, that the teacher's task is left to few heads, which is asked by
taking all others away, and that matching finds every head's own ancestor."""

import json
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.models import sources
from workbench.pretraining.entity_bundle import task_accuracy
from workbench.pretraining.head_penalty import SMALL, head_norms
from workbench.storage import located
from workbench.values.refs import Head

STUDY = Path(located("assets/results/study_thin"))
NAMES = ("thin-teacher", "thin-student", "thin-unrelated-student")


@pytest.fixture(scope="module")
def accuracies() -> dict[str, float]:
    return {
        name: task_accuracy(
            sources.plain_model(Path(located(name)), dtype=torch.float32, attention="sdpa"),
            boxes=7,
            split="test",
            scenes=40,
        )
        for name in NAMES
    }


def test_the_teacher_knows_the_task_and_the_students_half(accuracies: dict[str, float]) -> None:
    teacher, *students = accuracies.values()
    assert teacher >= 0.97
    assert all(0.3 < accuracy < 0.7 for accuracy in students), accuracies


def test_most_heads_write_next_to_nothing() -> None:
    """What the penalty did, in the weights; the bundled teacher of wide heads was trained without it."""
    small = {
        name: float((head_norms(sources.plain_model(Path(located(name)), dtype=torch.float32)) < SMALL).float().mean())
        for name in ("thin-teacher", "teacher")
    }
    assert small["thin-teacher"] > 0.8
    assert small["teacher"] == 0


def test_the_circuit_is_at_most_a_fifth_of_the_heads_and_does_the_task_alone() -> None:
    """On other prompts than those on which it was found; the circuit's size in random heads does nothing, and without
    the circuit nothing is left."""
    teacher, circuit = wb.Teacher.load("thin-teacher"), wb.Circuit.load(STUDY / "circuits/teacher.json")
    assert len(circuit.heads) <= teacher.n_layers * teacher.n_heads / 5
    pairs = wb.task("entity_tracking", boxes=7, queries=1).pairs(teacher, scenes=60, split="test", seed=3)
    report = wb.evaluate_circuit(teacher, pairs, circuit)
    assert report.circuit_accuracy >= 0.85 * report.full_accuracy
    assert report.random_circuit_accuracy < 0.1
    assert report.full_accuracy > 0.95


def test_every_matched_head_is_the_one_that_it_descends_from() -> None:
    """By similarity of outputs alone. The student's layers are the teacher's of the same index but for those that were
    left out, so the ancestor of a head is known."""
    layers = json.loads((Path(located("thin-student")) / "training.json").read_text())["kept_layers"]
    matches = json.loads((STUDY / "head_map.json").read_text())["matches"]
    ancestors = {
        match["student"]: str(Head(layers[head.layer], head.index))
        for match in matches
        for head in [Head.parse(match["student"])]
    }
    assert {match["student"]: match["teacher"] for match in matches} == ancestors
    assert len(matches) >= 5
