"""Selection, knockouts, curves and comparisons of circuits: on scores made by hand and on a model whose circuit is
known."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import entity_pairs
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.patching.test_known_circuit import CIRCUIT, TRUE_CIRCUIT, known, pairs, reference, unseen, write  # noqa: F401
from workbench.circuits import curves, selection
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.comparison import CircuitComparison, compare
from workbench.circuits.curves import Faithfulness, FaithfulnessCurve, default_sizes, faithfulness_curve, greedy
from workbench.circuits.discovery import DiscoveryConfig, backward_search, chosen, ranking
from workbench.circuits.evaluation import CircuitReport, circuit_logits, evaluate_circuit
from workbench.circuits.knockout import Knockouts, completeness, incompleteness, minimal, minimality
from workbench.errors import InputError
from workbench.models import hooks
from workbench.patching.ablation import counterfactual_outputs, reference_means
from workbench.patching.attribution import attribute_edges
from workbench.patching.execution import Execution
from workbench.patching.path import PathPatcher
from workbench.pretraining import word_tokenizer
from workbench.tasks import ioi
from workbench.tasks.base import encode, task_dataset
from workbench.tasks.entity_tracking import EntityTracking
from workbench.tasks.registry import task_named, task_names
from workbench.values.metrics import Metric
from workbench.values.refs import Head
from workbench.values.scores import Scores


def scores_with(means: dict[Head, float], *, noise: float = 0.1, examples: int = 40) -> Scores:
    """A 3 x 4 map of normal noise around some means."""
    values = noise * torch.randn(3, 4, examples, generator=torch.Generator().manual_seed(0))
    values -= values.mean(-1, keepdim=True)
    for head, mean in means.items():
        values[head.layer, head.index] += mean
    return Scores.of_heads(values, unit="effect")


STRONG = {Head(2, 1): 2.0, Head(1, 3): 1.5, Head(0, 0): 1.2}


def test_every_rule_finds_the_heads_that_stand_out():
    scores = scores_with({**STRONG, Head(0, 2): -1.0})
    assert selection.by_count(scores, 2) == [Head(2, 1), Head(1, 3)]
    assert scores.top(1, by="lowest") == [Head(0, 2)]
    assert selection.by_threshold(scores, 1.3) == [Head(2, 1), Head(1, 3)]
    assert selection.by_significance(scores) == list(STRONG)
    noisy = scores_with({**STRONG, **{Head(1, index): 0.05 for index in range(3)}})
    assert selection.by_elbow(noisy) == list(STRONG)
    for rule, expected in (("top", 2), ("threshold", 2), ("elbow", 2), ("significance", 2), ("interval", 2)):
        config = DiscoveryConfig(selection=rule, heads=2)
        assert chosen(noisy, config, least=1.0) == list(STRONG)[:expected]


def test_false_discoveries_are_held_at_the_rate():
    """200 maps of pure noise: the share of maps in which anything is found is about the rate."""
    found = 0
    for seed in range(200):
        values = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(seed))
        found += bool(selection.by_significance(Scores.of_heads(values, unit=""), rate=0.1, permutations=499))
    assert found <= 40


def test_permutation_p_values_are_what_scipy_finds():
    values = (
        torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(1)).double()
        + torch.tensor([0.0, 0.5, 1.5])[:, None]
    )
    ours = Scores.of_heads(values, unit="").permutation_p_values(permutations=4999)
    for head in range(3):
        sample = (values[0, head].numpy(),)
        theirs = stats.permutation_test(
            sample, lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=4999, vectorized=True, rng=0
        )
        assert float(ours[0, head]) == pytest.approx(theirs.pvalue, abs=0.03)
    assert float(ours[0, 2]) < 0.01


@pytest.fixture(scope="module")
def knockouts(known, unseen, reference) -> Knockouts:  # noqa: F811
    """The true circuit of the known model."""
    return Knockouts(known, unseen, TRUE_CIRCUIT, reference_means(known, reference), metric="logit_difference")


def test_every_head_of_the_known_circuit_is_needed_and_a_passenger_is_not(knockouts, known, unseen, reference):  # noqa: F811
    scores = minimality(knockouts, draws=2)
    assert set(scores) == set(CIRCUIT)
    assert min(scores.values()) > 0.1
    assert minimal(knockouts, draws=2) == TRUE_CIRCUIT
    passenger = next(head for head in known.heads if head not in CIRCUIT)
    more = Circuit.of([*TRUE_CIRCUIT.members, Member(passenger, "A", "last")], shape=TRUE_CIRCUIT.shape, method="")
    larger = Knockouts(known, unseen, more, reference_means(known, reference), metric="logit_difference")
    assert minimal(larger, draws=2).heads == TRUE_CIRCUIT.heads


def test_circuit_and_model_fall_alike(knockouts):
    found = completeness(knockouts, draws=4)
    gap = abs(knockouts.of_model() - knockouts.of_circuit(CIRCUIT))
    assert incompleteness(found) < 0.1 * gap
    assert any(each.model < 0.5 * knockouts.of_model() for each in found), (
        "the sets must matter, or falling alike says nothing"
    )


def test_a_circuit_with_a_hole_is_not_complete(known, unseen, reference):  # noqa: F811
    """A circuit without its value fetchers does nothing; the model without further heads still does."""
    role = TRUE_CIRCUIT.roles["A"]
    holed = Knockouts(
        known, unseen, TRUE_CIRCUIT.without(role), reference_means(known, reference), metric="logit_difference"
    )
    nothing_gone = completeness(holed, draws=3)[0]
    assert nothing_gone.heads == ()
    assert nothing_gone.circuit < 0.1 * nothing_gone.model


def test_the_curve_reaches_the_model_and_random_heads_come_late(known, pairs, unseen, reference):  # noqa: F811
    found = backward_search(
        known, pairs, EntityTracking.stages, DiscoveryConfig(metric="logit_difference", least_effect=0.01)
    )
    order = ranking(found.scores)
    assert set(order[: len(CIRCUIT)]) == set(CIRCUIT)
    whole = Faithfulness(known, unseen, reference_means(known, reference), metric="logit_difference")
    curve = faithfulness_curve(whole, order, random_rankings=3)
    assert curve.faithfulness[0] == 0.0
    assert curve.faithfulness[-1] == pytest.approx(1.0)
    assert curve.without[0] == 1.0
    assert curve.without[-1] == pytest.approx(0.0, abs=1e-5)
    assert curve.cpr > curve.random_cpr[0] + 2 * curve.random_cpr[1]
    assert curve.cmd < curve.random_cmd[0] - 2 * curve.random_cmd[1]
    assert FaithfulnessCurve.from_json(curve.to_json()) == curve
    few = greedy(whole, order, target=0.9)
    assert len(few) <= len(CIRCUIT)
    assert whole.of(few) >= 0.9
    assert whole.without(order[:3]) < 0.5


def test_an_interrupted_evaluation_goes_on_with_what_is_left(known, unseen, reference, tmp_path, monkeypatch):  # noqa: F811
    file, means, order = (
        tmp_path / "values.json",
        reference_means(known, reference),
        [Head(4, 1), Head(5, 3), Head(3, 1)],
    )
    expected = [Faithfulness(known, unseen, means, metric="logit_difference").of(order[:size]) for size in (1, 2, 3)]
    begun = Faithfulness(known, unseen, means, metric="logit_difference", execution=Execution(file=file))
    assert begun.of(order[:2]) == expected[1]
    runs: list[int] = []
    whole = curves.ablated_logits
    monkeypatch.setattr(
        curves, "ablated_logits", lambda *given, **named: [runs.append(len(given[2])), whole(*given, **named)][1]
    )
    resumed = Faithfulness(known, unseen, means, metric="logit_difference", execution=Execution(file=file))
    assert [resumed.of(order[:size]) for size in (1, 2, 3)] == expected
    assert runs == [1, 3]
    with pytest.raises(InputError, match="metric or ablation"):
        Faithfulness(known, unseen, "zero", metric="logit_difference", execution=Execution(file=file))


def test_counterfactual_ablation_takes_each_prompts_own_corrupt_run(known, unseen):  # noqa: F811
    """By hand through hooks; the circuit alone then is the model, an empty one has lost the answer."""
    outputs = counterfactual_outputs(known, unseen)
    part = unseen.rows(torch.tensor([5, 2]))
    assert torch.equal(outputs.at(3, part), outputs.values[3][[5, 2]])
    _, corrupt = known.activations(unseen.corrupt, unseen.mask, [hooks.z(layer) for layer in range(known.n_layers)])
    kept = TRUE_CIRCUIT.everywhere

    def by_hand(layer: int) -> hooks.Edit:
        ours = torch.tensor([Head(layer, index) in kept for index in range(known.n_heads)])
        return lambda z: torch.where(ours[:, None], z, corrupt[hooks.z(layer)])

    with hooks.edit(known.model, {hooks.z(layer): by_hand(layer) for layer in range(known.n_layers)}):
        expected = known.final_logits(unseen.clean, unseen.mask)
    found = circuit_logits(known, unseen, TRUE_CIRCUIT, outputs, scope="everywhere")
    assert torch.equal(found, expected)
    report = evaluate_circuit(known, unseen, TRUE_CIRCUIT, outputs, random_circuits=2)
    assert report.ablation == "counterfactual"
    assert report.logit_difference_recovered == pytest.approx(1.0, abs=0.1)
    assert report.random_circuit_accuracy < 0.5
    with pytest.raises(InputError, match="other pairs"):
        outputs.at(0, unseen.swapped())


def test_areas_are_those_of_the_definition():
    curve = FaithfulnessCurve(
        ablation="mean",
        metric="",
        sizes=(0, 5, 10),
        total_heads=10,
        faithfulness=(0.0, 1.2, 1.0),
        random=(),
        without=(1.0, 0.5, 0.0),
        random_without=(),
        full=1.0,
        empty=0.0,
    )
    assert curve.cpr == pytest.approx(0.5 * 0.6 + 0.5 * 1.1)
    assert curve.cmd == pytest.approx(0.5 * 0.6 + 0.5 * 0.1)
    assert default_sizes(48) == (0, 1, 2, 3, 5, 8, 13, 21, 34, 48)
    assert default_sizes(1) == (0, 1)


def test_nothing_to_recover_is_refused(known, unseen, reference):  # noqa: F811
    constant: Any = lambda logits, answers, distractors: torch.zeros(len(logits))  # noqa: E731
    with pytest.raises(InputError, match="nothing to recover"):
        Faithfulness(known, unseen, reference_means(known, reference), metric=Metric("constant", "nothing", constant))
    with pytest.raises(InputError, match="also reference prompts"):
        Faithfulness(known, reference, reference_means(known, reference), metric="logit_difference")


def test_integrated_gradients_put_the_known_circuit_on_top(known, pairs):  # noqa: F811
    """All heads of the known circuit rank before every other one by the size of their edges; a single gradient misses
    some of them."""
    for steps, found in ((16, True), (1, False)):
        edges = attribute_edges(known, pairs, metric="logit_difference", steps=steps)
        strength = dict(zip(edges.labels["sender"], edges.mean().abs().nansum(1).tolist(), strict=True))
        heads = sorted(known.heads, key=lambda head: -strength[str(head)])
        assert (set(heads[: len(CIRCUIT)]) == set(CIRCUIT)) is found


def test_a_report_says_both_ways_of_faithfulness_and_comes_back_from_json(known, unseen, reference):  # noqa: F811
    report = evaluate_circuit(known, unseen, TRUE_CIRCUIT, reference_means(known, reference), random_circuits=3)
    assert CircuitReport.from_json(report.to_json()) == report
    assert report.logit_difference_recovered is not None
    assert report.logit_difference_recovered > 0.8
    assert report.logit_differences["random"] < 0.3 * report.logit_differences["full"]
    assert report.random_circuit_range[0] <= report.random_circuit_accuracy <= report.random_circuit_range[1]


def test_the_overlap_of_resamples_tells_a_stable_choice_from_noise():
    stable, noise = scores_with(STRONG), scores_with({}, noise=1.0)
    overlaps = [
        selection.bootstrap_stability(
            lambda rows, scores=scores: selection.by_count(replace(scores, values=scores.values[..., rows]), 3),
            scores.values.shape[-1],
            resamples=10,
        )
        for scores in (stable, noise)
    ]
    assert min(overlaps[0]) == 1.0
    assert sum(overlaps[1]) / 10 < 0.8


def test_a_comparison_names_what_came_and_went():
    shape = (3, 4)
    before = Circuit.of(
        [Member(Head(0, 1), "A", "last"), Member(Head(1, 1), "B", "last"), Member(Head(2, 0), "B", "last")],
        shape=shape,
        method="",
    )
    after = Circuit.of(
        [Member(Head(0, 1), "A", "last"), Member(Head(1, 1), "A", "last"), Member(Head(2, 3), "B", "last")],
        shape=shape,
        method="",
    )
    found = compare(before, after)
    assert found.jaccard == 0.5
    assert [(role.shared, role.gained, role.lost) for role in found.roles] == [
        (("L0H1",), ("L1H1",), ()),
        ((), ("L2H3",), ("L1H1", "L2H0")),
    ]
    assert found.moved == ("L1H1: B -> A",)
    assert CircuitComparison.from_json(found.to_json()) == found
    with pytest.raises(InputError, match="shapes"):
        compare(before, replace(after, shape=(4, 4)))


def test_a_search_goes_on_from_the_stages_that_are_there(known, pairs, tmp_path, monkeypatch):  # noqa: F811
    config = DiscoveryConfig(metric="logit_difference")
    files = {stage.name: tmp_path / f"{stage.name}.safetensors" for stage in EntityTracking.stages}
    whole = backward_search(known, pairs, EntityTracking.stages, config, files=files)
    assert whole.circuit == backward_search(known, pairs, EntityTracking.stages, config).circuit
    files["C"].unlink()
    files["D"].unlink()
    swept: list[str] = []
    effects = PathPatcher.effects
    monkeypatch.setattr(
        PathPatcher,
        "effects",
        lambda self, variants, route, *rest, **more: [
            swept.append(route.position),
            effects(self, variants, route, *rest, **more),
        ][1],
    )
    resumed = backward_search(known, pairs, EntityTracking.stages, config, files=files)
    assert swept == ["query_label", "earlier_label"]
    assert resumed.circuit == whole.circuit


def test_prompts_of_ioi_are_balanced_and_split():
    """IOI with a tokenizer of whole words: both orders, one-token answers, positions where they should be, disjoint
    splits."""
    text = (
        " ".join((*ioi.NAMES, *ioi.PLACES, *ioi.THINGS, *ioi.TEMPLATES))
        .replace("{", "")
        .replace("}", "")
        .replace(",", " ,")
    )
    words = ["<unk>", *dict.fromkeys(text.split())]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    seen: list[set[frozenset[str]]] = []
    for split in ("train", "calibration", "test"):
        rows = task_dataset(ioi.IndirectObject(), tokenizer, split=split, scenes=30, seed=0)
        prompts = encode(rows, tokenizer)
        seen.append({frozenset((row["answer"], row["distractor"])) for row in rows})
        first = [row["clean"].index(row["answer"]) < row["clean"].index(row["distractor"]) for row in rows]
        assert sum(first) == 15
        for name, column in (("subject", "distractor"), ("subject_again", "distractor"), ("recipient", "answer")):
            at = prompts.clean[prompts.position(name)]
            assert [f" {tokenizer.decode([token])}" for token in at] == [row[column] for row in rows]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
    with pytest.raises(InputError, match="one-token names"):
        next(ioi.IndirectObject().pairs(word_tokenizer(), split="train", scenes=1, seed=0))


def test_tasks_come_by_name():
    assert {"entity_tracking", "ioi"} <= set(task_names())
    assert task_named("entity_tracking", {"boxes": 5}).chance == 0.2
    with pytest.raises(InputError, match="entity_tracking"):
        task_named("entity_traking")
    with pytest.raises(InputError, match="options"):
        task_named("ioi", {"boxes": 5})


def test_entity_pairs_have_the_positions_that_stages_name():
    assert {stage.position for stage in EntityTracking.stages} <= set(entity_pairs().positions)
