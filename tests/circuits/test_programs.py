"""Ground truth from outside: programs compiled with tracr compute as models of ours what they compute as tracr's, and
their wiring is found."""

import pytest
import torch

from benchmarks.programs import Program, _by_size, exact, load, tokens_of
from workbench.circuits.edge_faithfulness import EdgeFaithfulness
from workbench.circuits.recovery import auroc, node_scores
from workbench.errors import InputError
from workbench.patching.attribution import attribute_edges
from workbench.patching.execution import Execution
from workbench.values.scores import Scores

QUIET = Execution(progress=False)


@pytest.fixture(scope="module", params=["xproportion", "reverse", "induction"])
def program(request: pytest.FixtureRequest) -> Program:
    """Three of the programs (`python -m benchmarks programs` has all)."""
    return load(request.param)


def test_it_answers_as_tracrs_own_model_does(program):
    described, first = program.described, len(program.described["tokens"])
    tokens = torch.tensor([tokens_of(described, example["tokens"]) for example in described["examples"]])
    said = program.model.final_logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[:, first:].detach()
    expected = [example["last"] for example in described["examples"]]
    if isinstance(described["output"], list):
        assert torch.allclose(said[:, 0], torch.tensor(expected), atol=2e-3)
        assert float(torch.tensor(expected).std()) > 0.1
        return
    words = list(described["output"])
    clear = said.topk(2).values
    sure = (clear[:, 0] > 0.99) & (clear[:, 1] < 0.01)  # elsewhere the program averages over several tokens
    assert [words[place] for place in said[sure].argmax(-1).tolist()] == [
        word for word, one in zip(expected, sure.tolist(), strict=True) if one
    ]
    assert len({*expected}) > 1
    assert int(sure.sum()) >= 8


def test_its_wiring_carries_all_of_it_and_less_than_its_wiring_does_not(program):
    faithfulness = EdgeFaithfulness(program.model, program.pairs, metric="logit_difference", execution=QUIET)
    assert faithfulness.of(program.changing) == pytest.approx(1.0, abs=5e-3)
    assert bool((program.wired | ~program.changing).all())
    into_logits = program.changing.clone()
    into_logits[:, -1] = False
    assert faithfulness.of(into_logits) == pytest.approx(0.0, abs=1e-6)


def test_leaving_out_each_edge_finds_the_wiring(program):
    few = program.pairs.rows(slice(0, 6))
    scores = _by_size(exact(program.model, few))
    assert auroc(scores, program.changing) > 0.85
    outside = scores.mean()[~program.changing & ~scores.mean().isnan()]
    assert float(outside.max()) < 1e-3 * float(scores.mean().nan_to_num(0.0).max())


def test_gradients_find_the_heads_and_mlps(program):
    scores = _by_size(
        attribute_edges(program.model, program.pairs, metric="logit_difference", steps=4, execution=QUIET)
    )
    live = program.changing.any(1)[1:]
    if not bool(live.all()):
        assert auroc(node_scores(scores), live) > 0.9


def test_the_area_is_that_of_all_pairs_counted_one_by_one():
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (5, 6), generator=draw).float()
    values[0, 0] = torch.nan
    truth = torch.rand(5, 6, generator=draw) < 0.4
    scores = Scores(values=values, axes=("sender", "receiver"), labels={}, unit="x")
    sizes = values.abs()
    inside = [float(v) for v, t in zip(sizes.flatten(), truth.flatten(), strict=True) if t and v == v]
    outside = [float(v) for v, t in zip(sizes.flatten(), truth.flatten(), strict=True) if not t and v == v]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside)
    assert auroc(scores, truth) == pytest.approx(wins / len(inside) / len(outside))
    with pytest.raises(InputError, match="inside the circuit and outside"):
        auroc(scores, torch.ones_like(truth))
    with pytest.raises(InputError, match="shape"):
        auroc(scores, truth[1:])
