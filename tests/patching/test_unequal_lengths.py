"""Pairs whose clean and corrupt prompts differ in length, patched at the positions that both name: against loops over
single prompts without padding, against the equal-length way, and what refuses them."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import entity_pairs, with_counterparts
from datasets import Dataset
from torch import Tensor

from workbench.circuits.elimination import eliminate
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, Teacher
from workbench.patching.ablation import (
    ablate,
    ablated_logits,
    ablation_profiles,
    counterfactual_outputs,
    reference_means,
)
from workbench.patching.activation import activation_patch
from workbench.patching.attribution import attribute_edges, exact_edges
from workbench.patching.edge_circuit import EdgePatcher
from workbench.patching.engine.hooked import HookedPatcher
from workbench.patching.execution import Execution
from workbench.patching.interchange import interchanged_logits
from workbench.patching.path import PathPatcher
from workbench.patching.reference import corrupt_prompts
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import PromptPairs, encode, load_pairs
from workbench.tasks.counterparts import Counterparts
from workbench.tasks.forcing import forced
from workbench.values.metrics import logit_difference
from workbench.values.refs import Head, Mlp

METRIC: dict[str, Any] = {"metric": "logit_difference"}
ENGINES = [Execution(progress=False, engine=engine) for engine in ("replay", "hooks")]
QUIET = ENGINES[0]
TOKENIZER = word_tokenizer()
NAMES = ("object", "last", "object+label")
ROUNDING = 2e-5


def row(clean: str, corrupt: str, answer: str, distractor: str) -> dict[str, Any]:
    positions = {"object": f" {answer.strip()}", "label": 5}
    corrupt_positions = {"object": f" {distractor.strip()}", "label": "Box"}
    return {
        "clean": clean,
        "corrupt": corrupt,
        "answer": answer,
        "distractor": distractor,
        "positions": positions,
        "corrupt_positions": corrupt_positions,
    }


ROWS = [
    row(
        "The apple is in Box F , the book is in Box G . Box F contains the",
        "The cup is in Box G . Box F contains the",
        " apple",
        " cup",
    ),
    row(
        "The book is in Box K . Box K contains the",
        "The map is in Box A , the cup is in Box B . Box A",
        " book",
        " cup",
    ),
    row("The cup is in Box G . Box G contains the", "The pot is in Box G . Box F contains the", " cup", " pot"),
]
"""The corrupt prompt is shorter, longer, and as long."""


def read(rows: list[dict[str, Any]] = ROWS, side: Any = "left") -> PromptPairs:
    return encode(load_pairs(Dataset.from_list(rows), TOKENIZER), TOKENIZER, padding_side=side)


@pytest.fixture(params=["llama-left", "gpt2-right", "neox-left"])
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Rotary positions and grouped-query attention; learned positions; parallel blocks. The side of the padding."""
    architecture, side = request.param.split("-")
    return architecture, side


@pytest.fixture
def model(case: tuple[str, str], load_teacher: Callable[..., Teacher]) -> Teacher:
    return load_teacher(case[0])


@pytest.fixture
def pairs(case: tuple[str, str]) -> PromptPairs:
    return read(side=case[1])


def places(number: int, name: str) -> list[tuple[int, int]]:
    """(token of the clean prompt, token of the corrupt prompt) that a name says, counted without padding."""
    rows = ROWS[number]
    clean, corrupt = (TOKENIZER(rows[side])["input_ids"] for side in ("clean", "corrupt"))
    known = {
        "object": (clean.index(word(rows["answer"])), len(corrupt) - 1 - corrupt[::-1].index(word(rows["distractor"]))),
        "label": (5, len(corrupt) - 1 - corrupt[::-1].index(word(" Box"))),
        "last": (len(clean) - 1, len(corrupt) - 1),
    }
    return [known[part] for part in name.split("+")]


def word(text: str) -> int:
    return TOKENIZER(text.strip())["input_ids"][0]


def head_1(value: Tensor) -> Tensor:
    return value[..., 1, :]


def whole(value: Tensor) -> Tensor:
    return value


def singly(model: Teacher, hook: str, name: str, where: Callable[[Tensor], Tensor]) -> Tensor:
    """Final logits of each clean prompt by itself, with a hook's value at a named position (or the part of it that
    `where` is, a view) as it is in its corrupt prompt by itself."""
    logits = []
    for number in range(len(ROWS)):
        clean, corrupt = (torch.tensor([TOKENIZER(ROWS[number][side])["input_ids"]]) for side in ("clean", "corrupt"))
        real, other = (torch.ones_like(tokens, dtype=torch.bool) for tokens in (clean, corrupt))
        source = model.activations(corrupt, other, [hook])[1][hook]

        def change(value: Tensor, source: Tensor = source, number: int = number) -> Tensor:
            value = value.clone()
            for here, there in places(number, name):
                where(value[:, here]).copy_(where(source[:, there]))
            return value

        with torch.no_grad(), hooks.edit(model.model, {hook: change}):
            logits.append(model.final_logits(clean, real))
    return torch.cat(logits)


def fall(model: Teacher, pairs: PromptPairs, logits: Tensor) -> Tensor:
    clean = model.activations(pairs.clean, pairs.mask, [])[0]
    return logit_difference(clean, pairs.answers, pairs.distractors) - logit_difference(
        logits, pairs.answers, pairs.distractors
    )


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v"])
def test_activation_patching_reads_the_token_of_the_same_name(model, pairs, site):
    """At one head of one layer; q and k, which the two prompts turn by other angles, go through hooks."""
    hook = {
        "resid_pre": hooks.residual_pre,
        "resid_post": hooks.residual_post,
        "attn_out": hooks.attention_output,
        "mlp_out": hooks.mlp_output,
        "z": hooks.z,
        "q": hooks.q,
        "k": hooks.k,
        "v": hooks.v,
    }[site]
    scores = activation_patch(model, pairs, site, positions=NAMES, execution=Execution(progress=False), **METRIC)
    by_head = scores.values.ndim == 4
    for name in NAMES:
        logits = singly(model, hook(1), name, head_1 if by_head else whole)
        found = scores.values[(1, 1) if by_head else 1][NAMES.index(name)]
        assert torch.allclose(found, fall(model, pairs, logits), atol=ROUNDING)
    assert float(scores.values.abs().max()) > 100 * ROUNDING


@pytest.mark.parametrize("site", ["resid_mid", "resid_pre", "v"])
def test_the_replay_equals_hooks(model, pairs, site):
    if site == "resid_mid" and model.has_parallel_blocks:
        site = "resid_post"  # no residual stream stands between attention and MLP
    fast, slow = (
        activation_patch(model, pairs, site, positions=NAMES, execution=engine, **METRIC).values for engine in ENGINES
    )
    assert torch.allclose(fast, slow, atol=ROUNDING)
    assert float(slow.abs().max()) > 100 * ROUNDING


@pytest.mark.parametrize("engine", ENGINES, ids=["replay", "hooks"])
def test_ablation_by_the_corrupt_prompt(model, pairs, engine):
    for name in NAMES:
        scores = ablate(model, pairs, "counterfactual", position=name, execution=engine, **METRIC)
        head, logits = Head(0, 1), singly(model, hooks.z(0), name, head_1)
        assert torch.allclose(scores.values[0, 1], fall(model, pairs, logits), atol=ROUNDING)
        together = ablated_logits(model, pairs, {head: [name]}, counterfactual_outputs(model, pairs))
        assert torch.allclose(together, logits, atol=ROUNDING)
        interchanged = interchanged_logits(model, pairs, [(head, pairs.position(name))])
        assert torch.allclose(interchanged, logits, atol=ROUNDING)
        assert float(scores.values.abs().max()) > 100 * ROUNDING


def test_mean_ablation_takes_the_corrupt_prompts_by_their_own_layout(model):
    """On either side."""
    left, right = read(side="left"), read(side="right")
    scores = [ablate(model, each, position="last", execution=QUIET, **METRIC).values for each in (left, right)]
    assert torch.allclose(scores[0], scores[1], atol=ROUNDING)
    assert float(scores[0].abs().max()) > 100 * ROUNDING


@pytest.mark.parametrize("engine", ENGINES, ids=["replay", "hooks"])
def test_path_patching_sends_from_the_token_of_the_same_name(model, pairs, engine):
    """A head straight to the logits at the last token, in single prompts; joint senders and receivers against hooks."""
    patcher, slow = PathPatcher(model, pairs, execution=engine), HookedPatcher(model, pairs)
    senders = [Head(0, 1), Mlp(0)]
    for name in NAMES:
        for receivers in ([], [Mlp(1)]):
            found = patcher.logits(senders, name, receivers=receivers)
            expected = slow.logits(senders, name, receivers=receivers)
            assert torch.allclose(found, expected, atol=ROUNDING)
    one_by_one = [HookedPatcher(model, read([each])).logits(senders, "object", receivers=[Mlp(1)]) for each in ROWS[:2]]
    together = patcher.logits(senders, "object", receivers=[Mlp(1)])[:2]
    assert torch.allclose(together, torch.cat(one_by_one), atol=ROUNDING)
    assert float((together - patcher.clean_logits[:2]).abs().max()) > 100 * ROUNDING or model.has_parallel_blocks


@pytest.mark.parametrize("engine", ENGINES, ids=["replay", "hooks"])
def test_pairs_of_equal_length_give_what_they_give_without_names(model, engine):
    equal = entity_pairs(scenes=2).rows(slice(0, 2))
    named = with_counterparts(equal)
    for measure in (
        lambda pairs: activation_patch(model, pairs, "z", positions=("all", "last"), execution=engine, **METRIC).values,
        lambda pairs: ablate(model, pairs, "counterfactual", execution=engine, **METRIC).values,
        lambda pairs: (
            ablate(model, pairs, reference_means(model, corrupt_prompts(pairs)), execution=engine, **METRIC).values
        ),
        lambda pairs: PathPatcher(model, pairs, execution=engine).logits([Head(0, 1)], receivers=[Mlp(1)]),
        lambda pairs: interchanged_logits(model, pairs, [(Head(1, 2), pairs.position("all"))]),
    ):
        expected = measure(equal)
        assert torch.allclose(measure(named), expected, atol=ROUNDING)
        assert float(expected.abs().max()) > 100 * ROUNDING
    assert named.fingerprint() != equal.fingerprint()


@pytest.mark.parametrize("pad", [1, 5])
def test_more_padding_changes_nothing(load_teacher, pad):
    model, pairs = load_teacher("gpt2"), read()
    other = pairs.counterparts
    assert other is not None
    wide = replace(
        pairs,
        corrupt=torch.nn.functional.pad(pairs.corrupt, (pad + 2, 0)),
        counterparts=Counterparts(
            mask=torch.nn.functional.pad(other.mask, (pad + 2, 0)),
            index=torch.where(other.index >= 0, other.index + pad + 2, -1),
        ),
    )
    both = [activation_patch(model, each, "v", positions=NAMES, execution=QUIET, **METRIC) for each in (pairs, wide)]
    assert torch.allclose(both[0].values, both[1].values, atol=ROUNDING)


def test_clean_and_corrupt_exchanged_twice_are_what_they_were(load_teacher):
    model, pairs = load_teacher("llama"), read()
    twice = pairs.swapped().swapped()
    assert twice.fingerprint() == pairs.fingerprint()
    swapped = pairs.swapped()
    assert swapped.positions["all"].sum(1).tolist() == pairs.corrupt_mask.sum(1).tolist()
    for name in ("object", "label", "last"):
        assert swapped.positions[name].sum(1).tolist() == [1] * len(pairs)
    scores = activation_patch(model, swapped, "resid_pre", positions=("last",), execution=QUIET, **METRIC)
    assert torch.allclose(
        logit_difference(model.activations(swapped.clean, swapped.mask, [])[0], swapped.answers, swapped.distractors)
        - scores.values[0],
        logit_difference(model.activations(pairs.corrupt, pairs.corrupt_mask, [])[0], pairs.answers, pairs.distractors)
        - scores.values[0],
    )


REFUSED: dict[str, Callable[[Teacher, PromptPairs], object]] = {
    "activation patching of all": lambda model, pairs: activation_patch(model, pairs, "z", execution=QUIET),
    "activation patching of each": lambda model, pairs: activation_patch(
        model, pairs, "z", positions="each", execution=QUIET
    ),
    "of all but some": lambda model, pairs: activation_patch(
        model, pairs, "z", positions=("not last",), execution=QUIET
    ),
    "counterfactual ablation of all": lambda model, pairs: ablate(model, pairs, "counterfactual", execution=QUIET),
    "everything but a circuit": lambda model, pairs: ablated_logits(
        model, pairs, {Head(0, 0): ["last"]}, counterfactual_outputs(model, pairs), complement=True
    ),
    "elimination": lambda model, pairs: eliminate(model, pairs, counterfactual_outputs(model, pairs)),
    "paths from all": lambda model, pairs: PathPatcher(model, pairs).logits([Head(0, 0)]),
    "edges": lambda model, pairs: attribute_edges(model, pairs, execution=QUIET),
    "exact edges": lambda model, pairs: exact_edges(model, pairs, execution=QUIET, **METRIC),
    "edge circuits": lambda model, pairs: EdgePatcher(model, pairs),
    "interchange of all": lambda model, pairs: interchanged_logits(model, pairs, [(Head(0, 0), pairs.mask)]),
    "forced answers": lambda model, pairs: forced(replace(pairs, answer_tokens=pairs.answers[:, None])),
    "a forward with the other prompts' mask": lambda model, pairs: inspect.unwrap(HookedModel.require_prompts)(
        model, pairs.corrupt, pairs.mask
    ),
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_needs_every_token_is_refused_with_the_remedy(load_teacher, method):
    with pytest.raises(InputError, match=r"differ in length.*positions"):
        REFUSED[method](load_teacher("gpt2"), read())


def test_nothing_reads_a_token_without_a_counterpart_unnoticed(pairs):
    values = pairs.aligned(torch.ones(*pairs.corrupt.shape, 2))
    named = torch.stack([pairs.positions[name] for name in ("object", "label", "last")]).any(0)
    assert bool((values[named] == 1.0).all())
    assert bool(values[pairs.mask & ~named].isnan().all())
    assert bool((values[~pairs.mask] == 0.0).all())


def test_several_metrics_at_once_know_where_they_stand(load_teacher):
    model, pairs = load_teacher("llama"), read()
    stand_in = counterfactual_outputs(model, pairs)
    profiles = ablation_profiles(
        model, pairs, stand_in, metrics=["logit_difference"], position="object", execution=QUIET
    )
    expected = ablate(model, pairs, "counterfactual", position="object", execution=QUIET, **METRIC).values
    assert torch.equal(profiles["logit_difference"].values, expected)
