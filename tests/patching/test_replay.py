"""The replay against the slow, obvious way: every fast path equals hooked forwards on the same prompts, padded left and
right.

What the hooked forwards themselves are worth is checked against plain `transformers` in
test_path_patching_reference.py.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from conftest import entity_pairs
from torch import Tensor

from tests.patching.test_path_patching_reference import uneven_pairs
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, Teacher
from workbench.patching.ablation import ablate, ablation_profiles, reference_means, resampled_outputs
from workbench.patching.activation import activation_patch
from workbench.patching.engine import chunks, replay, sites
from workbench.patching.engine.hooked import HookedPatcher
from workbench.patching.engine.passage import Route
from workbench.patching.execution import Execution
from workbench.patching.path import PathPatcher, path_patch
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import log_probability, logit_difference
from workbench.values.refs import Embedding, Head, Mlp, Receiver

CASES = (
    ("llama-mha", "left"),
    *((architecture, side) for architecture in ("llama", "gpt2", "neox") for side in ("left", "right")),
    ("llama-mqa", "right"),
)
"""Architectures and the side of their padding: each architecture that differs in kind with both."""
ROUNDING = 2e-5
"""Largest difference of float32 logits of size 1 to 10; every effect that is compared is at least 100 times larger."""
SENDERS: dict[str, frozenset[Any]] = {
    "a head": frozenset([Head(0, 1)]),
    "an MLP": frozenset([Mlp(0)]),
    "the embedding": frozenset([Embedding()]),
    "a head and a later MLP": frozenset([Head(0, 2), Mlp(1)]),
    "everything below": frozenset([Embedding(), Mlp(0), *(Head(0, i) for i in range(4))]),
}
RECEIVERS: dict[str, tuple[Any, ...]] = {
    "logits": (),
    "q": (Receiver(Head(1, 2), "q"), Receiver(Head(2, 1), "q")),
    "k": (Receiver(Head(1, 0), "k"),),
    "v": (Receiver(Head(2, 3), "v"), Receiver(Head(1, 1), "v")),
    "an MLP": (Mlp(1),),
    "all kinds": (Receiver(Head(2, 0), "q"), Receiver(Head(2, 0), "k"), Receiver(Head(1, 3), "v"), Mlp(2)),
}
POSITIONS = (("all", "all"), ("last", "last"), ("all", "labels"), ("labels", "all"))


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """An architecture, and the side on which prompts are padded."""
    return request.param


@pytest.fixture(scope="module")
def model(case: tuple[str, Any], model_folder: Callable[..., Path]) -> Teacher:
    """The architecture with random weights."""
    return Teacher.load(model_folder(case[0]))


@pytest.fixture(scope="module")
def padded(case: tuple[str, Any]) -> PromptPairs:
    """Prompts of unequal length, padded."""
    return uneven_pairs(case[1])


@pytest.fixture(scope="module")
def both(model: Teacher, padded: PromptPairs) -> tuple[PathPatcher, HookedPatcher]:
    """The replay and the hooked reference on the same prompts."""
    return PathPatcher(model, padded, execution=Execution(engine="replay")), HookedPatcher(model, padded)


def assert_same(found: Tensor, expected: Tensor, unpatched: Tensor) -> None:
    assert float((found - expected).abs().max()) <= ROUNDING
    assert float((expected - unpatched).abs().max()) >= 100 * ROUNDING, (
        "the patch hardly does anything, so this comparison proves nothing"
    )


COMBINATIONS = list(itertools.product(SENDERS, RECEIVERS, (False, True)))
COVERING = [
    (senders, receivers, freeze_mlps)
    for senders, receivers, freeze_mlps in COMBINATIONS
    if (list(SENDERS).index(senders) + list(RECEIVERS).index(receivers) + freeze_mlps) % 3 == 0
]
"""Every sender and every receiver, each with live and with frozen MLPs."""


@pytest.mark.parametrize(("senders", "receivers", "freeze_mlps"), COVERING)
def test_patched_logits_equal_hooked_forwards(both, senders, receivers, freeze_mlps):
    assert_patched_the_same(*both, senders, receivers, freeze_mlps)


@pytest.mark.parametrize("case", [each for each in CASES if each[0] == "llama"], indirect=True)
@pytest.mark.parametrize(
    ("senders", "receivers", "freeze_mlps"), [each for each in COMBINATIONS if each not in COVERING]
)
def test_so_do_all_combinations_on_grouped_queries(both, senders, receivers, freeze_mlps):
    assert_patched_the_same(*both, senders, receivers, freeze_mlps)


def assert_patched_the_same(
    fast: PathPatcher, slow: HookedPatcher, senders: str, receivers: str, freeze_mlps: bool
) -> None:
    effects = []
    for position, there in POSITIONS:
        arguments: dict[str, Any] = {
            "receivers": RECEIVERS[receivers],
            "receiver_position": there,
            "freeze_mlps": freeze_mlps,
        }
        expected = slow.logits(SENDERS[senders], position, **arguments)
        assert float((fast.logits(SENDERS[senders], position, **arguments) - expected).abs().max()) <= ROUNDING
        effects.append(float((expected - slow.clean_logits).abs().max()))
    last_token_is_the_same = receivers == "logits" and (
        senders == "the embedding" or (senders == "an MLP" and "neox" in fast.model.name)
    )
    assert max(effects) >= 100 * ROUNDING or last_token_is_the_same, (
        "the patch hardly does anything, so this comparison proves nothing"
    )


@pytest.mark.parametrize("receivers", RECEIVERS)
def test_senders_stacked_in_one_sweep_are_the_same_as_one_by_one(both, receivers):
    fast, _ = both
    variants = [
        frozenset([sender]) for sender in (*fast.model.heads, *(Mlp(layer) for layer in range(3)), Embedding())
    ] + [frozenset()]
    route = Route(position="all", receivers=RECEIVERS[receivers], receiver_position="all")
    stacked = fast.effects(variants, route, log_probability)
    for number, variant in enumerate(variants):
        alone = fast.logits(variant, receivers=route.receivers)
        expected = log_probability(alone, fast.pairs.answers, fast.pairs.distractors)
        assert torch.allclose(stacked[number], expected, atol=ROUNDING)


@pytest.mark.parametrize("composition", ["q", "k", "v"])
def test_one_sender_into_each_receiver_is_the_same_as_one_by_one(both, composition):
    fast, slow = both
    group = 1 if composition == "q" else fast.model.n_heads // fast.model.n_kv_heads
    variants, route = [frozenset([Head(0, 1)]), frozenset([Head(1, 2)]), frozenset([Head(2, 0)])], Route()
    values = fast.effects_on_each(variants, (1, 2), composition, route, logit_difference)
    clean = logit_difference(slow.clean_logits, fast.pairs.answers, fast.pairs.distractors)
    for number, variant in enumerate(variants[:2]):
        for receiver in range(values.shape[2]):
            logits = slow.logits(variant, receivers=[Receiver(Head(2, receiver * group), composition)])
            expected = logit_difference(logits, fast.pairs.answers, fast.pairs.distractors)
            assert float((values[number, 1, receiver] - expected).abs().max()) <= ROUNDING
    assert float((values[0] - clean).abs().max()) >= 100 * ROUNDING
    for number, layer in ((1, 0), (2, 0), (2, 1)):
        without = values[number, layer]
        assert torch.allclose(without, clean.expand_as(without), atol=ROUNDING), (
            "a head at or above the receivers' layer has no path to them"
        )
    assert torch.allclose(
        values,
        PathPatcher(fast.model, fast.pairs, execution=Execution(engine="hooks")).effects_on_each(
            variants, (1, 2), composition, route, logit_difference
        ),
        atol=ROUNDING,
    )


@pytest.mark.parametrize("composition", ["k", "v"])
def test_a_key_or_value_by_query_head_is_that_head_alone(both, composition):
    """Patched through hooks by its z: the receiver's z of a run with the whole group's input replaced, all other heads
    of its layer clean."""
    fast, slow = both
    receiver = Receiver(Head(1, 2), composition)
    found = fast.logits([Head(0, 1)], receivers=[receiver], by_query_head=True)
    names = [hooks.k(1) if composition == "k" else hooks.v(1)]
    with hooks.edit(slow.model.model, slow._frozen_run_edits([Head(0, 1)], slow.pairs.position("all"), False)):
        _, recorded = slow.model.activations(slow.pairs.clean, slow.pairs.mask, names)
    with hooks.edit(slow.model.model, slow._receiver_edits([receiver], recorded, slow.pairs.position("all"))):
        _, group = slow.model.activations(slow.pairs.clean, slow.pairs.mask, [hooks.z(1)])
    z = slow.clean[hooks.z(1)].clone()
    z[:, :, 2] = group[hooks.z(1)][:, :, 2]
    with hooks.edit(slow.model.model, {hooks.z(1): lambda activation: z}):
        expected = slow.model.final_logits(slow.pairs.clean, slow.pairs.mask)
    assert_same(found, expected, slow.clean_logits)
    whole = fast.logits([Head(0, 1)], receivers=[receiver])
    assert (fast.model.n_heads == fast.model.n_kv_heads) == torch.allclose(found, whole, atol=ROUNDING)


@pytest.mark.parametrize("position", ["all", "last", "labels"])
def test_ablation_profiles_equal_hooked_forwards(model, padded, position):
    reference = entity_pairs(split="test", scenes=2, boxes=4, seed=9)
    means = reference_means(model, reference, per_position=False)
    fast, slow = (
        ablate(
            model,
            padded,
            means,
            metric="log_probability",
            position=position,
            execution=Execution(engine=engine),
        )
        for engine in ("replay", "hooks")
    )
    assert_same(fast.values, slow.values, torch.zeros(()))


@pytest.mark.parametrize("site", sites.SITES)
def test_activation_patching_equals_hooked_forwards(model, padded, site):
    arguments: dict[str, Any] = {
        "metric": "logit_difference",
        "positions": ("last", "labels", "all"),
    }
    if site == "resid_mid" and model.has_parallel_blocks:
        with pytest.raises(InputError, match="parallel blocks"):
            activation_patch(model, padded, site, **arguments)
        return
    fast, slow = (
        activation_patch(model, padded, site, **arguments, execution=Execution(engine=engine))
        for engine in ("replay", "hooks")
    )
    assert fast.axes == slow.axes
    assert_same(fast.values, slow.values, torch.zeros(()))


def test_patching_each_token_of_the_residual_stream(model, padded):
    """Every position on its own; in the last layer only the last token counts."""
    scores = activation_patch(model, padded, "resid_post", metric="logit_difference", positions="each")
    assert scores.axes == ("layer", "position", "example")
    last = torch.tensor([int(row.nonzero()[-1]) for row in padded.mask])
    top = scores.values[-1]
    assert float(top[last, torch.arange(len(padded))].abs().min()) > 100 * ROUNDING
    top[last, torch.arange(len(padded))] = 0.0
    assert float(top.abs().max()) <= ROUNDING


def test_memory_that_runs_out_halves_the_chunk(both, monkeypatch):
    fast, _ = both
    variants, route = [frozenset([head]) for head in fast.model.heads], Route(receivers=RECEIVERS["q"])
    expected, sizes = fast.effects(variants, route, log_probability), []
    upward = replay.Replay.upward

    def scarce(self: Any, layer: int, residual: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(residual))
        if len(residual) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return upward(self, layer, residual, *rest)

    monkeypatch.setattr(replay.Replay, "upward", scarce)
    assert torch.allclose(fast.effects(variants, route, log_probability), expected, atol=ROUNDING)
    assert max(sizes) > 1
    assert sizes[-1] == 1


def test_memory_for_not_even_one_variant_names_the_remedy() -> None:
    def never(chunk: list[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(InputError, match="fewer prompts"):
        list(chunks.in_chunks([1, 2, 3], 2, never))


def test_a_small_memory_gives_the_same_numbers(model, padded):
    variants, route = [frozenset([head]) for head in model.heads], Route(receivers=RECEIVERS["v"])
    sizes = [
        PathPatcher(model, padded, execution=Execution(memory=memory)).effects(variants, route, log_probability)
        for memory in (1, 2**30)
    ]
    assert torch.allclose(*sizes, atol=ROUNDING)


def test_a_model_that_the_replay_gets_wrong_goes_through_hooks(model, padded, monkeypatch, caplog):
    parts = replay.decoder_parts(model)
    assert parts is not None
    wrong = replace(parts, blocks=(replace(parts.blocks[0], scale=2 * parts.blocks[0].scale), *parts.blocks[1:]))
    monkeypatch.setattr(replay, "decoder_parts", lambda _, **named: wrong)
    monkeypatch.setattr(replay, "_SAID", WeakKeyDictionary())
    assert PathPatcher(model, padded).engine == "hooks"
    assert "slow" in caplog.text
    with pytest.raises(InputError, match="can't be replayed"):
        PathPatcher(model, padded, execution=Execution(engine="replay"))


def test_resampled_ablation_takes_another_prompts_output(model):
    pairs, reference = entity_pairs(split="test", scenes=2), entity_pairs(split="calibration", scenes=3)
    stand_ins = resampled_outputs(model, reference, seed=3)
    taken = stand_ins.at(1, pairs)
    assert torch.equal(taken, torch.cat([stand_ins.at(1, part) for part in pairs.batches(2)])), (
        "a prompt's stand-in does not depend on its batch"
    )
    assert all(any(torch.equal(row, value) for value in stand_ins.values[1]) for row in taken)
    assert not torch.equal(taken, resampled_outputs(model, reference, seed=4).at(1, pairs))
    found = ablation_profiles(model, pairs, stand_ins, metrics="log_probability", heads=[Head(1, 2)])["log_probability"]

    def by_hand(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, 2] = taken[:, :, 2]
        return z

    with hooks.edit(model.model, {hooks.z(1): by_hand}):
        logits = model.final_logits(pairs.clean, pairs.mask)
    whole = model.final_logits(pairs.clean, pairs.mask)
    expected = log_probability(whole, pairs.answers, pairs.distractors) - log_probability(
        logits, pairs.answers, pairs.distractors
    )
    assert_same(found.at(Head(1, 2)), expected, torch.zeros(()))


def test_unknown_sites_are_refused(model: HookedModel, padded: PromptPairs) -> None:
    with pytest.raises(InputError, match="resid_pre"):
        activation_patch(model, padded, "residpre", metric="logit_difference")


def test_a_sweep_of_paths_is_what_the_hooked_engine_scores(model, padded):
    """`path_patch` end to end, with receivers, position by name."""
    receivers = [Receiver(Head(2, 1), "v")]
    scores = path_patch(model, padded, metric="logit_difference", position="all", receivers=receivers)
    slow = HookedPatcher(model, padded)
    clean = logit_difference(slow.clean_logits, padded.answers, padded.distractors)
    for head in [Head(0, 0), Head(1, 3)]:
        expected = clean - logit_difference(
            slow.logits([head], receivers=receivers), padded.answers, padded.distractors
        )
        assert_same(scores.at(head), expected, torch.zeros(()))


@pytest.mark.parametrize("case", [("gemma2", "left"), ("mixtral", "right")], indirect=True)
def test_norms_after_attention_and_mixtures_of_experts_are_replayed_exactly(model, padded, both):
    """Each of the ways above in one: a norm stands in front of the residual stream, or experts are chosen anew."""
    assert model.has_post_norms == ("gemma2" in model.name)
    for senders, receivers, freeze_mlps in COVERING[::4]:
        assert_patched_the_same(*both, senders, receivers, freeze_mlps)
    test_one_sender_into_each_receiver_is_the_same_as_one_by_one(both, "v")
    test_ablation_profiles_equal_hooked_forwards(model, padded, "labels")
    for site in ("z", "attn_out"):
        test_activation_patching_equals_hooked_forwards(model, padded, site)
