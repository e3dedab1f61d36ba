"""Discovery and evaluation on models whose circuit is known head by head, because its weights are written by hand.

An ordinary `GPT2LMHeadModel` solves entity tracking with three boxes as in Prakash et al. 2024. The residual stream is
divided into blocks: TOKEN (a code of the token, embedded), PLACES (what the template has at this position, embedded),
and one block for each step:

    D structure reader     at a label        reads its clause's object (TOKEN)             and writes its code to BOUND
    C position detector    at query label    finds the earlier same label, reads BOUND     and writes to FOUND
    B position transmitter at last token     looks at the query label, reads FOUND         and writes to ASKED
    A value fetcher  at last token  finds the token whose code is ASKED  and writes its code to ANSWER, unembedded

Two heads share each of the steps D, B and A, each with one half of the code. What passes from D to A is the address of
a clause (its object's code) rather than its number, since a corrupt prompt has the same clauses and only their words
differ. All other heads do nothing, or something of no consequence: they copy to SCRATCH, which nothing reads, or come
too late, or push against the answer. Every embedding and every write has mean 0, and a constant BALLAST dominates the
norm, so LayerNorm is the identity to within a few percent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from conftest import entity_pairs
from handmade import BLOCK, FIRST, SECOND, code, write_gpt2
from torch import Tensor
from transformers import GPT2LMHeadModel

from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.discovery import Discovery, DiscoveryConfig, backward_search, top_by_ablation
from workbench.circuits.evaluation import circuit_logits, evaluate_circuit
from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablated_logits, ablation_profiles, plain_logits, reference_means
from workbench.patching.engine.hooked import HookedPatcher
from workbench.patching.path import activation_baselines, prepared
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import PromptPairs
from workbench.tasks.entity_tracking import OBJECTS, EntityTracking
from workbench.values.metrics import METRICS, accuracy
from workbench.values.refs import Head

LAYERS, HEADS, WIDTH = 6, 4, 128
TOKEN, BOUND, FOUND, ASKED, ANSWER, SCRATCH, PLACES, BALLAST = (
    slice(start, start + BLOCK) for start in range(0, WIDTH, BLOCK)
)
PLACE_NAMES = ("first", "object", "query_label", "last", "clause0", "clause1", "clause2")
SHARPNESS = 60.0
"""Attention score of a full match."""
LOGIT = 12.0
"""Logit of the answer when its whole code stands in ANSWER."""

WHOLE = torch.ones(BLOCK)


def place(name: str) -> Tensor:
    """The direction of a feature of PLACES: +1 and -1 on a pair of entries."""
    direction = torch.zeros(WIDTH)
    start = PLACES.start + 2 * PLACE_NAMES.index(name)
    direction[start], direction[start + 1] = 1.0, -1.0
    return direction


def places_at(position: int) -> list[str]:
    """What the template has at a position: three clauses of 7 tokens, the object second, and `Box F contains the`."""
    if position == 0:
        return ["first"]
    clause = [f"clause{position // 7}"] if position < 21 else []
    named = {1: "object", 8: "object", 15: "object", 22: "query_label", 24: "last"}
    return clause + ([named[position]] if position in named else [])


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """One head: where it attends, and what it copies. Scores are shares of SHARPNESS."""

    matches: tuple[slice, slice] | None = None
    """A block of the query's position and one of the key's: 1 where their codes are equal."""
    unless: slice | None = None
    """A block of the query's position that is taken away from the first: no match with what stands there already."""
    looks: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(place of the query or "any", place of the key) -> score. Places add up."""
    copies: tuple[slice, slice] | None = None
    """From which block to which."""
    part: Tensor = field(default_factory=lambda: WHOLE)
    constant: Tensor | None = None
    """A code written to ANSWER wherever it attends."""


REST = {("any", "first"): 0.75}
"""Where a head rests that finds nothing: the first token, whose code is 0."""


def structure_reader(target: slice, part: Tensor) -> Wiring:
    own_clause = {(f"clause{index}", f"clause{index}"): 0.5 for index in range(3)}
    return Wiring(looks={**own_clause, ("any", "object"): 0.5, **REST}, copies=(TOKEN, target), part=part)


def position_detector(source: slice, target: slice) -> Wiring:
    return Wiring(matches=(TOKEN, TOKEN), looks={("any", "query_label"): -1.0, **REST}, copies=(source, target))


def position_transmitter(target: slice, part: Tensor) -> Wiring:
    return Wiring(looks={("last", "query_label"): 1.0, **REST}, copies=(FOUND, target), part=part)


def value_fetcher(target: slice, part: Tensor) -> Wiring:
    return Wiring(matches=(ASKED, TOKEN), looks=REST, copies=(TOKEN, target), part=part)


GATHERER = Wiring(looks={("last", "object"): 1.0, **REST}, copies=(TOKEN, SCRATCH))
DUPLICATES = Wiring(matches=(TOKEN, TOKEN), copies=(TOKEN, SCRATCH))
BAG = Wiring(copies=(TOKEN, SCRATCH))

CIRCUIT = {
    Head(0, 1): ("D", "earlier_label", structure_reader(BOUND, FIRST)),
    Head(1, 2): ("D", "earlier_label", structure_reader(BOUND, SECOND)),
    Head(2, 0): ("C", "query_label", position_detector(BOUND, FOUND)),
    Head(3, 1): ("B", "last", position_transmitter(ASKED, FIRST)),
    Head(3, 2): ("B", "last", position_transmitter(ASKED, SECOND)),
    Head(4, 1): ("A", "last", value_fetcher(ANSWER, FIRST)),
    Head(5, 3): ("A", "last", value_fetcher(ANSWER, SECOND)),
}
"""The true circuit: head -> role, position and wiring."""
DISTRACTORS = {
    Head(0, 2): GATHERER,
    Head(0, 3): DUPLICATES,
    Head(1, 0): BAG,
    Head(1, 1): structure_reader(SCRATCH, WHOLE),
    Head(2, 1): position_detector(TOKEN, SCRATCH),
    Head(2, 3): structure_reader(BOUND, WHOLE),  # too late for C, which is in the same layer
    Head(3, 0): GATHERER,
    Head(3, 3): position_detector(BOUND, FOUND),  # too late for B
    Head(4, 0): position_transmitter(SCRATCH, WHOLE),
    Head(4, 2): value_fetcher(SCRATCH, WHOLE),
    Head(5, 0): value_fetcher(ANSWER, -0.05 * WHOLE),  # against the answer
    Head(5, 1): BAG,
}
"""Heads whose output depends on the prompt, to no use."""
CONSTANT = {Head(1, 3): Wiring(constant=0.1 * code(50)), Head(5, 2): Wiring(constant=0.1 * code(51))}


def write_model(folder: Path, heads: Mapping[Head, Wiring]) -> Path:
    """An ordinary GPT-2 directory with these heads; all others, and the MLPs, write nothing."""

    def fill(model: GPT2LMHeadModel, vocabulary: Mapping[str, int]) -> None:
        _write_embeddings(model, vocabulary)
        for head, wiring in heads.items():
            _write_head(model.transformer.h[head.layer].attn, head.index, wiring)

    return write_gpt2(folder, fill, layers=LAYERS, heads=HEADS, width=WIDTH, ballast=BALLAST, length=25)


def _write_embeddings(model: GPT2LMHeadModel, vocabulary: Mapping[str, int]) -> None:
    for word, index in vocabulary.items():
        if word != "The":
            model.transformer.wte.weight[index, TOKEN] = code(index)
        if word in OBJECTS:
            model.lm_head.weight[index, ANSWER] = LOGIT / BLOCK * code(index)
    for position in range(25):
        model.transformer.wpe.weight[position] = sum((place(name) for name in places_at(position)), torch.zeros(WIDTH))


def _write_head(attention: torch.nn.Module, index: int, wiring: Wiring) -> None:
    size = WIDTH // HEADS
    columns = [slice(matrix * WIDTH + index * size, matrix * WIDTH + (index + 1) * size) for matrix in range(3)]
    query, key, value = (attention.c_attn.weight[:, column] for column in columns)
    query_bias, value_bias = attention.c_attn.bias[columns[0]], attention.c_attn.bias[columns[2]]
    output = attention.c_proj.weight[index * size : (index + 1) * size]
    score = SHARPNESS * size**0.5
    if wiring.matches is not None:
        asked, offered = wiring.matches
        query[asked, :BLOCK] = score / BLOCK * torch.eye(BLOCK)
        key[offered, :BLOCK] = torch.eye(BLOCK)
    if wiring.unless is not None:
        query[wiring.unless, :BLOCK] = -score / BLOCK * torch.eye(BLOCK)
    for entry, ((looker, looked_at), share) in enumerate(wiring.looks.items(), start=BLOCK):
        if looker == "any":
            query_bias[entry] = share * score
        else:
            query[:, entry] = share * score * place(looker) / 2
        key[:, entry] = place(looked_at) / 2
    if wiring.copies is not None:
        source, target = wiring.copies
        value[source, :BLOCK] = torch.eye(BLOCK)
        output[:BLOCK, target] = torch.diag(wiring.part)
    if wiring.constant is not None:
        value_bias[:BLOCK] = wiring.constant
        output[:BLOCK, ANSWER] = torch.eye(BLOCK)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[Head, Wiring]], Teacher]:
    """Heads that differ from the known model's -> a model."""

    def load(changed: Mapping[Head, Wiring]) -> Teacher:
        known = {**{head: wiring for head, (_, _, wiring) in CIRCUIT.items()}, **DISTRACTORS, **CONSTANT}
        return Teacher.load(write_model(tmp_path_factory.mktemp("known"), {**known, **changed}))

    return load


@pytest.fixture(scope="module")
def known(write: Callable[..., Teacher]) -> Teacher:
    """The model with the circuit CIRCUIT."""
    return write({})


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """For the search."""
    return entity_pairs(split="calibration", scenes=2, seed=1)


@pytest.fixture(scope="module")
def reference() -> PromptPairs:
    """For mean ablation."""
    return entity_pairs(split="calibration", scenes=8, seed=2)


@pytest.fixture(scope="module")
def unseen() -> PromptPairs:
    """For evaluation."""
    return entity_pairs(split="test", scenes=10)


def mean_accuracy(logits: Tensor, pairs: PromptPairs) -> float:
    return float(accuracy(logits, pairs.answers, pairs.distractors).mean())


def gap(model: Teacher, pairs: PromptPairs) -> float:
    """Mean log-probability of the answer, clean minus corrupt."""
    clean, corrupt = activation_baselines(prepared(model, pairs), "log_probability")
    return clean - corrupt


TRUE_MEMBERS = tuple(sorted(Member(head, role, position) for head, (role, position, _) in CIRCUIT.items()))
TRUE_CIRCUIT = Circuit.of(TRUE_MEMBERS, shape=(LAYERS, HEADS), method="by construction")


def test_different_tokens_match_by_half_at_most():
    codes = torch.stack([code(index) for index in range(len(word_tokenizer()))])
    products = codes @ codes.T / BLOCK
    assert torch.equal(products.diagonal(), torch.ones(len(codes)))
    assert float((products - torch.eye(len(codes))).max()) == 0.5
    assert torch.equal(codes.sum(1), torch.zeros(len(codes)))


def test_the_template_is_that_of_the_task(unseen):
    """The places that are written into the model are those that the task names, and the queried label is the same token
    in both places."""
    for position in range(unseen.clean.shape[1]):
        for name in ("query_label", "last"):
            assert bool(unseen.position(name)[:, position].all()) == (name in places_at(position))
        assert bool(unseen.position("objects")[:, position].all()) == ("object" in places_at(position))
    assert torch.equal(unseen.clean[unseen.position("earlier_label")], unseen.clean[unseen.position("query_label")])


def test_the_model_solves_the_task_and_knows_nothing_of_the_answer_on_corrupt_prompts(known, pairs, reference, unseen):
    for prompts in (pairs, reference, unseen):
        assert mean_accuracy(plain_logits(known, prompts), prompts) == 1.0
        assert mean_accuracy(plain_logits(known, prompts.swapped()), prompts) == 0.0
        assert gap(known, prompts) > 4


def test_distractors_are_at_work_and_the_rest_is_inert(known, pairs):
    patcher = HookedPatcher(known, pairs)
    assert {head.layer for head in DISTRACTORS} == set(range(LAYERS))
    for head in known.heads:
        clean, corrupt = (run[hooks.z(head.layer)][:, :, head.index] for run in (patcher.clean, patcher.corrupt))
        if head in DISTRACTORS or head in CIRCUIT:
            assert float((clean - corrupt).abs().amax((1, 2)).min()) > 0.3
        elif head in CONSTANT:
            assert float(clean.abs().max()) > 0.05
            assert torch.equal(clean, corrupt)
        else:
            assert float(clean.abs().max()) == 0


def test_backward_search_finds_the_circuit_head_by_head_and_role_by_role(known, pairs):
    found = backward_search(known, pairs, EntityTracking.stages, DiscoveryConfig())
    assert found.circuit.members == TRUE_MEMBERS
    assert_scores_are_clear_cut(found, unit=gap(known, pairs))


def test_the_relative_probability_of_the_answer_finds_the_same_heads(known, pairs):
    """Prakash's score, for the group that writes to the logits."""
    config = DiscoveryConfig(metric="probability", effect="relative", least_effect=0.05)
    found = backward_search(known, pairs, EntityTracking.stages[:1], config)
    assert found.circuit.members == tuple(member for member in TRUE_MEMBERS if member.role == "A")
    assert_scores_are_clear_cut(found, unit=1.0)


def assert_scores_are_clear_cut(found: Discovery, *, unit: float) -> None:
    """Each member takes a large part of the unit away, each other head nothing to speak of."""
    for role, scores in found.scores.items():
        for head in scores.ranked():
            effect = float(scores.at(head).mean()) / unit
            assert effect > 0.3 if role == TRUE_CIRCUIT.role_of(head) else abs(effect) < 0.01


def test_the_circuit_alone_does_the_task_and_random_heads_do_not(known, reference, unseen):
    means = reference_means(known, reference)
    for scope in ("positions", "everywhere"):
        report = evaluate_circuit(known, unseen, TRUE_CIRCUIT, means, scope=scope, random_circuits=3)
        assert report.heads == len(CIRCUIT)
        assert report.faithfulness == 1.0
        assert max(report.random_circuit_accuracy, report.empty_accuracy) <= 0.1


def test_the_circuit_is_minimal(known, reference, unseen):
    means = reference_means(known, reference)
    for head in TRUE_CIRCUIT.heads:
        assert mean_accuracy(circuit_logits(known, unseen, TRUE_CIRCUIT.without([head]), means), unseen) < 0.5


def test_heads_kept_at_the_wrong_position_are_no_circuit(known, reference, unseen):
    """Each group in turn is kept at another position of the prompt than its own."""
    means = reference_means(known, reference)
    for role, elsewhere in {"D": "query_label", "C": "earlier_label", "B": "query_label", "A": "earlier_label"}.items():
        moved = [replace(member, position=elsewhere) if member.role == role else member for member in TRUE_MEMBERS]
        circuit = Circuit.of(moved, shape=(LAYERS, HEADS), method="misplaced")
        assert mean_accuracy(circuit_logits(known, unseen, circuit, means), unseen) <= 0.1


def test_redundant_heads_are_found_by_path_patching_where_single_ablation_is_blind(write, pairs, reference, unseen):
    """Two equal value fetchers, each enough for the answer: accuracy falls only when both are ablated, each carries
    half of the logit."""
    twins = [Head(4, 1), Head(5, 3)]
    model = write(dict.fromkeys(twins, value_fetcher(ANSWER, WHOLE)))
    means = reference_means(model, reference)
    profile = ablation_profiles(model, unseen, means, metrics="accuracy", heads=[*CIRCUIT, *CONSTANT, Head(5, 0)])[
        "accuracy"
    ]
    assert [float(profile.at(head).abs().max()) for head in twins] == [0.0, 0.0]
    assert set(top_by_ablation(profile, DiscoveryConfig(heads=24)).heads) == set(CIRCUIT) - set(twins)
    assert mean_accuracy(ablated_logits(model, unseen, dict.fromkeys(twins, ("last",)), means), unseen) <= 0.1

    found = backward_search(model, pairs, EntityTracking.stages[:1], DiscoveryConfig(metric="logit_difference"))
    assert set(found.circuit.heads) == set(twins)
    clean, corrupt = activation_baselines(prepared(model, pairs), METRICS["logit_difference"])
    for head in twins:
        assert float(found.scores["A"].at(head).mean()) == pytest.approx((clean - corrupt) / 2, rel=0.1)


def test_a_backup_head_hides_a_head_from_ablation_but_not_from_path_patching(write, pairs, unseen):
    """The second value fetcher asks only for what the first has not answered: it is silent until the first is
    ablated."""
    first, backup = Head(4, 1), Head(5, 3)
    model = write({first: value_fetcher(ANSWER, WHOLE), backup: replace(value_fetcher(ANSWER, WHOLE), unless=ANSWER)})
    impacts = ablation_profiles(model, unseen, "zero", metrics="log_probability", heads=[first, backup])[
        "log_probability"
    ]
    assert float(impacts.values.nan_to_num(0).abs().max()) < 0.02 * gap(model, unseen)
    assert (
        mean_accuracy(ablated_logits(model, unseen, dict.fromkeys([first, backup], ("last",)), "zero"), unseen) <= 0.1
    )

    found = backward_search(model, pairs, EntityTracking.stages[:1], DiscoveryConfig())
    assert found.circuit.heads == (first,)
    assert float(found.scores["A"].at(first).mean()) > 0.9 * gap(model, pairs)
    assert abs(float(found.scores["A"].at(backup).mean())) < 0.01 * gap(model, pairs)
