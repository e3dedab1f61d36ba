"""The teacher's largest logits in place of all: exact where they are all, a lower bound else, smaller on disk; what
cannot be done with them is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distillation.distilling import PAIRS, PLAIN, PROMPTS, furthest, trained, values
from workbench import seeds
from workbench.distillation.assembly import teacher_outputs
from workbench.distillation.losses import DIVERGENCES
from workbench.distillation.teacher_cache import computed
from workbench.distillation.teacher_shards import TeacherShards, Top, teacher_shards
from workbench.distillation.top_logits import TopLogits, top_logits
from workbench.errors import InputError
from workbench.experiment.recipe import parse_recipe
from workbench.matching.head_rows import hook_names
from workbench.plan.shapes import shape_of
from workbench.plan.steps import cache_bytes

Loader = Callable[..., Any]
VOCABULARY = 1000
NAMES = hook_names([pair.teacher for pair in PAIRS])


def logits(scale: float, *labels: str) -> Tensor:
    return scale * torch.randn(16, VOCABULARY, generator=seeds.generator(0, "top", *labels))


TEACHER = logits(3, "teacher")
"""Most of the mass in a few dozens of a thousand tokens, as in a language model."""
STUDENT = TEACHER + logits(0.5, "student")


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_logits_are_exact_and_64_are_near(name: str, temperature: float) -> None:
    loss, student = DIVERGENCES[name], STUDENT.clone().requires_grad_()
    full = loss(student, TEACHER, temperature=temperature)
    slope = torch.autograd.grad(full, student)[0]
    differences = []
    for k in (VOCABULARY, 2 * VOCABULARY, VOCABULARY - 1, 64, 8, 1):
        kept = loss(student, top_logits(TEACHER, k, temperature=temperature), temperature=temperature)
        differences.append(float((full - kept).detach()))
        if k >= VOCABULARY:
            torch.testing.assert_close(kept, full, rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.autograd.grad(kept, student)[0], slope, rtol=0, atol=1e-6)
    assert all(difference > -1e-5 for difference in differences), "putting outcomes together never raises a divergence"
    assert differences[1:] == sorted(differences[1:])
    assert differences[-1] > 100 * 1e-5, "what was put together was not nothing"
    assert differences[3] < 0.6 * float(full.detach()), "a twentieth of the tokens holds most of it"


def test_equal_students_have_no_loss_and_the_tails_mass_is_the_teachers() -> None:
    kept = top_logits(TEACHER, 64)
    assert float(DIVERGENCES["kl_teacher"](TEACHER, kept)) == pytest.approx(0, abs=1e-6)
    mass = TEACHER.softmax(-1).sort(-1, descending=True).values[:, 64:].sum(-1)
    own = kept.rest.exp() / (kept.rest.exp() + kept.logits.exp().sum(-1))
    torch.testing.assert_close(own, mass, rtol=1e-4, atol=1e-6)
    assert float(mass.min()) > 100 * 1e-6
    with pytest.raises(InputError, match="temperature 1, and the loss is at 2"):
        DIVERGENCES["kl_teacher"](TEACHER, kept, temperature=2.0)


def test_a_cache_of_all_logits_by_rank_trains_to_the_same_weights(
    load_teacher: Loader, load_student: Loader, tmp_path: Path
) -> None:
    teacher, config = load_teacher(seed=1), replace(PLAIN, steps=2, task_loss="kl_teacher")
    full = teacher_outputs("shards", teacher, PROMPTS, NAMES, tmp_path)
    every = teacher_outputs("shards", teacher, PROMPTS, NAMES, tmp_path, top=Top(k=10**6))
    three = teacher_outputs("shards", teacher, PROMPTS, NAMES, tmp_path, top=Top(k=3))
    assert isinstance(three, TeacherShards)
    assert len({full.fingerprint, every.fingerprint, three.fingerprint}) == 3, (
        "a training of one does not resume another's"
    )
    again = TeacherShards.open(three.folder, PROMPTS)
    index = torch.tensor([5, 1])
    held = again.logits_of(index)
    assert isinstance(held, TopLogits)
    assert torch.equal(held.tokens[:, 0].long(), computed(teacher, PROMPTS, []).labels_of(index))
    assert torch.equal(again.labels_of(index), full.labels_of(index))
    ends = []
    for number, outputs in enumerate((full, every, three)):
        student = load_student()
        trained(student, outputs, config, tmp_path / str(number))
        ends.append(values(student))
    assert furthest(ends[0], ends[1]) < 1e-5
    assert furthest(ends[0], ends[2]) > 100 * 1e-5


def test_the_plan_counts_the_smaller_disk(model_folder: Loader, load_teacher: Loader, tmp_path: Path) -> None:
    teacher, shape = load_teacher(seed=1), shape_of(str(model_folder("llama", seed=1)))
    sizes = []
    for top in (None, 4):
        folder = teacher_shards(teacher, PROMPTS, [], tmp_path, top=None if top is None else Top(k=top)).folder
        file = next(folder.glob("0*.safetensors")).read_bytes()
        sizes.append(len(file) - 8 - int.from_bytes(file[:8], "little"))
        planned = cache_bytes(shape, len(PROMPTS), PROMPTS.clean.shape[1], 0, width=4, shards=True, top=top)
        assert sizes[-1] == planned
    assert sizes[1] < sizes[0] / 5


def test_what_needs_all_logits_is_refused(load_teacher: Loader, tmp_path: Path) -> None:
    teacher = load_teacher(seed=1)
    for source in ("memory", "live"):
        with pytest.raises(InputError, match="teacher_outputs: shards"):
            teacher_outputs(source, teacher, PROMPTS, [], tmp_path, top=Top(k=4))
    both = replace(PROMPTS, teacher=PROMPTS)
    with pytest.raises(InputError, match="leave `teacher_top` out"):
        teacher_outputs("shards", teacher, both, [], tmp_path, top=Top(k=4))
    models = {"teacher": "teacher", "student": "student"}
    with pytest.raises(InputError, match="teacher_outputs: shards"):
        parse_recipe({**models, "teacher_top": 64})
    assert parse_recipe({**models, "teacher_top": 64, "teacher_outputs": "shards"}).teacher_top == 64
