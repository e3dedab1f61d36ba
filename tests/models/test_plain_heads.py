"""Heads of a plain transformers model: what is read equals TransformerLens's `hook_z`, slices are the bridge's, packed
prompts and unknown models are refused."""

from pathlib import Path

import pytest
import torch
from miniatures import SUPPORTED, miniature
from torch import nn
from transformers import AutoModelForCausalLM

from tests.conftest import entity_pairs
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import Student
from workbench.models.plain_heads import PlainHeads
from workbench.values.refs import Head

PROMPTS = entity_pairs()


WAYS = ("Qwen2", "Qwen3", "Phi", "Phi3", "GPT2", "GPTNeoX")
"""Of each way to store an attention a family: a matrix each (with biases; heads wider than their share; another name of
the output projection), one matrix by kind (Linear, Conv1D), one matrix by head."""


@pytest.mark.parametrize("family", WAYS)
def test_head_outputs_and_their_gradients_equal_the_bridges(family: str, tmp_path: Path) -> None:
    """The same outputs by name, and the same gradient of one head's output in its own slices, which are the bridge's in
    order, though GPT-2, NeoX and Phi-3 store them in one matrix."""
    folder = miniature(family, SUPPORTED[family], tmp_path / "model")
    student = Student.load(folder, check=False)
    plain = PlainHeads(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval())
    names, head = [hooks.z(layer) for layer in range(3)], Head(1, 2)
    _, theirs = student.activations(PROMPTS.clean, PROMPTS.mask, names, gradients=True)
    ours = plain.activations(PROMPTS.clean, PROMPTS.mask, names)
    for name in names:
        torch.testing.assert_close(ours[name][PROMPTS.mask], theirs[name][PROMPTS.mask], rtol=1e-4, atol=1e-5)
        assert float(ours[name][PROMPTS.mask].detach().abs().max()) > 100 * 1e-5
    assert torch.equal(plain.output_weights(1), student.output_weights(1))
    ours, theirs = (
        torch.autograd.grad(
            found[hooks.z(1)][:, :, head.index][PROMPTS.mask].square().sum(),
            [model.parameters()[part.parameter] for part in parts],
            materialize_grads=True,
        )
        for model, found, parts in (
            (plain, ours, plain.head_slices(head)),
            (student, theirs, student.head_slices(head)),
        )
    )
    mine, others = plain.head_slices(head), student.head_slices(head)
    assert len(mine) == len(others)
    moved = 0.0
    for (gradient, part), (other, theirs_part) in zip(
        zip(ours, mine, strict=True), zip(theirs, others, strict=True), strict=True
    ):
        first, second = gradient[part.index], other[theirs_part.index]
        same = second if first.shape == second.shape and part.inputs_first == theirs_part.inputs_first else second.T
        torch.testing.assert_close(first, same, rtol=1e-3, atol=1e-4)
        moved = max(moved, float(first.abs().max()))
    assert moved > 100 * 1e-4


def test_padding_side_does_not_matter_to_what_is_read(tmp_path: Path) -> None:
    """Rotary positions are relative, so a left-padded row computes the same at its real tokens."""
    plain = PlainHeads(AutoModelForCausalLM.from_pretrained(miniature("Llama", {}, tmp_path / "model")).eval())
    tokens, mask = PROMPTS.clean[:3], PROMPTS.mask[:3]
    pad = torch.zeros(3, 4, dtype=torch.long)
    left, right = (torch.cat(parts, 1) for parts in ((pad, tokens), (tokens, pad)))
    sides = [
        plain.activations(rows, keep, [hooks.z(1)])[hooks.z(1)][keep]
        for rows, keep in (
            (left, torch.cat([pad.bool(), mask], 1)),
            (right, torch.cat([mask, pad.bool()], 1)),
        )
    ]
    torch.testing.assert_close(*sides, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a transformers model nor a student"):
        PlainHeads(nn.Identity())
    model = AutoModelForCausalLM.from_pretrained(miniature("Llama", {}, tmp_path / "model")).eval()
    heads = PlainHeads(model)
    with pytest.raises(InputError, match="no head L3H0"):
        heads.head_slices(Head(3, 0))
    with pytest.raises(InputError, match="no forward of"), heads.recording([0]):
        pass
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(InputError, match="packing=False"), heads.recording([0]):
        model(input_ids=PROMPTS.clean[:1, :5], position_ids=packed)
    assert not any(module._forward_pre_hooks for module in model.modules())
    for layer in model.model.layers:
        layer.self_attn.renamed = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    with pytest.raises(InputError, match="was found in 0 of them"):
        PlainHeads(model)
