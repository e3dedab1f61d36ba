"""Where heads look: equal to a loop over prompts and tokens, whole rows sum to 1, and a head set by hand looks where it
was told to."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import entity_pairs

from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.looks import FIRST, attention_to_positions
from workbench.errors import InputError
from workbench.plots.looks import looks_figure
from workbench.readouts.patterns import attention_patterns
from workbench.values.refs import Head
from workbench.values.scores import Scores

MEMBERS = (Member(Head(2, 1), "A", "last"), Member(Head(0, 3), "C", "query_label"), Member(Head(1, 0), "D", "labels"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_is_the_slow_loop_over_prompts_and_tokens(architecture: str, load_teacher: Callable[..., Any]) -> None:
    model, pairs = load_teacher(architecture), entity_pairs()
    found = attention_to_positions(model, pairs, MEMBERS, batch=3)
    assert found.labels["member"][1] == "L0H3 (C) at query_label"
    for example in range(len(pairs)):
        row = pairs.rows(slice(example, example + 1))
        there = row.mask[0]
        for place, member in enumerate(MEMBERS):
            weights = attention_patterns(model, row.clean[0][there], [member.head]).weights[0]
            asked = row.position(member.position)[0][there].nonzero().flatten().tolist()
            for column, name in enumerate(found.labels["position"]):
                keys = [0] if name == FIRST else row.position(name)[0][there].nonzero().flatten().tolist()
                slow = sum(float(weights[query, key]) for query in asked for key in keys) / len(asked)
                assert float(found.values[place, column, example]) == pytest.approx(slow, abs=1e-5)
    assert float(found.values.max()) > 100 * 1e-5


def test_all_tokens_together_are_everything(load_teacher: Callable[..., Any]) -> None:
    pairs = entity_pairs()
    whole = replace(pairs, positions={**pairs.positions, "everything": pairs.mask})
    found = attention_to_positions(load_teacher("llama"), whole, MEMBERS)
    everything = found.values[:, found.labels["position"].index("everything")]
    assert torch.allclose(everything, torch.ones_like(everything), atol=1e-5)
    part = found.values[:, found.labels["position"].index("labels")]
    assert 0 < float(part.min()) < float(part.max()) < 0.999


def test_prompts_without_the_position_count_nowhere(load_teacher: Callable[..., Any]) -> None:
    pairs = entity_pairs()
    label = pairs.position("query_label").clone()
    label[0] = False
    found = attention_to_positions(
        load_teacher("llama"), replace(pairs, positions={**pairs.positions, "query_label": label}), MEMBERS
    )
    assert found.values[1, :, 0].isnan().all()
    assert found.values[0, found.labels["position"].index("query_label"), 0].isnan()
    assert not found.mean().isnan().any()


def test_bad_input_is_refused(load_teacher: Callable[..., Any]) -> None:
    model, pairs = load_teacher("llama"), entity_pairs()
    with pytest.raises(InputError, match="no head to look at"):
        attention_to_positions(model, pairs, Circuit.of([], shape=(3, 4), method="given").members)
    with pytest.raises(InputError, match="nowhere"):
        attention_to_positions(model, pairs, [Member(Head(0, 0), "A", "nowhere")])
    with pytest.raises(InputError, match="attention_to_positions"):
        looks_figure(Scores.of_heads(torch.zeros(2, 2), unit="x"))


def test_the_figure_says_what_was_measured(load_teacher: Callable[..., Any]) -> None:
    scores = attention_to_positions(load_teacher("llama"), entity_pairs(), MEMBERS)
    figure = looks_figure(scores)
    assert torch.allclose(torch.tensor(figure.data[0].z).double(), scores.mean().double())
    shown = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    assert [shown[row] for row in figure.data[0].y] == list(scores.labels["member"])
