"""Prompts that begin alike as rows of one prefix: the same logits, in fewer tokens; prompt by prompt where that is not
exact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import entity_pairs, left_padded, tokens_by_rows
from miniatures import FAMILIES, miniature
from torch import Tensor

from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablated_logits, plain_logits
from workbench.patching.replacement import counterfactual_outputs, reference_means
from workbench.patching.shared import rows_of, shared_prefixes
from workbench.values.refs import Head

PAIRS = entity_pairs(scenes=3, boxes=5)


def both(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    with shared_prefixes():
        rows = run()
    return rows, run()


def test_rows_give_the_logits_of_their_prompts(
    load_teacher: Callable[..., Teacher], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = load_teacher(architecture), tokens_by_rows(monkeypatch)
    padded = left_padded(PAIRS, range(5, 10))
    means = reference_means(model, entity_pairs(split="test", scenes=2, boxes=5), per_position=False)
    scope = {Head(0, 1): ["all"], Head(1, 2): ["last"]}
    runs: list[Callable[[], Tensor]] = [
        lambda: plain_logits(model, PAIRS),
        lambda: plain_logits(model, padded),
        lambda: ablated_logits(model, padded, scope, means),
        lambda: ablated_logits(model, PAIRS, scope, means, complement=True),
    ]
    whole = runs[0]()
    for number, run in enumerate(runs):
        sizes.clear()
        rows, expected = both(run)
        assert float((rows - expected).abs().max()) < 1e-5 * float(expected.abs().max().clamp(min=1.0))
        assert sizes
        assert sizes[-1] < 0.6 * PAIRS.clean.numel()
        if number > 1:
            assert float((expected - whole).abs().max()) > 1e-3, "what is ablated has an effect"
    assert float((whole[0] - whole[1]).abs().max()) > 1e-3, "two questions of a scene have logits of their own"


def test_a_prefix_ends_where_what_is_done_differs(
    load_teacher: Callable[..., Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ablated at the label that is asked for, or each prompt by its own counterpart: nothing is shared, or less."""
    model, sizes = load_teacher("llama"), tokens_by_rows(monkeypatch)
    stand_in = counterfactual_outputs(model, PAIRS)
    for run in (
        lambda: ablated_logits(model, PAIRS, {Head(0, 1): ["earlier_label"]}, "zero"),
        lambda: ablated_logits(model, PAIRS, {Head(0, 1): ["all"]}, stand_in),
    ):
        rows, expected = both(run)
        assert float((rows - expected).abs().max()) < 1e-5
        assert not sizes
    assert rows_of(PAIRS.rows(torch.arange(0, 15, 5))) is None, "one question of each scene shares too little"


@pytest.mark.parametrize("family", ["Bloom", "Olmo3"])
def test_attention_by_distance_or_window_runs_prompt_by_prompt(
    family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ALiBi counts keys, a window of a row would reach over other prompts: refused, and the numbers are the plain
    ones."""
    model = Teacher.load(miniature(family, FAMILIES[family], tmp_path / family), check=False)
    few = PAIRS.rows(slice(0, 5))
    rows, expected = both(lambda: plain_logits(model, few))
    assert torch.equal(rows, expected)
