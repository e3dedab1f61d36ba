"""Edge attribution against the algorithm of EAP-IG's own library, at both ends of the Riemann sum, and in chunks of
whatever size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import entity_pairs, left_padded

from benchmarks.eap_ig import eap_ig
from workbench.models.hooked_model import Teacher
from workbench.models.parts import decoder_parts
from workbench.patching.attribution import _points, attribute_edges
from workbench.patching.edge_gradients import Sent, through_norm
from workbench.patching.execution import Execution
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import METRICS

METRIC = METRICS["logit_difference"]
QUIET = Execution(progress=False)


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """Four pairs of 3 boxes, the last two padded on the left."""
    return left_padded(entity_pairs(scenes=2).rows(slice(0, 4)), [2, 3])


@pytest.fixture(scope="module", params=["llama", "gpt2", "neox"])
def model(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Teacher:
    """Grouped-query attention, LayerNorm, parallel blocks."""
    return Teacher.load(model_folder(request.param))


@pytest.mark.parametrize("steps", [1, 5])
def test_the_corrupt_end_gives_the_numbers_of_the_authors_library(model_folder, pairs, steps):
    model = Teacher.load(model_folder("gpt2"))
    whole = pairs.rows(slice(0, 2))  # the library pads on the right
    theirs = eap_ig(model, whole, METRIC, steps=steps)
    ours, clean = (attribute_edges(model, whole, metric=METRIC, steps=steps, end=end) for end in ("corrupt", "clean"))
    real = ~ours.mean().isnan()
    assert float(theirs[~real].abs().max()) == 0.0
    difference = float((ours.mean() - theirs)[real].abs().max())
    assert difference < 1e-6
    assert float((clean.mean() - theirs)[real].abs().max()) > 100 * difference


def test_both_ends_are_the_mean_of_the_two(model, pairs):
    clean, corrupt, both = (
        attribute_edges(model, pairs, metric=METRIC, steps=3, end=end, execution=QUIET).values
        for end in ("clean", "corrupt", "both")
    )
    assert torch.allclose(both, (clean + corrupt) / 2, atol=1e-6, equal_nan=True)
    assert float((clean - corrupt).nan_to_num(0.0).abs().max()) > 1e-3


@pytest.mark.parametrize("end", ["clean", "corrupt", "both"])
def test_the_weights_of_the_points_sum_to_one(end):
    for steps in (1, 2, 5):
        points = _points(steps, end)
        assert sum(points.values()) == pytest.approx(1.0)
        assert (0.0 in points) == (end != "corrupt")
        assert (1.0 in points) == (end != "clean")


def test_chunks_and_batches_of_any_size_give_the_same_scores(model, pairs):
    whole = attribute_edges(model, pairs, metric=METRIC, steps=2, execution=QUIET).values
    row = pairs.clean.shape[1] * int(model.model.cfg.d_model) * 4
    for memory in (1, 60 * row):
        part = attribute_edges(
            model, pairs, metric=METRIC, steps=2, execution=Execution(progress=False, memory=memory)
        ).values
        assert torch.allclose(part, whole, atol=2e-6, equal_nan=True)
    assert float(whole.nan_to_num(0.0).abs().max()) > 1e-2


def test_a_chunk_of_senders_is_a_part_of_all_of_them(model, pairs):
    sent = Sent.of(model, pairs)
    whole = sent.outputs(slice(0, 4), range(sent.count))
    for start, stop in ((0, 1), (1, 4), (3, 9), (5, sent.count)):
        assert torch.equal(sent.outputs(slice(1, 3), range(start, stop)), whole[1:3, start:stop])
    assert float(whole[2:].unflatten(2, (pairs.clean.shape[1], -1))[:, :, :3].abs().max()) == 0.0


def test_the_formula_of_a_norms_gradient_is_autograds(model):
    parts = decoder_parts(model)
    assert parts is not None
    draw = torch.Generator().manual_seed(0)
    residual, gradient = torch.randn(2, 5, 32, generator=draw), torch.randn(2, 3, 5, 32, generator=draw)
    for norm in (parts.blocks[1].norm_attention, parts.blocks[1].norm_mlp):
        expected = through_norm(lambda x, norm=norm: norm(x), residual, gradient)  # a function: autograd's way
        found = through_norm(norm, residual, gradient)
        assert torch.allclose(found, expected, atol=1e-5)
        assert float(expected.abs().max()) > 1.0
