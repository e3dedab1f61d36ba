"""Distillation: what trains and what does not, lambda = 0, the cache, and a killed run that ends with the same bits."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distillation.distilling import CONFIG, HEADS, PAIRS, PLAIN, PROMPTS, inside, trained, values
from workbench import seeds
from workbench.distillation import losses, teacher_cache
from workbench.distillation.loop import Distillation, TrainingConfig, read_log
from workbench.distillation.masks import TrainedSlices, slices_of_everything, slices_of_heads
from workbench.errors import InputError
from workbench.matching.head_rows import hook_names
from workbench.models import hooks
from workbench.models.hooked_model import Student, Teacher
from workbench.similarity.cka import linear_cka
from workbench.values.refs import Head

Loader = Callable[..., Any]


@pytest.fixture
def cache(load_teacher: Loader, architecture: str, tmp_path: Path) -> teacher_cache.TeacherCache:
    return teacher_cache.teacher_cache(
        load_teacher(architecture, seed=1), PROMPTS, hook_names([pair.teacher for pair in PAIRS]), tmp_path / "cache"
    )


def test_alignment_gradient_is_in_every_matched_head_and_nowhere_else(
    load_student: Loader, architecture: str, cache: Any
) -> None:
    """The trap of a detached activation: a loss that looks fine and trains nothing."""
    student: Student = load_student(architecture)
    run = Distillation(
        student,
        TrainedSlices(student, slices_of_everything(student)),
        PROMPTS,
        cache,
        PAIRS,
        replace(CONFIG, task_loss="none"),
        seed=0,
    )
    masks = inside(student, HEADS)
    for pair in PAIRS:
        alone = Distillation(student, run.slices, PROMPTS, cache, [pair], replace(CONFIG, task_loss="none"), seed=0)
        with run.slices.gradients():
            task, alignment, _ = alone.losses(torch.arange(8))
            assert task is None
            assert alignment is not None
            alignment.backward()
            for part in student.head_slices(pair.student, ("q", "k", "v")):
                gradient = student.parameters()[part.parameter].grad
                assert gradient is not None
                if not part.parameter.endswith("bias") and "b_" not in part.parameter:
                    assert gradient[part.index].norm() > 1e-6, f"{pair}: no gradient in {part.parameter}"
    slices = TrainedSlices(student, slices_of_heads(student, HEADS))
    sliced = Distillation(student, slices, PROMPTS, cache, PAIRS, replace(CONFIG, task_loss="none"), seed=0)
    with slices.gradients():
        _, alignment, _ = sliced.losses(torch.arange(8))
        assert alignment is not None
        alignment.backward()
        slices.collect_gradients()
        assert all(leaf.grad is None or leaf.grad.shape == leaf.shape for leaf in slices.leaves.values())
        assert slices.count == sum(int(mask.sum()) for mask in masks.values()), "the leaves are the slices, each once"


@pytest.mark.parametrize("train_kv", [True, False])
def test_nothing_outside_the_slices_moves_by_a_bit(
    load_student: Loader, architecture: str, cache: Any, tmp_path: Path, train_kv: bool
) -> None:
    student: Student = load_student(architecture)
    before, masks = values(student), inside(student, HEADS, train_kv=train_kv)
    slices = TrainedSlices(student, slices_of_heads(student, HEADS, train_kv=train_kv))
    Distillation(student, slices, PROMPTS, cache, PAIRS, replace(CONFIG, steps=20), seed=3).run(tmp_path)
    after = values(student)
    assert all(torch.equal(before[name][~masks[name]], after[name][~masks[name]]) for name in before), (
        "weight decay and momentum included"
    )
    for part in slices_of_heads(student, HEADS, train_kv=train_kv):
        assert not torch.equal(before[part.parameter][part.index], after[part.parameter][part.index]), (
            f"{part} did not train"
        )


def test_lambda_zero_equals_plain_head_only_fine_tuning_to_the_bit(
    load_student: Loader, architecture: str, cache: Any, tmp_path: Path
) -> None:
    """The plain loop is written out here: AdamW on copies of the slices, cross-entropy on the teacher's labels."""
    ours: Student = load_student(architecture)
    config = replace(PLAIN, shared_prefixes=False)
    trained(ours, cache, config, tmp_path)
    plain: Student = load_student(architecture)
    parts = {f"{part.parameter}{part.index}": part for part in slices_of_heads(plain, HEADS)}
    leaves = {
        key: nn.Parameter(plain.parameters()[part.parameter].detach()[part.index].clone())
        for key, part in parts.items()
    }
    optimizer = torch.optim.AdamW(list(leaves.values()), lr=config.learning_rate, weight_decay=config.weight_decay)
    index = Distillation(
        ours, TrainedSlices(ours, slices_of_everything(ours)), PROMPTS, cache, (), config, seed=3
    ).batch_index
    with plain.training():
        for step in range(config.steps):
            rows = PROMPTS.rows(index(step))
            with seeds.local(3, "dropout", step):
                logits = plain.final_logits(rows.clean, rows.mask)
            nn.functional.cross_entropy(logits, cache.logits.argmax(-1)[index(step)]).backward()
            for key, part in parts.items():
                gradient = plain.parameters()[part.parameter].grad
                assert gradient is not None
                leaves[key].grad = gradient[part.index].clone()
            nn.utils.clip_grad_norm_(list(leaves.values()), config.clip)
            optimizer.step()
            with torch.no_grad():
                for key, part in parts.items():
                    plain.parameters()[part.parameter][part.index].copy_(leaves[key])
            for parameter in plain.parameters().values():
                parameter.grad = None
    assert all(torch.equal(value, values(plain)[name]) for name, value in values(ours).items())


@pytest.mark.parametrize("everything", [False, True])
def test_killed_and_resumed_ends_with_the_same_bits(
    load_student: Loader, cache: Any, tmp_path: Path, architecture: str, everything: bool, monkeypatch: Any
) -> None:
    whole: Student = load_student(architecture)
    config = replace(CONFIG, schedule="cosine", warmup=2)
    reports = trained(whole, cache, config, tmp_path / "whole", everything=everything)
    killed: Student = load_student(architecture)
    step = Distillation.step

    def dying(self: Distillation, number: int) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Distillation, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(killed, cache, config, tmp_path / "killed", everything=everything)
    monkeypatch.undo()
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "los')  # what a killed process may leave
    again: Student = load_student(architecture)
    resumed = trained(again, cache, config, tmp_path / "killed", everything=everything, resume=True)
    assert resumed == reports
    assert read_log(tmp_path / "killed" / "log.jsonl") == reports
    assert all(torch.equal(value, values(again)[name]) for name, value in values(whole).items())


def test_resume_refuses_another_run_and_damage(load_student: Loader, load_teacher: Loader, tmp_path: Path) -> None:
    cache = teacher_cache.computed(load_teacher("llama", seed=1), PROMPTS, hook_names([pair.teacher for pair in PAIRS]))
    trained(load_student("llama"), cache, CONFIG, tmp_path)
    with pytest.raises(InputError, match="another configuration"):
        trained(load_student("llama"), cache, replace(CONFIG, learning_rate=0.5), tmp_path, resume=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"damaged.*run the stage"):
        trained(load_student("llama"), cache, CONFIG, tmp_path, resume=True)


def test_log_adds_up(load_student: Loader, load_teacher: Loader, tmp_path: Path) -> None:
    cache = teacher_cache.computed(load_teacher("llama", seed=1), PROMPTS, hook_names([pair.teacher for pair in PAIRS]))
    for report in trained(load_student("llama"), cache, CONFIG, tmp_path):
        assert report.loss == pytest.approx(report.task_loss + 0.5 * report.alignment_loss, rel=1e-5)
        assert report.alignment_loss == pytest.approx(sum(1 - cka for cka in report.ckas.values()), rel=1e-5)
        assert len(report.ckas) == 3
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(6))


def test_alignment_loss_is_a_sum_over_pairs_of_any_shape() -> None:
    x, y, z = (
        torch.randn(12, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
        for width in (3, 5, 4)
    )
    total, ckas = losses.alignment_loss([(x, y), (y, z), (x, y)], estimator="debiased")
    expected = [float(linear_cka(a, b, estimator="debiased")) for a, b in [(x, y), (y, z), (x, y)]]
    assert ckas.tolist() == pytest.approx(expected)
    assert float(total) == pytest.approx(sum(1 - value for value in expected))


def test_cache_is_by_content_never_stale_and_rebuilt_when_damaged(
    load_teacher: Loader, tmp_path: Path, monkeypatch: Any
) -> None:
    teacher: Teacher = load_teacher("llama")
    names = [hooks.z(0)]
    first = teacher_cache.teacher_cache(teacher, PROMPTS, names, tmp_path)
    logits, expected = teacher.activations(PROMPTS.clean, PROMPTS.mask, names)
    assert torch.equal(first.activations[names[0]], expected[names[0]])
    assert torch.equal(first.labels, logits.argmax(-1))
    computed = teacher_cache.computed
    monkeypatch.setattr(teacher_cache, "computed", lambda *a, **k: pytest.fail("computed again"))
    again = teacher_cache.teacher_cache(teacher, PROMPTS, names, tmp_path)
    assert torch.equal(again.logits, first.logits)
    monkeypatch.setattr(teacher_cache, "computed", computed)
    with torch.no_grad():
        next(iter(teacher.parameters().values())).mul_(1.5)
    changed = teacher_cache.teacher_cache(teacher, PROMPTS, names, tmp_path)
    assert not torch.equal(changed.logits, first.logits)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"torn")
    assert torch.equal(teacher_cache.teacher_cache(teacher, PROMPTS, names, tmp_path).logits, changed.logits)
    with pytest.raises(InputError, match="not in this teacher cache"):
        first.rows(torch.arange(2), [hooks.z(1)])
    with pytest.raises(InputError, match=r"no hook 'blocks.0.attn.hook_zz'.*hook_z"):
        teacher_cache.teacher_cache(teacher, PROMPTS, ["blocks.0.attn.hook_zz"], tmp_path)


def test_refusals(load_student: Loader, load_teacher: Loader, tmp_path: Path) -> None:
    cache = teacher_cache.computed(load_teacher("llama", seed=1), PROMPTS, hook_names([pair.teacher for pair in PAIRS]))
    student: Student = load_student("llama")
    slices = TrainedSlices(student, slices_of_heads(student, HEADS))

    def make(
        pairs: Any = PAIRS, config: TrainingConfig = CONFIG, prompts: Any = PROMPTS, cache: Any = cache
    ) -> Distillation:
        return Distillation(student, slices, prompts, cache, pairs, config, seed=0)

    with pytest.raises(InputError, match="no heads are matched"):
        make(pairs=())
    with pytest.raises(InputError, match="neither"):
        make(config=replace(PLAIN, task_loss="none"))
    with pytest.raises(InputError, match="lower `batch`"):
        make(config=replace(CONFIG, batch=4000))
    with pytest.raises(InputError, match="build it for these prompts"):
        make(prompts=PROMPTS.rows(slice(0, 9)))
    broken = replace(cache, activations={name: value * math.nan for name, value in cache.activations.items()})
    with pytest.raises(InputError, match=r"loss is nan at step 0.*learning_rate"):
        make(cache=broken).run(tmp_path)
    with pytest.raises(InputError, match="head_slices"):
        TrainedSlices(student, [replace(student.head_slices(Head(0, 0))[0], parameter="absent")])
