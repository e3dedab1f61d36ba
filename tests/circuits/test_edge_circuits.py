"""Circuits of edges: against a slow node-by-node run of hooked forwards, at the limits, and as MIB counts them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import entity_pairs, left_padded
from torch import Tensor

from tests.patching.test_known_circuit import CIRCUIT, known, write  # noqa: F401 (fixtures)
from tests.patching.test_known_edges import AGAINST, TRUE
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.edge import Edge
from workbench.circuits.edge_faithfulness import BUDGETS, EdgeCurve, EdgeFaithfulness, edge_curve
from workbench.circuits.edge_selection import EdgeSelection, Ranking, edge_circuit, edge_mask, stable
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, Teacher, last_position
from workbench.patching.attribution import Edges, attribute_edges
from workbench.patching.edge_circuit import EdgePatcher
from workbench.patching.execution import Execution
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Embedding, Head, Mlp, Receiver
from workbench.values.scores import Scores

QUIET = Execution(progress=False)


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """Four pairs of 3 boxes, the last one padded on the left."""
    return left_padded(entity_pairs(scenes=2).rows(slice(0, 4)), [3])


@pytest.fixture(scope="module", params=["llama", "gpt2", "neox"])
def model(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Teacher:
    """Grouped-query attention with rotary positions, LayerNorm, parallel blocks."""
    return Teacher.load(model_folder(request.param))


@pytest.fixture(scope="module")
def scores(model, pairs) -> Scores:
    """EAP-IG."""
    return attribute_edges(model, pairs, metric="logit_difference", steps=2, execution=QUIET)


def some_edges(patcher: EdgePatcher, share: float, seed: int) -> Tensor:
    draw = torch.rand(patcher.there.shape, generator=torch.Generator().manual_seed(seed))
    return patcher.there & (draw < share)


def slow_logits(model: HookedModel, pairs: PromptPairs, present: Tensor) -> Tensor:
    """Node by node: each receiver's input is summed up from all senders, put in by a hook on the whole layer, and its
    own part of what comes out is kept."""
    edges, layers = Edges.of(model), range(model.n_layers)
    names = [hooks.residual_pre(0), *(kind(layer) for layer in layers for kind in (hooks.z, hooks.mlp_output))]
    read = [hooks.residual_post(model.n_layers - 1), *(kind(i) for i in layers for kind in (hooks.residual_pre,))]
    read += [hooks.attention_output(layer) for layer in layers]
    corrupt = model.activations(pairs.corrupt, pairs.mask, [*names, *read])[1]
    clean = model.activations(pairs.clean, pairs.mask, names)[1]

    def run(edits: dict[str, Tensor], name: str) -> Tensor:
        with (
            torch.no_grad(),
            hooks.edit(model.model, {key: lambda _, value=value: value for key, value in edits.items()}),
        ):
            return model.activations(pairs.corrupt, pairs.mask, [name])[1][name]

    def of(run_: dict[str, Tensor], sender: object) -> Tensor:
        if isinstance(sender, Head):
            return model.head_outputs(sender.layer, run_[hooks.z(sender.layer)])[:, :, sender.index].detach()
        return run_[hooks.mlp_output(sender.layer) if isinstance(sender, Mlp) else hooks.residual_pre(0)]

    change = {0: clean[hooks.residual_pre(0)] - corrupt[hooks.residual_pre(0)]}

    def into(base: Tensor, receiver: object) -> Tensor:
        column = present[:, edges.receivers.index(receiver)]  # type: ignore[arg-type]
        return base + sum(value for sender, value in change.items() if bool(column[sender]))

    group = model.n_heads // model.n_kv_heads
    for layer in layers:
        pre, written = hooks.residual_pre(layer), {}
        for index in range(model.n_heads):
            first = Head(layer, index - index % group)
            ends = {"q": Receiver(Head(layer, index), "q"), "k": Receiver(first, "k"), "v": Receiver(first, "v")}
            parts = {
                kind(layer): run({pre: into(corrupt[pre], ends[name])}, kind(layer))
                for name, kind in (("q", hooks.q), ("k", hooks.k), ("v", hooks.v))
            }
            z = run(parts, hooks.z(layer))
            sender = edges.senders.index(Head(layer, index))
            written[sender] = of({hooks.z(layer): z}, Head(layer, index)) - of(corrupt, Head(layer, index))
        if not model.has_parallel_blocks:
            change |= written
        middle = corrupt[pre] if model.has_parallel_blocks else corrupt[pre] + corrupt[hooks.attention_output(layer)]
        edits = {pre: into(middle, Mlp(layer)), hooks.attention_output(layer): torch.zeros_like(middle)}
        mlp = run(edits, hooks.mlp_output(layer))
        change |= written | {edges.senders.index(Mlp(layer)): mlp - corrupt[hooks.mlp_output(layer)]}
    final = into(corrupt[read[0]], "logits")
    with torch.no_grad(), hooks.edit(model.model, {read[0]: lambda _: final}):
        return model.final_logits(pairs.corrupt, pairs.mask)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_it_is_the_slow_run_node_by_node(model, pairs, share):
    patcher = EdgePatcher(model, pairs, execution=Execution(progress=False, memory=1))
    present = some_edges(patcher, share, seed=int(100 * share))
    found, expected = patcher.logits(present), slow_logits(model, pairs, present)
    assert torch.allclose(found, expected, atol=1e-5)
    corrupt = model.final_logits(pairs.corrupt, pairs.mask)
    clean = model.final_logits(pairs.clean, pairs.mask)
    assert min(float((expected - end).abs().max()) for end in (corrupt, clean)) > 1e-3


def test_all_edges_are_the_clean_run_and_none_the_corrupt_one(model, pairs):
    patcher = EdgePatcher(model, pairs)
    ends = [model.final_logits(tokens, pairs.mask) for tokens in (pairs.clean, pairs.corrupt)]
    for present, expected in zip((patcher.there, patcher.there & False), ends, strict=True):
        assert torch.allclose(patcher.logits(present), expected, atol=1e-5)
    assert float((ends[0] - ends[1]).abs().max()) > 0.1


def test_the_embedding_alone_carries_nothing_until_its_edges_reach_the_logits(model, pairs):
    patcher = EdgePatcher(model, pairs)
    edges, present = patcher.edges, patcher.there & False
    present[0, edges.receivers.index(Receiver(Head(1, 0), "q"))] = True  # leads nowhere
    assert not edges.pruned(present).any()
    present[edges.senders.index(Head(1, 0)), -1] = True
    assert torch.equal(edges.pruned(present), present)
    present[edges.senders.index(Mlp(0)), -1] = True  # nothing reaches it
    assert int(edges.pruned(present).sum()) == 2


def test_an_edge_that_there_is_not_and_another_shape_are_refused(model, pairs):
    patcher = EdgePatcher(model, pairs)
    backward = patcher.there.clone()
    backward[patcher.edges.senders.index(Mlp(2)), 0] = True
    for bad in (backward, patcher.there[1:]):
        with pytest.raises(InputError, match="make it from scores of this model"):
            patcher.logits(bad)


def test_areas_are_mibs_trapezoids_from_a_thousandth_to_all(model, pairs, scores):
    faithfulness = EdgeFaithfulness(model, pairs, metric="logit_difference", execution=QUIET)
    curve = edge_curve(faithfulness, scores)
    assert curve.budgets == BUDGETS == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    area = from_one = 0.0
    for place in range(len(BUDGETS) - 1):
        width = BUDGETS[place + 1] - BUDGETS[place]
        one, two = curve.faithfulness[place : place + 2]
        area += width * (one + two) / 2
        from_one += width * (abs(1 - one) + abs(1 - two)) / 2
    assert (curve.cpr, curve.cmd) == (pytest.approx(area), pytest.approx(from_one))
    assert curve.faithfulness[-1] == pytest.approx(1.0)
    assert curve.edges[-1] == curve.total_edges == Ranking(scores, EdgeSelection()).total
    heads, layers = model.n_heads, model.n_layers  # MIB's graph has q, k and v of every query head
    inner = [1 + layer * (heads + 1) for layer in range(layers)]
    mlps = sum(before + (0 if model.has_parallel_blocks else heads) for before in inner)
    assert curve.total_edges == 3 * heads * sum(inner) + mlps + 1 + layers * (heads + 1)
    assert EdgeCurve.from_json(json.loads(json.dumps(curve.to_json()))) == curve
    assert "CPR" in repr(curve)


@pytest.mark.parametrize(
    "selection",
    [EdgeSelection(by="highest"), EdgeSelection(), EdgeSelection(greedy=True), EdgeSelection(positive=0.5)],
    ids=str,
)
def test_selections_fill_their_budget_and_grow(scores, selection):
    ranking = Ranking(scores, selection)
    before = ranking.choose(0)
    assert not before.any()
    for count in (3, 20, 60, ranking.total):
        chosen = ranking.choose(count)
        size = float((chosen * ranking.counts).sum())
        assert count - ranking.edges.group < size <= count
        assert not (chosen & scores.mean().isnan()).any()
        if selection.positive is None:
            assert not (before & ~chosen).any()
        before = chosen
    assert torch.equal(ranking.choose(ranking.total), ~scores.mean().isnan())


def test_greedy_is_a_slow_loop_from_the_logits_up(scores):
    ranking = Ranking(scores, EdgeSelection(greedy=True, by="highest"))
    means, feeds = scores.mean() / ranking.counts, ranking.edges.feeds()
    chosen, left = torch.zeros_like(ranking.there), 40.0
    while True:
        inside = (feeds & chosen.any(1)).any(1)  # receivers of nodes with an edge out
        inside[-1] = True
        best = torch.where(ranking.there & ~chosen & inside, means, -torch.inf)
        place = divmod(int(best.argmax()), best.shape[1])
        left -= float(ranking.counts[place[1]])
        if left < 0:
            break
        chosen[place] = True
    assert torch.equal(ranking.choose(40), chosen)
    assert not torch.equal(chosen, Ranking(scores, EdgeSelection(by="highest")).choose(40))
    onward = (feeds & chosen.any(1)).any(1)
    onward[-1] = True
    assert bool(onward[chosen.any(0)].all())  # every edge leads on to the logits


def test_the_positive_share_lies_between_the_two_orders(scores):
    highest, size = (Ranking(scores, EdgeSelection(by=by)).choose(30) for by in ("highest", "magnitude"))  # type: ignore[arg-type]
    assert torch.equal(Ranking(scores, EdgeSelection(positive=1.0)).choose(30), highest)
    assert torch.equal(Ranking(scores, EdgeSelection(positive=0.0)).choose(30), size)
    half, means = Ranking(scores, EdgeSelection(positive=0.5)).choose(30), scores.mean()
    negatives = [int((means[mask] < 0).sum()) for mask in (highest, half, size)]
    assert negatives[0] < negatives[1] <= negatives[2]


def test_the_bootstrap_sets_edges_back_whose_sign_is_chance():
    draw = torch.Generator().manual_seed(0)
    edges = Edges.of_shape(1, 2, 2)
    there = edges.connected(parallel=False)
    values = 0.01 * torch.randn(*there.shape, 12, generator=draw) + there[..., None]
    values[0, 0] = 5 * torch.tensor([1.0, -1.0] * 6) + 2.0  # the greatest mean, of either sign
    scores = Scores(values=values, axes=("sender", "receiver", "example"), labels=edges.labels, unit="x")
    held = stable(scores, resamples=200)
    assert not held[0, 0]
    assert held.sum() == (~there.isnan()).sum() - 1
    plain, set_back = (Ranking(scores, EdgeSelection(resamples=n)).choose(1) for n in (0, 200))
    assert plain[0, 0]
    assert not set_back[0, 0]
    assert torch.equal(held, stable(scores, resamples=200))
    with pytest.raises(InputError, match="two prompts"):
        stable(_mean(scores), resamples=10)


def _mean(scores: Scores) -> Scores:
    return Scores(values=scores.mean(), axes=scores.axes[:2], labels=scores.labels, unit=scores.unit)


def test_values_are_kept_and_another_evaluations_are_refused(model, pairs, scores, tmp_path, monkeypatch):
    file = tmp_path / "values.json"
    execution = Execution(progress=False, file=file)
    first = edge_curve(EdgeFaithfulness(model, pairs, metric="logit_difference", execution=execution), scores)
    again = EdgeFaithfulness(model, pairs, metric="logit_difference", execution=execution)
    monkeypatch.setattr(EdgePatcher, "logits", lambda *_: pytest.fail("computed again"))
    assert edge_curve(again, scores) == first
    with pytest.raises(InputError, match="another metric"):
        EdgeFaithfulness(model, pairs, metric="log_probability", execution=execution)


def test_bad_settings_say_their_remedy(model, pairs, scores):
    faithfulness = EdgeFaithfulness(model, pairs, metric="logit_difference", execution=QUIET)
    with pytest.raises(InputError, match="rising order"):
        edge_curve(faithfulness, scores, budgets=(0.5, 0.1))
    with pytest.raises(InputError, match="share from 0 to 1"):
        EdgeSelection(positive=1.5)
    with pytest.raises(InputError, match="attribute_edges"):
        Ranking(Scores.of_heads(torch.zeros(3, 4), unit="x"), EdgeSelection())
    with pytest.raises(InputError, match="nothing to recover"):
        EdgeFaithfulness(
            model,
            PromptPairs(
                clean=pairs.clean,
                corrupt=pairs.clean,
                mask=pairs.mask,
                answers=pairs.answers,
                distractors=pairs.distractors,
                positions=pairs.positions,
            ),
            metric="logit_difference",
        )


def test_the_true_edges_carry_the_known_circuit_and_as_many_others_do_not(known):  # noqa: F811
    """Predicted = measured: the edges that were written by hand, and no other, give the whole model's answers."""
    pairs = entity_pairs(split="calibration", scenes=2, seed=1)
    faithfulness, edges = EdgeFaithfulness(known, pairs, metric="logit_difference", execution=QUIET), Edges.of(known)
    circuit = Circuit.of(
        [Member(head, "edges", "all") for head in CIRCUIT],
        shape=(known.n_layers, known.n_heads),
        method="by hand",
        mlps=[],
        edges=[_edge(edges, *names) for names in TRUE],
    )
    assert faithfulness.of(circuit) > 0.95
    assert faithfulness.of(edge_mask(edges, circuit)) == faithfulness.of(circuit)
    scores = attribute_edges(known, pairs, metric="logit_difference", steps=16, execution=QUIET)
    ranked = Ranking(scores, EdgeSelection(by="highest")).circuit(len(TRUE), method="EAP-IG")
    assert set(map(str, ranked.edges or ())) == set(map(str, circuit.edges or ()))
    assert ranked.heads == circuit.heads
    for left_out in sorted(TRUE)[:4]:
        assert faithfulness.of(_without(edges, circuit, *left_out)) < 0.8
    assert len(AGAINST) == 5


def _edge(edges: Edges, sender: str, receiver: str) -> Edge:
    rows = dict(zip(map(str, edges.senders), edges.senders, strict=True))
    columns = dict(zip(map(str, edges.receivers), edges.receivers, strict=True))
    return Edge(sender=rows[sender], receiver=columns[receiver])


def _without(edges: Edges, circuit: Circuit, sender: str, receiver: str) -> Tensor:
    mask = edge_mask(edges, circuit)
    mask[edges.labels["sender"].index(sender), edges.labels["receiver"].index(receiver)] = False
    return mask


def test_a_circuit_with_edges_is_written_and_read_and_joins(scores):
    circuit = Ranking(scores, EdgeSelection()).circuit(80, method="EAP")
    assert circuit.edges
    assert Circuit.from_json(json.loads(json.dumps(circuit.to_json()))) == circuit
    assert circuit.nodes[0] == Embedding()
    assert circuit.nodes[-1] == "logits"
    assert {node for node in circuit.nodes if isinstance(node, Mlp)} == set(circuit.mlps or ())
    head = circuit.heads[0]
    smaller = circuit.without([head])
    assert smaller.edges is not None
    assert not any(head in (edge.sender, edge.into) for edge in smaller.edges)
    assert len(smaller.edges) < len(circuit.edges)
    assert (circuit & smaller).edges == smaller.edges
    assert (circuit | smaller).edges == circuit.edges
    plain = Circuit.of([Member(head, "a", "last")], shape=circuit.shape, method="x")
    assert (circuit | plain).edges is None
    assert set(plain.to_json()) == {"members", "shape", "method"}  # as files were before
    assert [type(node) for node in plain.nodes].count(Mlp) == plain.shape[0]
    empty = edge_circuit(Ranking(scores, EdgeSelection()).edges, np_mask(scores), scores=scores.mean(), method="none")
    assert empty.edges == ()


def np_mask(scores: Scores) -> Tensor:
    return torch.from_numpy(np.zeros(tuple(scores.mean().shape), dtype=bool))


def test_an_edge_outside_the_model_is_refused():
    with pytest.raises(InputError, match="outside a model"):
        Circuit.of([], shape=(1, 2), method="x", edges=[Edge(sender=Head(3, 0), receiver="logits")])
    with pytest.raises(InputError, match="has no edges"):
        edge_mask(Edges.of_shape(1, 2, 2), Circuit.of([], shape=(1, 2), method="x"))
    assert last_position(torch.ones(1, 3, dtype=torch.bool)).tolist() == [2]
