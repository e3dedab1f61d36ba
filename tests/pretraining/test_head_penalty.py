"""The penalty that leaves a task to few heads: what its norm is of, that no head escapes it, and that a training with
it shrinks heads and resumes to the same bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.pretraining.config import SizeConfig
from workbench.pretraining.entity_bundle import Boxes, LessonConfig, word_tokenizer
from workbench.pretraining.head_penalty import head_norms, head_penalty
from workbench.pretraining.models import new_model

TINY = SizeConfig(layers=2, heads=4, kv_heads=2, d_head=4, d_model=16, d_mlp=16)
LESSONS = LessonConfig(batch=4, queries=2, boxes=(2, 3), solved=-1.0, stop_at=2.0, warmup=2, head_penalty=0.1)


def begun(config: LessonConfig) -> Boxes:
    vocabulary = word_tokenizer().get_vocab()
    return Boxes(new_model(TINY, len(vocabulary), seed=1), vocabulary, config, label="test")


def attention(model: Any, layer: int) -> Any:
    """The attention of a layer."""
    return model.model.layers[layer].self_attn


def test_the_norm_is_that_of_the_output_value_matrix() -> None:
    """Written out head by head; two query heads share their values."""
    model = new_model(TINY, 20, seed=0)
    norms = head_norms(model)
    assert norms.shape == (2, 4)
    for layer in range(2):
        for head in range(4):
            values = attention(model, layer).v_proj.weight[4 * (head // 2) : 4 * (head // 2 + 1)]
            outputs = attention(model, layer).o_proj.weight[:, 4 * head : 4 * (head + 1)]
            assert norms[layer, head].item() == pytest.approx((outputs @ values).norm().item(), rel=1e-5)


def test_larger_values_behind_smaller_outputs_hide_nothing() -> None:
    model = new_model(TINY, 20, seed=0)
    before = head_norms(model)
    with torch.no_grad():
        attention(model, 0).v_proj.weight.mul_(8)
        attention(model, 0).o_proj.weight.div_(8)
    torch.testing.assert_close(head_norms(model), before)


def test_one_head_costs_less_than_two_that_write_alike() -> None:
    """Two heads with the same values, each with half of what one would write: the norms add up to the same, the penalty
    does not; and no slope is infinite where a head is nothing."""
    split, whole = new_model(TINY, 20, seed=0), new_model(TINY, 20, seed=0)
    with torch.no_grad():
        for model, shares in ((split, (0.5, 0.5)), (whole, (1.0, 0.0))):
            outputs = attention(model, 0).o_proj.weight
            one = outputs[:, :4].clone()
            outputs[:, :4], outputs[:, 4:8] = shares[0] * one, shares[1] * one
    torch.testing.assert_close(head_norms(split).sum(), head_norms(whole).sum())
    norm = head_norms(whole)[0, 0] / 0.1
    expected = 2 * torch.log1p(norm / 2) - torch.log1p(norm)
    torch.testing.assert_close(head_penalty(split) - head_penalty(whole), expected, rtol=1e-3, atol=1e-4)
    assert expected > 0.1
    (slope,) = torch.autograd.grad(head_penalty(whole), attention(whole, 0).o_proj.weight)
    assert bool(slope.isfinite().all())


def test_a_training_with_it_shrinks_heads_and_logs_it_from_the_second_number_of_boxes_on() -> None:
    with_it, without = begun(LESSONS), begun(replace(LESSONS, head_penalty=0.0))
    for course in (with_it, without):
        for _ in range(12):
            course.advance()
    assert "head_penalty" not in with_it.log[0], "the first number of boxes is learned without it"
    assert all("head_penalty" in row for row in with_it.log[1:])
    assert not any("head_penalty" in row for row in without.log)
    assert with_it.log[-1]["head_penalty"] < with_it.log[1]["head_penalty"]
    assert head_norms(with_it.model).sum() < 0.97 * head_norms(without.model).sum()


def test_each_number_of_boxes_settles_before_the_next() -> None:
    """Any accuracy passes here: two boxes at step 0, which then settle for three steps, and so do three."""
    course, solved, rates = begun(replace(LESSONS, stop_at=-1.0, settling=3)), [], []
    for _ in range(8):
        course.advance()
        solved.append(course.solved)
        rates.append(course.optimizer.param_groups[0]["lr"] / course.config.learning_rate)
    assert solved == [None, None, None, 2, None, None, None, 3]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]), "warm-up; and a fall while the last one settles"
    assert [row["boxes"] for row in course.log[:4]] == [2] * 4
    assert ["head_penalty" in row for row in course.log] == [False] + 7 * [True]


def test_it_resumes_to_the_bit_amid_settling(tmp_path: Path) -> None:
    config = replace(LESSONS, stop_at=-1.0, settling=3)
    whole, first, second = begun(config), begun(config), begun(config)
    for _ in range(5):
        whole.advance()
    for _ in range(2):
        first.advance()
    assert first.passed_at == 0
    first.save(tmp_path)
    second.resume(tmp_path)
    for _ in range(3):
        second.advance()
    assert second.log == whole.log
    assert second.state() == whole.state()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
