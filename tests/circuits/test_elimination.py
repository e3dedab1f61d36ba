"""Backward elimination: on a model whose circuit is known, where heads stand in for each other, and resumed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import entity_pairs
from torch import Tensor

from tests.patching.test_known_circuit import (  # noqa: F401
    ANSWER,
    CIRCUIT,
    FIRST,
    SECOND,
    known,
    pairs,
    reference,
    unseen,
    value_fetcher,
    write,
)
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.elimination import Elimination, EliminationConfig, Site, eliminate, positions_of
from workbench.circuits.evaluation import circuit_logits
from workbench.circuits.gates import gate_scores, gated
from workbench.circuits.remaining import stand_ins
from workbench.errors import InputError
from workbench.models import hooks
from workbench.patching.ablation import ablate, ablated_logits
from workbench.patching.engine.remains import Place
from workbench.patching.execution import Execution
from workbench.patching.replacement import reference_means
from workbench.values.metrics import METRICS, kl_divergence
from workbench.values.refs import Head, Mlp

TO_THE_END = EliminationConfig(to_the_end=True)


@pytest.fixture(scope="module")
def whole(known, pairs, reference) -> Elimination:  # noqa: F811
    """The known model, to the end."""
    return eliminate(known, pairs, reference_means(known, reference), TO_THE_END)


def test_the_known_circuit_is_what_is_left(whole, known, reference, unseen):  # noqa: F811
    assert set(whole.circuit.heads) == set(CIRCUIT)
    logits = circuit_logits(known, unseen, whole.circuit, reference_means(known, reference))
    assert float(METRICS["accuracy"](logits, unseen.answers, unseen.distractors).mean()) == 1.0
    assert {site.part for site in whole.ranking[: len(CIRCUIT)]} == set(CIRCUIT)


def test_each_step_is_what_intervening_gives(whole, known, pairs, reference):  # noqa: F811
    means = reference_means(known, reference)
    for removed in (0, 5, 17, 20, 24):
        left = {site.part: ("all",) for site in whole.left(removed)}
        logits = ablated_logits(known, pairs, left, means, complement=True)
        expected = METRICS["log_probability"](logits, pairs.answers, pairs.distractors)
        assert torch.allclose(whole.criterion.values[removed].float(), expected, atol=2e-4)
    assert float(whole.criterion.values[0].mean() - whole.criterion.values[-1].mean()) > 1.0


def test_the_slow_loop_removes_the_same_heads(whole, known, pairs, reference):  # noqa: F811
    means = reference_means(known, reference)
    left, gone = list(known.heads), []
    for _ in range(4):
        costs = {}
        for head in left:
            kept = {other: ("all",) for other in left if other != head}
            logits = ablated_logits(known, pairs, kept, means, complement=True)
            costs[head] = float(METRICS["log_probability"](logits, pairs.answers, pairs.distractors).double().mean())
        best = max(left, key=lambda head: costs[head])
        expected = float(whole.criterion.values[len(gone) + 1].mean())
        assert costs[best] == pytest.approx(expected, abs=1e-4)
        gone.append(whole.order[len(gone)].part)  # heads of no effect tie to rounding: follow the fast one
        left.remove(gone[-1])
        assert costs[gone[-1]] == pytest.approx(costs[best], abs=1e-4)


def test_heads_that_stand_in_for_each_other_are_seen(write, pairs, reference):  # noqa: F811
    """Two value fetchers for each half of the code: no single ablation costs anything, and elimination keeps one."""
    twins = {Head(4, 1): Head(4, 3), Head(5, 3): Head(5, 2)}
    model = write({Head(4, 3): value_fetcher(ANSWER, FIRST), Head(5, 2): value_fetcher(ANSWER, SECOND)})
    means = reference_means(model, reference)
    profile = ablate(model, pairs, means, metric="log_probability")
    transmitter = float(profile.at(Head(3, 1)).mean())
    singles = [float(profile.at(head).mean()) for pair in twins.items() for head in pair]
    assert max(singles) < 0.05 * transmitter, "each has its twin"
    left = set(eliminate(model, pairs, means, EliminationConfig(target=0.99)).circuit.heads)
    for one, other in twins.items():
        assert (one in left) != (other in left)
    assert left - set(twins) - set(twins.values()) == set(CIRCUIT) - set(twins)


def test_positions_are_found_where_heads_act(known, pairs, reference):  # noqa: F811
    config = EliminationConfig(positions=("last", "query_label", "labels"), target=0.99, exact_from=14)
    with pytest.raises(InputError, match="share tokens"):
        positions_of(pairs, ("labels", "earlier_label"))
    result = eliminate(known, pairs, reference_means(known, reference), config)
    acts = {head: position for head, (_, position, _) in CIRCUIT.items()}
    expected = {Member(head, "elimination", at.replace("earlier_label", "labels")) for head, at in acts.items()}
    assert set(result.circuit.members) == expected
    assert str(result.sites[3]).endswith(" at not last+query_label+labels")


@pytest.mark.parametrize("criterion", ["log_probability", "logit_difference", "kl_divergence"])
def test_replay_and_hooks_agree(load_teacher, criterion):
    model, some = load_teacher("llama", layers=2), entity_pairs(scenes=2)
    means = reference_means(model, entity_pairs(scenes=3, seed=5))
    config = EliminationConfig(criterion=criterion, to_the_end=True, mlps=True)
    fast, slow = (
        eliminate(model, some, means, config, execution=Execution(engine=each)) for each in ("replay", "hooks")
    )
    assert fast.order == slow.order
    assert any(isinstance(site.part, Mlp) for site in fast.order)
    assert torch.allclose(fast.criterion.values, slow.criterion.values, atol=2e-5)
    assert float(fast.criterion.values.std()) > 2e-3


def test_batches_change_nothing_beyond_rounding(load_teacher):
    model, some = load_teacher("gpt2"), entity_pairs(scenes=4)
    means = reference_means(model, entity_pairs(scenes=3, seed=5))
    one, other = (eliminate(model, some, means, TO_THE_END, execution=Execution(batch=size)) for size in (256, 5))
    assert one.order == other.order
    assert torch.allclose(one.criterion.values, other.criterion.values, atol=1e-5)


def test_an_interrupted_elimination_ends_with_the_same_bits(whole, known, pairs, reference, tmp_path: Path):  # noqa: F811
    means, file = reference_means(known, reference), tmp_path / "elimination.json"
    again = eliminate(known, pairs, means, TO_THE_END, execution=Execution(file=file))
    record = json.loads(file.read_text())
    cut = {
        **record,
        "order": record["order"][:9],
        "rows": record["rows"][:10],
        "rivals": record["rivals"][:9],
        "exact": True,
    }
    file.write_text(json.dumps(cut))
    resumed = eliminate(known, pairs, means, TO_THE_END, execution=Execution(file=file))
    assert resumed.order == again.order == whole.order
    assert torch.equal(resumed.criterion.values, whole.criterion.values)
    with pytest.raises(InputError, match="of another model"):
        eliminate(known, pairs, means, EliminationConfig(), execution=Execution(file=file))


def test_the_target_is_kept(whole):
    assert whole.reaches(whole.removals)
    assert not any(whole.reaches(count) for count in range(whole.removals + 1, len(whole.order) + 1))
    early = eliminate_to(whole)
    assert whole.share(early) < whole.config.target <= whole.share(early - 1)


def eliminate_to(whole: Elimination) -> int:
    """The first removal that falls below the target."""
    return next(count for count in range(len(whole.order) + 1) if not whole.reaches(count))


def test_kl_as_the_bound(known, pairs, reference):  # noqa: F811
    config = EliminationConfig(criterion="kl_divergence", until="kl_divergence", target=0.05)
    means = reference_means(known, reference)
    result = eliminate(known, pairs, means, config)
    left = {site.part: ("all",) for site in result.left(result.removals)}
    logits, full = ablated_logits(known, pairs, left, means, complement=True), ablated_logits(known, pairs, {}, means)
    assert float(kl_divergence(logits, full).mean()) <= 0.05


def test_a_site_is_written_and_read():
    for site in (Site(Head(3, 1)), Site(Mlp(2), "last"), Site(Head(0, 11), "not last+labels")):
        assert Site.parse(str(site)) == site


def test_overlap_is_refused(known, pairs):  # noqa: F811
    with pytest.raises(InputError, match="reference"):
        eliminate(known, pairs, reference_means(known, pairs))


def test_a_circuit_of_positions_is_a_circuit(known):  # noqa: F811
    circuit = Circuit.of([Member(Head(0, 1), "elimination", "not last")], shape=(6, 4), method="x")
    assert Circuit.from_json(circuit.to_json()) == circuit


def test_rounds_by_attribution_then_exact_find_the_circuit(whole, known, pairs, reference, unseen):  # noqa: F811
    """As the exact search, at a fraction of its evaluations; a round that would miss the target is taken back."""
    means = reference_means(known, reference)
    config = EliminationConfig(exact_from=10, round_steps=2, target=0.99)
    result = eliminate(known, pairs, means, config)
    assert set(result.circuit.heads) == set(CIRCUIT)
    in_rounds = [rivals is None for rivals in result.rivals]
    assert in_rounds.index(False) == sum(in_rounds) >= 6, "rounds first"
    left = {site.part: ("all",) for site in result.left(sum(in_rounds))}
    logits = ablated_logits(known, pairs, left, means, complement=True)
    expected = METRICS["log_probability"](logits, pairs.answers, pairs.distractors)
    assert torch.allclose(result.criterion.values[sum(in_rounds)].float(), expected, atol=2e-4)
    assert bool(result.criterion.values[1].isnan().all()), "inside a round nothing is measured"
    greedy = eliminate(known, pairs, means, EliminationConfig(exact_from=1, round_share=0.9, target=0.99))
    assert greedy.reaches(greedy.removals)
    assert len(greedy.circuit.heads) < 20


def test_gates_are_the_derivative_of_closing_them(load_teacher):
    """Predicted = measured: half closing a gate by hand changes the metric as the gradient says."""
    model, some = load_teacher("llama"), entity_pairs(scenes=2)
    values = stand_ins(model, some, reference_means(model, entity_pairs(scenes=3, seed=5)))
    places = [Place(part=head, where=some.position("all")) for head in model.heads]
    metric = METRICS["log_probability"]

    def measured(logits: Tensor) -> Tensor:
        return metric(logits, some.answers, some.distractors)

    scores = gate_scores(model, some, values, places, measured, steps=1)
    step, numbers = 1e-2, (1, 6, 11)
    for number in numbers:
        ends = []
        for gate in (1.0, 1.0 - step):
            gates = torch.ones(len(places), len(some))
            gates[number] = gate
            with hooks.edit(model.model, gated(model, some, values, places, gates)), torch.no_grad():
                ends.append(measured(model.final_logits(some.clean, some.mask)))
        assert torch.allclose(scores[number], ((ends[0] - ends[1]) / step).abs(), rtol=0.1, atol=2e-3)
    assert float(scores[list(numbers)].max()) > 0.05


def test_a_small_or_unknown_wish_is_refused(known, pairs, reference):  # noqa: F811
    with pytest.raises(InputError, match="log_probability"):
        eliminate(known, pairs, reference_means(known, reference), EliminationConfig(criterion="log_prob"))
