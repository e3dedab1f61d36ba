"""Prompts of a batch that begin alike train as rows of one prefix: the same losses, similarities and gradients, from
fewer tokens; prompt by prompt where that is not exact."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import entity_pairs, left_padded, tokens_by_rows
from tests.distillation.distilling import CONFIG, HEADS, PAIRS, aligning
from workbench import seeds
from workbench.distillation.config import TrainingConfig
from workbench.distillation.masks import TrainedSlices, slices_of_heads
from workbench.distillation.objective import Objective
from workbench.distillation.teacher_cache import computed
from workbench.matching.head_rows import hook_names
from workbench.models.hooked_model import Student, Teacher
from workbench.tasks.base import PromptPairs

PROMPTS = entity_pairs(split="train", scenes=4, boxes=5)
INDEX = torch.tensor([3, 19, 0, 7, 12, 1, 9, 2, 4, 15, 11, 8])
"""Questions of four scenes, in no order."""
Load = Callable[..., Any]


def step(
    student: Student, teacher: Teacher, config: TrainingConfig, prompts: PromptPairs
) -> tuple[float, Tensor, list[Tensor]]:
    """(task loss, similarity of each pair, gradients of the matched heads' parameters) of one batch."""
    outputs = computed(teacher, prompts, hook_names([pair.teacher for pair in PAIRS], config.activation))
    objective = Objective(student, prompts, outputs, PAIRS, config)
    slices = TrainedSlices(student, slices_of_heads(student, HEADS))
    with slices.gradients(), student.training(), seeds.local(0, "dropout"):
        task, alignment, ckas = objective.losses(INDEX)
        assert task is not None
        assert alignment is not None
        (task + 0.5 * alignment).backward()
        slices.collect_gradients()
    gradients = [leaf.grad.clone() for leaf in slices.leaves.values() if leaf.grad is not None]
    return float(task.detach()), ckas.detach(), gradients


@pytest.mark.parametrize("padded", [False, True])
def test_a_step_by_rows_is_the_step_prompt_by_prompt(
    load_student: Load, load_teacher: Load, architecture: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = left_padded(PROMPTS, range(5, 10)) if padded else PROMPTS
    teacher, sizes = load_teacher(architecture), tokens_by_rows(monkeypatch)
    expected = step(load_student(architecture, seed=1), teacher, replace(CONFIG, shared_prefixes=False), prompts)
    assert not sizes
    found = step(load_student(architecture, seed=1), teacher, CONFIG, prompts)
    if architecture == "gpt2":  # it has dropout
        assert len(sizes) == 1, "compared once, and not taken"
    else:
        assert sizes[-1] < 0.7 * prompts.clean[INDEX].numel()
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected[2]) > 1e-3


@pytest.mark.parametrize(
    "config", [replace(CONFIG, precision="bf16"), aligning(activation="pattern", measure="attention_kl")]
)
def test_what_rows_would_not_give_runs_prompt_by_prompt(
    load_student: Load, load_teacher: Load, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = tokens_by_rows(monkeypatch)
    step(load_student("llama", seed=1), load_teacher("llama"), config, PROMPTS)
    assert not sizes
