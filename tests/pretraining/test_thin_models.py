"""The committed models of thin heads: what they know, that the teacher's task is left to few heads, which is asked by
taking all others away, and that matching finds every head's own ancestor."""

import json
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.circuits.circuit import Circuit, Member
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


def circuit_of(name: str) -> Circuit:
    return Circuit.load(STUDY / f"circuits/{name}.json")


def test_the_circuit_is_at_most_a_fifth_of_the_heads_and_does_the_task_alone() -> None:
    """On other prompts than those on which it was found; random circuits of its size do nothing, and neither do all the
    other heads together."""
    teacher, circuit = wb.Teacher.load("thin-teacher"), circuit_of("teacher")
    assert len(circuit.heads) <= len(teacher.heads) / 5
    others = [Member(head, "other", "all") for head in teacher.heads if head not in circuit.heads]
    pairs = wb.task("entity_tracking", boxes=7, queries=1).pairs(teacher, scenes=60, split="test", seed=3)
    report = wb.evaluate_circuit(teacher, pairs, circuit)
    assert report.circuit_accuracy >= 0.85 * report.full_accuracy
    assert report.random_circuit_accuracy < 0.1
    assert report.full_accuracy > 0.95
    rest = Circuit.of(others, shape=circuit.shape, method="the others")
    assert wb.evaluate_circuit(teacher, pairs, rest, random_circuits=0).circuit_accuracy < 0.15


def test_every_matched_head_is_the_one_that_it_descends_from() -> None:
    """By similarity of outputs alone, on other prompts than the study's. The student's heads are the teacher's of the
    layers that were kept, so the ancestor of each is known."""
    layers = json.loads((Path(located("thin-student")) / "training.json").read_text())["kept_layers"]
    teacher, student = wb.Teacher.load("thin-teacher"), wb.Student.load("thin-student")
    pairs = wb.task("entity_tracking", boxes=7, queries=1).pairs(teacher, scenes=40, split="test", seed=3)
    matching = wb.match(
        student,
        teacher,
        circuit_of("student"),
        circuit_of("teacher"),
        pairs,
        rule="similarity",
        positions="all",
        one_to_one=True,
    )
    matched = {match.student: match.teacher for match in matching.head_map.matches}
    assert matched == {head: Head(layers[head.layer], head.index) for head in matched}
    assert set(matched.values()) == set(circuit_of("teacher").heads)
