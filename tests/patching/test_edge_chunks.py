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
from workbench.patching.edge_gradients import Sent
from workbench.patching.execution import Execution
from workbench.patching.norm_gradients import Readers, through_norm
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


@pytest.mark.parametrize("frozen", [False, True])
def test_the_formula_of_a_norms_gradient_is_autograds_summed_over_points(model, frozen):
    parts = decoder_parts(model)
    assert parts is not None
    block, draw = parts.blocks[1], torch.Generator().manual_seed(0)
    weight = block.weight_qkv.unflatten(1, (-1, parts.d_head))
    for norm, read in ((block.norm_attention, weight), (block.norm_mlp, None)):
        readers, width = (1, 32) if read is None else read.shape[1:]
        shares = (0.5, 0.2, 0.3)
        points = [
            (torch.randn(2, 5, 32, generator=draw), torch.randn(2, 5, readers, width, generator=draw)) for _ in shares
        ]
        rule = Readers(norm=norm, weight=read, frozen=frozen)
        expected = torch.zeros(2, readers, 5, 32)
        for share, (residual, gradient) in zip(shares, points, strict=True):
            rule.add(residual, gradient, share)
            spelled = gradient if read is None else torch.einsum("bprw,drw->bprd", gradient, read)
            expected += share * through_norm(norm, residual, spelled.transpose(1, 2), frozen=frozen)
        assert torch.allclose(rule.at(slice(None)), expected, atol=1e-5)
        assert torch.equal(rule.at(slice(1, 2)), rule.at(slice(None))[1:])
        assert float(expected.abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["plain", "relp"])
@pytest.mark.parametrize("end", ["clean", "corrupt", "both"])
def test_gradients_summed_over_points_give_what_points_one_by_one_give(model, pairs, end, kind, monkeypatch):
    """More points than are summed at a time; against sums of no more than one, and norms by autograd."""
    scores = []
    for together, by_formula in ((2, True), (1, True), (1, False)):
        monkeypatch.setattr("workbench.patching.attribution.POINTS", together)
        if not by_formula:
            monkeypatch.setattr("workbench.patching.norm_gradients.FULL", ())
        scores.append(attribute_edges(model, pairs, metric=METRIC, steps=5, end=end, rule=kind, execution=QUIET).values)
    for other in scores[1:]:
        assert torch.allclose(scores[0], other, atol=2e-6, equal_nan=True)
    assert float(scores[0].nan_to_num(0.0).abs().max()) > 1e-2


@pytest.mark.parametrize("end", ["clean", "corrupt", "both"])
def test_a_run_at_an_end_that_is_a_point_is_not_made_twice(model, pairs, end, monkeypatch):
    """One forward beside the points' own."""
    forwards, final_logits = [], Teacher.final_logits
    monkeypatch.setattr(
        Teacher, "final_logits", lambda self, *inputs: forwards.append(1) or final_logits(self, *inputs)
    )
    attribute_edges(model, pairs, metric=METRIC, steps=3, end=end, execution=QUIET)
    assert len(forwards) == 1 + (4 if end == "both" else 3)
