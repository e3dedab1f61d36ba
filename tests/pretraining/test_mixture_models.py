"""The committed models of the mixture: what each knows on held-out prompts, and that the students lie between chance
and the teacher (but for one)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from workbench.models.hooked_model import Teacher
from workbench.models.sources import quiet
from workbench.patching.ablation import plain_logits
from workbench.pretraining.mixture import TASKS, accuracies, held_out, report_table

MODELS = Path(__file__).parents[2] / "assets" / "models"
NAMES = ("mixture-teacher", "mixture-student", "mixture-unrelated-student")
REPORTS = {name: json.loads((MODELS / name / "accuracies.json").read_text()) for name in NAMES}


def plain(name: str) -> LlamaForCausalLM:
    with quiet():
        return LlamaForCausalLM.from_pretrained(MODELS / name)


@pytest.mark.parametrize("name", NAMES)
def test_accuracies_are_those_that_are_told(name: str) -> None:
    """Other prompts than the report's: within four standard errors of both samples."""
    found = accuracies(plain(name), split="test", prompts=140, seed=7)
    for task, accuracy in found.items():
        told = REPORTS[name][task]["accuracy"]
        assert accuracy == pytest.approx(told, abs=4 * (max(told * (1 - told), 0.02) * (1 / 140 + 1 / 1000)) ** 0.5), (
            task
        )


def test_the_teacher_knows_all_tasks_and_the_students_less() -> None:
    teacher = REPORTS["mixture-teacher"]
    assert all(teacher[task]["accuracy"] >= 0.95 for task in TASKS)
    for row in teacher["entity_operations"]["by"]["touching"]:
        assert row["accuracy"] >= 0.9 or row["prompts"] < 20, row
    for name in NAMES[1:]:
        for task in TASKS:
            assert TASKS[task].chance < REPORTS[name][task]["interval"][0], (name, task)
            if (name, task) != (
                "mixture-student",
                "entity_tracking",
            ):  # learned before everything else: the pruned student is the teacher's equal
                assert REPORTS[name][task]["interval"][1] < teacher[task]["interval"][0], (name, task)


def test_the_table_has_every_task_and_number() -> None:
    table = report_table(REPORTS)
    assert list(table.columns) == ["task", "chance", *NAMES]
    assert len(table) == len(TASKS) + len(
        {row["touching"] for row in REPORTS["mixture-teacher"]["entity_operations"]["by"]["touching"]}
    )


def test_the_workbench_reads_the_same_answers() -> None:
    """Loaded through the door of the workbench, prompts padded on the left: the same answers as the plain model."""
    teacher, pairs = Teacher.load(MODELS / "mixture-teacher"), held_out("theory_of_mind", split="test", prompts=30)
    logits = plain_logits(teacher, pairs)
    with torch.no_grad():
        expected = plain("mixture-teacher")(pairs.clean).logits[pairs.position("last")]
    assert torch.allclose(logits, expected, atol=1e-3)
    assert (logits.argmax(-1) == pairs.answers).float().mean() > 0.9


def test_all_bundled_files_are_small() -> None:
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) < 25_000_000
