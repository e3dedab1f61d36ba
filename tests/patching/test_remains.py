"""What is left of a model, by its own arithmetic, against hooked forwards of the whole model on the same prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.patching.test_path_patching_reference import uneven_pairs
from workbench.circuits.remaining import stand_ins
from workbench.models.hooked_model import Teacher
from workbench.patching.engine.remains import HookedRemains, Place, Remains, StandIns
from workbench.patching.engine.replay import replay_of
from workbench.patching.replacement import Replacement, Zero, counterfactual_outputs, reference_means
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head, Mlp

CASES = (
    ("llama-mha", "left"),
    *((architecture, side) for architecture in ("llama", "gpt2", "neox") for side in ("left", "right")),
    ("llama-mqa", "right"),
)
"""Architectures and the side of their padding: each architecture that differs in kind with both."""
ROUNDING = 2e-5
"""Largest difference of float32 logits of size 1 to 10; every effect that is compared is at least 100 times larger."""
MEMORY = 1 << 28


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


@pytest.fixture(scope="module", params=["counterfactual", "zero", "pooled mean"])
def values(request: pytest.FixtureRequest, model: Teacher, padded: PromptPairs) -> StandIns:
    """Several replacements, of heads and MLPs."""
    kinds: dict[str, Callable[[], Replacement]] = {
        "counterfactual": lambda: counterfactual_outputs(model, padded),
        "zero": Zero,
        "pooled mean": lambda: reference_means(model, padded.swapped(), per_position=False),
    }
    return stand_ins(model, padded, kinds[request.param](), mlps=True)


def both(
    model: Teacher, pairs: PromptPairs, values: StandIns, *, memory: int = MEMORY
) -> tuple[Remains, HookedRemains]:
    replay = replay_of(model, pairs)
    assert replay is not None
    return Remains(replay, values, memory=memory), HookedRemains(model, pairs, values)


def places(pairs: PromptPairs, *named: tuple[Head | Mlp, str]) -> list[Place]:
    return [Place(part=part, where=pairs.position(position)) for part, position in named]


def same(fast: Tensor, slow: Tensor) -> None:
    assert float((fast - slow).abs().max()) < ROUNDING


GONE: dict[str, list[tuple[Head | Mlp, str]]] = {
    "nothing": [],
    "a head": [(Head(1, 2), "all")],
    "a layer's heads": [(Head(1, index), "all") for index in range(4)],
    "heads at a position": [(Head(0, 1), "last"), (Head(2, 3), "labels"), (Head(1, 0), "not last+labels")],
    "an MLP": [(Mlp(1), "all")],
    "much": [
        (Head(0, 0), "all"),
        (Mlp(0), "labels"),
        *((Head(2, index), "all") for index in range(4)),
        (Mlp(2), "all"),
    ],
}
CANDIDATES: list[tuple[Head | Mlp, str]] = [
    (Head(0, 3), "all"), (Head(1, 1), "all"), (Head(2, 1), "all"), (Mlp(0), "all"), (Mlp(2), "last"),
    (Head(0, 3), "last"), (Head(1, 1), "labels"), (Head(0, 2), "not last+labels"), (Mlp(1), "last"),
]  # fmt: skip


@pytest.mark.parametrize("gone", GONE, ids=str)
def test_what_is_left_equals_hooked_forwards(model, padded, values, gone):
    fast, slow = both(model, padded, values)
    whole = fast.logits
    for place in places(padded, *GONE[gone]):  # one after another, as elimination goes
        fast.remove(place)
        slow.remove(place)
    candidates, left = places(padded, *CANDIDATES), slow.logits
    same(fast.logits, left)
    assert not GONE[gone] or float((fast.logits - whole).abs().max()) > 100 * ROUNDING
    expected = dict(slow.without_each(candidates))
    for number, logits in fast.without_each(candidates):
        same(logits, expected[number])
    changed = [float((expected[number] - left).abs().max()) > 100 * ROUNDING for number in expected]
    assert sum(changed) >= 4, "the candidates do something"


def test_removing_at_once_or_one_by_one_gives_the_same_bits(model, padded, values):
    (one, _), (other, _) = both(model, padded, values), both(model, padded, values)
    removed = places(padded, *GONE["much"])
    for place in removed:
        one.remove(place)
    other.remove(*removed)
    assert torch.equal(one.logits, other.logits)


def test_a_small_memory_changes_nothing_beyond_rounding(model, padded, values):
    (large, _), (small, _) = both(model, padded, values), both(model, padded, values, memory=1)
    candidates = places(padded, *CANDIDATES)
    expected = dict(large.without_each(candidates))
    found = dict(small.without_each(candidates))
    assert found.keys() == expected.keys()
    for number, logits in found.items():
        same(logits, expected[number])


@pytest.mark.parametrize(("case", "values"), [(("gemma2", "left"), "pooled mean")], indirect=True)
def test_norms_after_attention_are_taken_anew(model, padded, values):
    for gone in ("heads at a position", "much"):
        test_what_is_left_equals_hooked_forwards(model, padded, values, gone)
    test_removing_at_once_or_one_by_one_gives_the_same_bits(model, padded, values)


def test_a_copy_is_a_run_of_its_own(model: Teacher, padded: PromptPairs, values: StandIns) -> None:
    """What is removed from a copy is the same as what is removed from a new run, to the bit; the run it was made of
    stays as it was."""
    gone = places(padded, *GONE["much"])
    for whole, anew in zip(both(model, padded, values), both(model, padded, values), strict=True):
        before = whole.logits.clone()
        copy = whole.copy()
        copy.remove(*gone)
        anew.remove(*gone)
        assert torch.equal(copy.logits, anew.logits)
        assert torch.equal(whole.logits, before)
        assert float((copy.logits - before).abs().max()) > 100 * ROUNDING
        whole.remove(*gone)
        assert torch.equal(whole.logits, anew.logits)
