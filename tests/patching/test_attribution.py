"""EAP against TransformerLens' own (where that applies), against finite differences and against exact paths; EAP-IG
adds up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entity_pairs

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.patching.attribution import Edges, agreement, attribute_edges, attribute_nodes, exact_edges
from workbench.patching.engine.hooked import HookedPatcher
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import logit_difference
from workbench.values.refs import Embedding, Head, Mlp, Receiver

METRIC: dict[str, Any] = {"metric": "logit_difference"}


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """Six pairs of 3 boxes."""
    return entity_pairs(scenes=2)


@pytest.fixture(scope="module", params=["llama-mha", "llama", "llama-mqa", "gpt2", "neox"])
def model(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Teacher:
    """Each architecture."""
    return Teacher.load(model_folder(request.param))


@pytest.mark.parametrize("architecture", ["llama-mha", "gpt2"])
def test_edges_equal_transformer_lens_where_it_can(model_folder, pairs, architecture):
    """TransformerLens scores each position of a reader; ours sum over positions. Its clean run is our corrupt one, and
    it counts the change of the metric, we its fall."""
    attribution = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    model = Teacher.load(model_folder(architecture))
    for _, parameter in model.model.named_parameters():
        parameter.requires_grad_(True)
    part = pairs.rows(slice(0, 1))
    answer, distractor = int(part.answers[0]), int(part.distractors[0])
    config = attribution.EdgeAttributionConfig(granularity="edge")
    theirs = attribution.attribution_patch(
        model.model, part.corrupt, part.clean, lambda logits: logits[0, -1, answer] - logits[0, -1, distractor], config
    )
    for _, parameter in model.model.named_parameters():
        parameter.requires_grad_(False)
    ours = attribute_edges(model, part, **METRIC)
    expected: dict[tuple[str, str], float] = {}
    for (writer, reader), score in theirs.edge_scores.items():
        edge = (_name(writer), _name(reader))
        expected[edge] = expected.get(edge, 0.0) - score
    found = {
        (sender, receiver): float(ours.values[i, j, 0])
        for i, sender in enumerate(ours.labels["sender"])
        for j, receiver in enumerate(ours.labels["receiver"])
        if not ours.values[i, j, 0].isnan()
    }
    assert set(found) == set(expected)
    largest = max(map(abs, expected.values()))
    assert largest > 0.01
    assert max(abs(found[edge] - expected[edge]) for edge in found) <= 1e-4 * largest


def _name(node: Any) -> str:
    return {
        "embed": "embed",
        "attn_head_out": f"L{node.layer}H{node.head}",
        "mlp_out": f"M{node.layer}",
        "mlp_in": f"M{node.layer}",
        "logits": "logits",
    }.get(node.kind, f"L{node.layer}H{node.head}.{node.kind[0]}")


@pytest.mark.parametrize("sender", [Embedding(), Head(0, 1), Mlp(0), Head(2, 3), Mlp(2)], ids=str)
def test_a_senders_edges_sum_to_the_slope_of_its_total_effect(model, pairs, sender):
    """Central differences by hooks: the sender moved a little of the way to its corrupt output, everything after it
    recomputed."""
    name = {
        Embedding: lambda s: hooks.residual_pre(0),
        Head: lambda s: hooks.z(s.layer),
        Mlp: lambda s: hooks.mlp_output(s.layer),
    }[type(sender)](sender)
    with torch.no_grad():
        clean, corrupt = (
            model.activations(tokens, pairs.mask, [name])[1][name] for tokens in (pairs.clean, pairs.corrupt)
        )
        change = corrupt - clean
        if isinstance(sender, Head):
            change = change * (torch.arange(model.n_heads) == sender.index)[:, None]

        def slope_over(step: float) -> torch.Tensor:
            ends = []
            for share in (step, -step):
                with hooks.edit(model.model, {name: lambda activation, share=share: activation + share * change}):
                    ends.append(
                        logit_difference(model.final_logits(pairs.clean, pairs.mask), pairs.answers, pairs.distractors)
                    )
            return (ends[1] - ends[0]) / (2 * step)

        slope = (4 * slope_over(0.01) - slope_over(0.02)) / 3  # Richardson: without the curve's cubic part
    found = attribute_nodes(attribute_edges(model, pairs, **METRIC))
    assert found.labels["sender"][0] == "embed"
    mine = found.select(sender=str(sender)).values
    assert float((mine - slope).abs().max()) <= 2e-3 * float(slope.abs().max()) + 5e-4
    assert float(slope.abs().max()) > 0.02 or model.has_parallel_blocks


def test_averaged_gradients_add_up_to_the_whole_change(model, pairs):
    """Completeness of integrated gradients: the embedding's total over the path is the change of the metric from clean
    to corrupt inputs."""
    with torch.no_grad():
        clean, corrupt = (
            logit_difference(model.final_logits(tokens, pairs.mask), pairs.answers, pairs.distractors)
            for tokens in (pairs.clean, pairs.corrupt)
        )
    errors = []
    for steps in (1, 64):
        scores = attribute_edges(model, pairs, **METRIC, steps=steps)
        total = _total_of_embedding(model, pairs, steps)
        errors.append(float((total - (corrupt - clean)).abs().mean()))
        assert ("IG" in scores.unit) == (steps > 1)
    assert errors[1] < 0.1 * float((corrupt - clean).abs().mean())
    assert errors[1] < 0.5 * errors[0]


def _total_of_embedding(model: Teacher, pairs: PromptPairs, steps: int) -> torch.Tensor:
    """Sum of (corrupt - clean embedding) . averaged gradient at the embedding, straight from autograd on the hooked
    model."""
    name, total = hooks.residual_pre(0), torch.zeros(len(pairs))
    with torch.no_grad():
        start, end = (model.activations(tokens, pairs.mask, [name])[1][name] for tokens in (pairs.clean, pairs.corrupt))
    for step in range(steps):
        leaf = (start + step / steps * (end - start)).requires_grad_()
        with hooks.edit(model.model, {name: lambda activation, leaf=leaf: leaf}):
            values = logit_difference(model.final_logits(pairs.clean, pairs.mask), pairs.answers, pairs.distractors)
        total += (torch.autograd.grad(values.sum(), leaf)[0] * (end - start)).sum((1, 2)).detach() / steps
    return total


def test_the_estimate_ranks_edges_as_exact_paths_do(model, pairs):
    estimated, averaged = (attribute_edges(model, pairs, **METRIC, steps=steps) for steps in (1, 8))
    exact = exact_edges(model, pairs, **METRIC)
    assert exact.axes == estimated.axes
    assert exact.labels == estimated.labels
    assert agreement(exact, exact) == pytest.approx(1.0)
    correlations = [agreement(scores, exact) for scores in (estimated, averaged)]
    assert min(correlations) > 0.3
    means = exact.mean()
    assert float(means[~means.isnan()].abs().max()) > 0.01


def test_exact_edges_are_exact_paths(model, pairs):
    exact = exact_edges(model, pairs, **METRIC, senders=[Head(0, 1), Mlp(0), Embedding()])
    slow = HookedPatcher(model, pairs)
    clean = logit_difference(slow.clean_logits, pairs.answers, pairs.distractors)
    for sender in (Head(0, 1), Mlp(0), Embedding()):
        for receiver in (Receiver(Head(1, 2), "q"), Receiver(Head(2, 0), "v")):
            logits = slow.logits([sender], receivers=[receiver], freeze_mlps=True)
            expected = clean - logit_difference(logits, pairs.answers, pairs.distractors)
            place = exact.labels["sender"].index(str(sender)), exact.labels["receiver"].index(str(receiver))
            assert torch.allclose(exact.values[place], expected, atol=1e-5)


def test_the_graph_has_no_edge_upstream(model):
    edges = Edges.of(model)
    there = edges.connected(parallel=model.has_parallel_blocks)
    sender, receiver = edges.senders.index(Head(1, 0)), edges.receivers.index(Mlp(1))
    assert bool(there[sender, receiver].isnan()) == model.has_parallel_blocks
    assert bool(there[edges.senders.index(Mlp(1)), edges.receivers.index(Receiver(Head(1, 1), "q"))].isnan())
    assert not bool(there[:, edges.receivers.index("logits")].isnan().any())


def test_no_gradient_point_is_refused(model, pairs):
    with pytest.raises(InputError, match="at least 1"):
        attribute_edges(model, pairs, **METRIC, steps=0)
