"""What a sweep costs: its memory stays within the budget, its arithmetic grows linearly with senders and with prompts.

Memory is what PyTorch's allocator reports to the profiler, arithmetic what its operation counter counts: neither
depends on the machine's mood.
"""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import entity_pairs
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablation_profiles
from workbench.patching.engine.passage import Route
from workbench.patching.execution import Execution
from workbench.patching.path import PathPatcher
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import logit_difference
from workbench.values.refs import Head, Receiver

SIZES = {"layers": 4, "heads": 8, "d_model": 64}
ROUTES = {
    "to the logits": Route(),
    "into heads": Route(
        receivers=(Receiver(Head(3, 1), "q"), Receiver(Head(2, 0), "v")), position="labels", receiver_position="all"
    ),
}
MEGABYTE = 2**20


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Teacher:
    """Of some width, so that activations outweigh the bookkeeping."""
    return Teacher.load(model_folder(request.param, **SIZES))


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """24 prompts of 7 boxes."""
    prompts = entity_pairs(scenes=4, boxes=7)
    return prompts.rows(slice(0, 24))


def peak(work: Callable[[], object]) -> int:
    """Most bytes that were allocated at one time during `work`, beyond those that were there. What other tests left is
    not collected meanwhile."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            work()
    finally:
        gc.enable()
    now = highest = 0
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("route", "budgets"), list(zip(ROUTES.values(), [(0.5, 1.5), (16, 64)], strict=True)), ids=ROUTES
)
def test_a_sweep_stays_within_its_budget(model, pairs, route, budgets):
    """The budget is for the chunk's activations; the clean and corrupt runs that every chunk shares are there before
    it."""
    variants = [frozenset([head]) for head in model.heads if head.layer < 2] * 2
    small, large = (int(megabytes * MEGABYTE) for megabytes in budgets)
    used = {}
    for budget in (small, large):
        patcher = PathPatcher(model, pairs, execution=Execution(memory=budget))
        patcher.effects(variants[-1:], route, logit_difference)  # the corrupt run, which is kept
        used[budget] = peak(lambda patcher=patcher: patcher.effects(variants, route, logit_difference))
        assert 0.2 * budget < used[budget] <= budget
    assert used[large] > 1.5 * used[small], "a larger budget is used, or the bound says nothing"


def test_ablation_stays_within_its_budget(model, pairs):
    """The clean run comes on top of the budget."""

    def clean_run() -> None:
        PathPatcher(model, pairs)

    def ablation() -> None:
        ablation_profiles(model, pairs, "zero", metrics="logit_difference", execution=Execution(memory=8 * MEGABYTE))

    assert peak(ablation) <= 8 * MEGABYTE + peak(clean_run)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_arithmetic_is_linear_in_senders(model, pairs, route):
    """Of one layer, so that all have the same way to go: each sender beyond the first costs the same."""
    patcher, heads = PathPatcher(model, pairs), [head for head in model.heads if head.layer == 0]
    patcher.effects([frozenset(heads[:1])], route, logit_difference)
    costs = [
        operations(
            lambda count=count: patcher.effects([frozenset([head]) for head in heads[:count]], route, logit_difference)
        )
        for count in (2, 4, 8)
    ]
    each = (costs[1] - costs[0]) / 2
    assert each > 0
    assert costs[2] - costs[1] == pytest.approx(4 * each, rel=0.05)
    assert costs[0] >= 1.9 * each


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_arithmetic_is_linear_in_prompts(model, pairs, route):
    variants = [frozenset([head]) for head in model.heads if head.layer == 0]
    costs = []
    for count in (6, 12, 24):
        patcher = PathPatcher(model, pairs.rows(slice(0, count)))
        costs.append(operations(lambda patcher=patcher: patcher.effects(variants, route, logit_difference)))
    assert costs[1] == pytest.approx(2 * costs[0], rel=0.02)
    assert costs[2] == pytest.approx(4 * costs[0], rel=0.02)
