"""Low-rank training of heads: the chain rule against peft's autograd, nothing outside the slices, and peft's own
format."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distillation.distilling import CONFIG, HEADS, PAIRS, PROMPTS, furthest, inside, values
from workbench import seeds
from workbench.distillation import teacher_cache
from workbench.distillation.adapters import LowRankSlices, save_adapter
from workbench.distillation.assembly import trained_slices
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import slices_of_heads
from workbench.errors import InputError
from workbench.matching.head_rows import hook_names
from workbench.models.hooked_model import Student
from workbench.values.refs import Head

Loader = Callable[..., Any]


def low_rank(student: Student, *, rank: int = 2, heads: list[Head] = HEADS) -> LowRankSlices:
    return LowRankSlices(student, slices_of_heads(student, heads), rank=rank, alpha=6.0, seed=1)


def trained(
    student: Student, load_teacher: Loader, architecture: str, folder: Path, *, steps: int = 12, **run: Any
) -> LowRankSlices:
    outputs = teacher_cache.computed(
        load_teacher(architecture, seed=1), PROMPTS, hook_names([pair.teacher for pair in PAIRS])
    )
    slices = low_rank(student)
    Distillation(student, slices, PROMPTS, outputs, PAIRS, replace(CONFIG, steps=steps), seed=3).run(folder, **run)
    return slices


def test_nothing_outside_the_slices_moves_and_the_change_has_the_rank(
    load_student: Loader, load_teacher: Loader, architecture: str, tmp_path: Path
) -> None:
    student: Student = load_student(architecture)
    before, masks = values(student), inside(student, HEADS)
    slices = trained(student, load_teacher, architecture, tmp_path)
    after = values(student)
    assert all(torch.equal(before[name][~masks[name]], after[name][~masks[name]]) for name in before)
    for part in slices.slices.values():
        change = (after[part.parameter] - before[part.parameter])[part.index].double()
        singular = torch.linalg.svdvals(change)
        assert float(singular[1]) > 1e-3, "both ranks are used"
        assert float(singular[2]) < 1e-6 < 1e-2 * float(singular[1])
    biases = [name for name in before if before[name].ndim == 1]
    assert all(torch.equal(before[name], after[name]) for name in biases), "biases do not train"


def test_it_starts_at_the_student_and_counts_its_factors(load_student: Loader, architecture: str) -> None:
    student: Student = load_student(architecture)
    before = values(student)
    slices = low_rank(student)
    slices.write_back()
    assert all(torch.equal(value, before[name]) for name, value in values(student).items())
    d_model, d_head = 32, student.d_head
    assert slices.count == len(slices.slices) * 2 * (d_model + d_head)
    total = sum(parameter.numel() for parameter in student.parameters().values())
    assert slices.fraction == pytest.approx(slices.count / total)
    assert slices.fraction < 0.5 * sum(mask.sum() for mask in inside(student, HEADS).values()).item() / total


@pytest.mark.parametrize("matrix", ["q", "o"])
def test_the_chain_rule_is_pefts_autograd(load_student: Loader, architecture: str, matrix: Any) -> None:
    """The same factors in peft's layer around the whole matrix: the gradients of our factors are peft's, in the head's
    own rows (columns)."""
    from peft import LoraConfig, inject_adapter_in_model

    student: Student = load_student(architecture)
    head = Head(1, 2)
    slices = LowRankSlices(student, student.head_slices(head, (matrix,)), rank=3, alpha=6.0, seed=1)
    (key,) = slices.slices
    part = slices.slices[key]
    down, up = slices.factors(key)
    with torch.no_grad():
        up.copy_(torch.randn(up.shape, generator=seeds.generator(0, "B")))
    slices.write_back()

    matrix_now = student.parameters()[part.parameter].detach()
    whole = (matrix_now.T if part.inputs_first else matrix_now).clone()
    start = head.index * student.d_head
    own = slice(start, start + student.d_head)
    out, inner = whole.shape
    rows, columns = (own, slice(None)) if matrix == "q" else (slice(None), own)
    holder = nn.Module()
    with torch.random.fork_rng():
        holder.layer = nn.Linear(inner, out, bias=False)
        inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["layer"]), holder)
    layer: Any = holder.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.zero_()
        b.zero_()
        a[:, columns], b[rows] = down, up
        layer.base_layer.weight.copy_(whole)
        layer.base_layer.weight[rows, columns] -= slices.scale * up @ down
    x, g = (torch.randn(7, width, generator=seeds.generator(0, "xg", width)) for width in (inner, out))
    torch.testing.assert_close(layer(x), x @ whole.T, rtol=1e-4, atol=1e-5)
    (layer(x) * g).sum().backward()

    gradient = g.T @ x
    student.parameters()[part.parameter].grad = gradient.T if part.inputs_first else gradient
    slices.collect_gradients()
    assert down.grad is not None
    assert up.grad is not None
    torch.testing.assert_close(down.grad, a.grad[:, columns], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(up.grad, b.grad[rows], rtol=1e-4, atol=1e-4)
    assert float(down.grad.abs().max()) > 100 * 1e-4
    assert float(up.grad.abs().max()) > 100 * 1e-4
    assert student.parameters()[part.parameter].grad is None


def test_killed_and_resumed_ends_with_the_same_bits(
    load_student: Loader, load_teacher: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed, again = (load_student() for _ in range(3))
    trained(whole, load_teacher, "llama", tmp_path / "whole", steps=6)
    step = Distillation.step

    def dying(self: Distillation, number: int) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Distillation, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(killed, load_teacher, "llama", tmp_path / "killed", steps=6)
    monkeypatch.undo()
    trained(again, load_teacher, "llama", tmp_path / "killed", steps=6, resume=True)
    assert furthest(values(again), values(whole)) == 0


def test_the_adapter_is_pefts_and_loads_to_the_trained_student(
    load_student: Loader, load_teacher: Loader, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    student: Student = load_student()
    before = values(student)
    slices = trained(student, load_teacher, "llama", tmp_path / "run")
    save_adapter(slices, tmp_path / "adapter", base=model_folder("llama"))
    loaded = values(Student.load(tmp_path / "adapter"))
    assert furthest(loaded, values(student)) < 1e-6
    assert furthest(before, values(student)) > 100 * 1e-6
    masks = inside(student, HEADS)
    assert all(torch.equal(before[name][~mask], loaded[name][~mask]) for name, mask in masks.items())


def test_an_adapter_of_a_fused_matrix_is_refused(
    load_student: Loader, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    for architecture in ("gpt2", "neox"):
        with pytest.raises(InputError, match="save the merged student"):
            save_adapter(low_rank(load_student(architecture)), tmp_path / "adapter", base=model_folder(architecture))


def test_what_a_configuration_trains(load_student: Loader) -> None:
    student: Student = load_student()
    total = sum(parameter.numel() for parameter in student.parameters().values())
    everything = trained_slices(student, None, replace(CONFIG, lora_rank=2), train_kv=True, seed=0)
    assert everything.count == everything.total == total, "all parameters train whole"
    whole, low = (
        trained_slices(student, HEADS, config, train_kv=True, seed=0)
        for config in (CONFIG, replace(CONFIG, lora_rank=2))
    )
    assert whole.count == sum(int(mask.sum()) for mask in inside(student, HEADS).values())
    assert isinstance(low, LowRankSlices)
    assert not isinstance(whole, LowRankSlices)
    assert low.fraction < whole.fraction < 0.5 < everything.fraction
    assert low.slices.keys() == whole.slices.keys()
    assert trained_slices(student, HEADS, CONFIG, train_kv=False, seed=0).count < whole.count
