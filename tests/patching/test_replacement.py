"""What stands in for an ablated head: by real position whatever the padding, as a slow loop has it, never nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entity_pairs
from torch import Tensor

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablate, ablated_logits, plain_logits
from workbench.patching.execution import Execution
from workbench.patching.replacement import (
    Replacement,
    Zero,
    counterfactual_outputs,
    covers,
    reference_means,
    replacement_named,
    resampled_outputs,
)
from workbench.tasks.base import PromptPairs

ROUNDING = 2e-5


def joined(parts: list[PromptPairs], *, left: bool) -> PromptPairs:
    """Pairs of several lengths as one set, padded in front or behind."""
    width = max(part.clean.shape[1] for part in parts)

    def wide(tensor: Tensor) -> Tensor:
        space = width - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (space, 0) if left else (0, space))

    named = set.intersection(*(set(part.positions) for part in parts))
    return PromptPairs(
        clean=torch.cat([wide(part.clean) for part in parts]),
        corrupt=torch.cat([wide(part.corrupt) for part in parts]),
        mask=torch.cat([wide(part.mask) for part in parts]),
        answers=torch.cat([part.answers for part in parts]),
        distractors=torch.cat([part.distractors for part in parts]),
        positions={name: torch.cat([wide(part.positions[name]) for part in parts]) for name in named},
    )


def mixed(split: Any, *, left: bool, seed: int = 0, boxes: tuple[int, ...] = (3, 4)) -> PromptPairs:
    return joined([entity_pairs(split=split, scenes=2, boxes=count, seed=seed) for count in boxes], left=left)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Teacher:
    """Rotary positions with grouped-query attention, and learned positions."""
    return Teacher.load(model_folder(request.param))


def mean_by_loop(model: Teacher, prompts: PromptPairs, layer: int) -> list[Tensor]:
    """Prompt by prompt without padding, token by token: the mean of those that have such a token."""
    outputs = []
    for row, real in zip(prompts.clean, prompts.mask, strict=True):
        tokens = row[real][None]
        name = hooks.z(layer)
        outputs.append(model.activations(tokens, torch.ones_like(tokens, dtype=torch.bool), [name])[1][name][0])
    longest = max(len(each) for each in outputs)
    return [torch.stack([each[place] for each in outputs if place < len(each)]).mean(0) for place in range(longest)]


@pytest.mark.parametrize("left", [True, False])
def test_means_by_position_equal_a_slow_loop(model, left):
    prompts = mixed("calibration", left=left)
    means = reference_means(model, prompts, batch=3)
    for layer in range(model.n_layers):
        expected = mean_by_loop(model, prompts, layer)
        assert len(means.values[layer]) == len(expected)
        for place, value in enumerate(expected):
            torch.testing.assert_close(means.values[layer][place], value, rtol=0, atol=ROUNDING)
    last = means.values[0][-1] - means.values[0][-2]
    assert float(last.abs().max()) > 100 * ROUNDING
    lengths = prompts.mask.sum(1)
    assert means.counts.tolist() == [int((lengths > place).sum()) for place in range(len(means.counts))]


KINDS: dict[str, Callable[[Teacher, PromptPairs, PromptPairs], Replacement]] = {
    "mean": lambda model, reference, evaluated: reference_means(model, reference),
    "pooled": lambda model, reference, evaluated: reference_means(model, reference, per_position=False),
    "resampled": lambda model, reference, evaluated: resampled_outputs(model, reference, seed=3),
    "counterfactual": lambda model, reference, evaluated: counterfactual_outputs(model, evaluated),
    "zero": lambda model, reference, evaluated: Zero(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["replay", "hooks"])
def test_padding_in_front_and_behind_give_equal_numbers(model, kind, engine):
    """In every combination of the reference's and the evaluated prompts' padding."""
    found = []
    for reference_left, evaluated_left in ((True, True), (True, False), (False, True), (False, False)):
        reference, evaluated = mixed("calibration", left=reference_left), mixed("test", left=evaluated_left)
        stand_in = KINDS[kind](model, reference, evaluated)
        scores = ablate(
            model, evaluated, stand_in, metric="logit_difference", execution=Execution(engine=engine, batch=5)
        )
        found.append(scores.values)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=ROUNDING)
    assert float(found[0].abs().max()) > 100 * ROUNDING


@pytest.mark.parametrize("left", [True, False])
def test_one_prompt_at_a_time_without_padding_gives_the_same(model, left):
    reference, evaluated = mixed("calibration", left=True), mixed("test", left=left)
    means, scope = reference_means(model, reference), {"L1H2": ("all",), "L0H1": ("last",)}
    together = ablated_logits(model, evaluated, scope, means)
    for number in range(len(evaluated)):
        one = evaluated.rows(slice(number, number + 1))
        real = one.mask[0]
        bare = replace(
            one,
            clean=one.clean[:, real],
            corrupt=one.corrupt[:, real],
            mask=one.mask[:, real],
            positions={name: mask[:, real] for name, mask in one.positions.items()},
            answer_tokens=None,
            distractor_tokens=None,
        )
        torch.testing.assert_close(
            ablated_logits(model, bare, scope, means)[0], together[number], rtol=0, atol=ROUNDING
        )
    assert float((together - plain_logits(model, evaluated)).abs().max()) > 100 * ROUNDING


@pytest.mark.parametrize("left", [True, False])
def test_a_reference_that_is_too_short_is_refused_or_pooled_where_asked(model, left, caplog):
    """Once the means there were 0.0: a zero ablation in the name of a mean."""
    short, evaluated = mixed("calibration", left=left, boxes=(3,)), mixed("test", left=left)
    scope = {"L1H2": ("all",)}
    beyond = int((evaluated.mask.sum(1) > short.clean.shape[1]).sum())
    assert 0 < beyond < len(evaluated)
    assert not covers(short, evaluated)
    means = reference_means(model, short)
    for attempt in (
        lambda: ablated_logits(model, evaluated, scope, means),
        lambda: ablate(model, evaluated, means, metric="accuracy"),
        lambda: means.at(0, evaluated),
        lambda: resampled_outputs(model, short, seed=0).at(0, evaluated),
    ):
        with pytest.raises(InputError, match="use longer reference prompts"):
            attempt()
    with pytest.raises(InputError, match=f"^{beyond} of the {len(evaluated)} evaluated prompts"):
        ablated_logits(model, evaluated, scope, means)

    pooled = reference_means(model, short, missing="pool")
    assert pooled.identity() != means.identity()
    values, everywhere = pooled.at(1, evaluated), reference_means(model, short, per_position=False).values[1][0]
    row = int((evaluated.mask.sum(1) > short.clean.shape[1]).nonzero()[0])
    tokens = values[row][evaluated.mask[row]]
    torch.testing.assert_close(tokens[-1], everywhere, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(tokens[: len(means.counts)], means.values[1])
    caplog.clear()
    ablated_logits(model, evaluated, scope, pooled)
    assert f"{beyond} of {len(evaluated)} evaluated prompts are longer" in caplog.text
    assert f"of the {len(short)} reference prompts" in caplog.text


def test_every_replacement_keeps_the_protocol_and_its_identity_tells_it_from_the_others(model):
    reference, evaluated = mixed("calibration", left=True), mixed("test", left=True)
    other = mixed("calibration", left=True, seed=5)
    made = [make(model, reference, evaluated) for make in KINDS.values()]
    made += [reference_means(model, other), resampled_outputs(model, reference, seed=4)]
    assert all(isinstance(each, Replacement) for each in made)
    assert len({each.identity() for each in made}) == len(made)
    assert [each.kind for each in made[:5]] == ["mean", "mean", "resampled", "counterfactual", "zero"]


def test_a_replacement_of_the_users_own_will_do(model):
    """The protocol is all that a sweep needs."""

    class Ones:
        kind = "mean"

        def identity(self) -> str:
            return "ones"

        def require_fitting(self, evaluated: PromptPairs) -> None:
            pass

        def at(self, layer: int, evaluated: PromptPairs) -> Tensor:
            return torch.ones(1, model.n_heads, model.d_head)

    evaluated = mixed("test", left=True)
    fast, slow = (
        ablate(model, evaluated, Ones(), metric="logit_difference", execution=Execution(engine=engine)).values
        for engine in ("replay", "hooks")
    )
    torch.testing.assert_close(fast, slow, rtol=0, atol=ROUNDING)
    zero = ablate(model, evaluated, "zero", metric="logit_difference").values
    assert float((fast - zero).abs().max()) > 100 * ROUNDING


def test_words_that_are_no_replacement_are_refused():
    assert replacement_named("zero") == Zero()
    assert replacement_named(Zero()) == Zero()
