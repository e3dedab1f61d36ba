"""Scores and their statistics; metrics one value per example."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from workbench import seeds, storage
from workbench.errors import InputError
from workbench.values import metrics
from workbench.values.refs import Embedding, Head, Mlp, Receiver, heads_named, path_end_named, sender_named
from workbench.values.scores import Scores, joined, mcnemar, wilson_interval


def sample(examples: int = 9) -> Scores:
    values = torch.randn(2, 3, examples, generator=seeds.generator(0, "scores"), dtype=torch.float64)
    values[1, 2] = torch.nan
    values[0, 1, :3] = torch.nan
    return Scores.of_heads(values, unit="nats", baseline=1.5)


def test_interval_equals_scipy_and_skips_what_was_not_measured() -> None:
    scores = sample()
    low, high = scores.confidence_interval(0.9)
    for layer, head in [(0, 0), (0, 1), (1, 1)]:
        row = scores.values[layer, head].numpy()
        row = row[~np.isnan(row)]
        expected = stats.t.interval(0.9, len(row) - 1, loc=row.mean(), scale=stats.sem(row))
        assert (float(low[layer, head]), float(high[layer, head])) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(float(low[1, 2]))
    assert Head(1, 2) not in scores.ranked()
    assert len(scores.ranked()) == 5


def test_ranking_selecting_normalising() -> None:
    scores = Scores.of_heads(torch.tensor([[1.0, -4.0], [2.0, torch.nan]]), unit="x")
    assert scores.top(2) == [Head(1, 0), Head(0, 0)]
    assert scores.top(1, by="lowest") == [Head(0, 1)]
    assert scores.top(1, by="magnitude") == [Head(0, 1)]
    assert float(scores.normalized().at(Head(0, 1))) == -1
    assert scores.select(layer="L1").values.tolist()[0] == 2.0
    assert scores.at("L0H1") == scores.at(Head(0, 1))
    with pytest.raises(InputError, match="L1"):
        scores.select(layer="L7")
    with pytest.raises(InputError, match="example"):
        scores.confidence_interval()


def test_frame_and_file_round_trip(tmp_path: Path) -> None:
    scores = sample()
    frame = scores.to_frame()
    assert list(frame.columns) == ["layer", "head", "mean", "low", "high", "examples"]
    assert len(frame) == 6
    scores.save(tmp_path / "s.safetensors")
    again = Scores.load(tmp_path / "s.safetensors")
    assert torch.equal(
        again.values,
        scores.values,
    ) or bool((again.values.nan_to_num() == scores.values.nan_to_num()).all())
    assert (again.axes, dict(again.labels), again.unit, again.baseline) == (
        scores.axes,
        dict(scores.labels),
        "nats",
        1.5,
    )
    (tmp_path / "s.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged"):
        Scores.load(tmp_path / "s.safetensors")


def test_joined_is_the_same_sweep_over_more_examples() -> None:
    scores = sample(8)
    halves = [
        Scores.of_heads(scores.values[..., :3], unit="nats", baseline=1.0),
        Scores.of_heads(scores.values[..., 3:], unit="nats", baseline=2.0),
    ]
    assert joined(halves).values.nan_to_num().equal(scores.values.nan_to_num())
    assert joined(halves).baseline == pytest.approx((3 * 1.0 + 5 * 2.0) / 8)


def test_a_wrong_value_cannot_exist() -> None:
    with pytest.raises(InputError, match="dimensions"):
        Scores(values=torch.zeros(2, 2), axes=("layer",), labels={}, unit="x")
    with pytest.raises(InputError, match="labels"):
        Scores(values=torch.zeros(2), axes=("layer",), labels={"layer": ("L0",)}, unit="x")


def test_mcnemar_equals_the_binomial_by_hand() -> None:
    first = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    second = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    only_first, only_second, p = mcnemar(first, second)
    assert (only_first, only_second) == (6, 1)
    assert p == pytest.approx(2 * sum(math.comb(7, i) for i in (0, 1)) / 2**7)
    assert mcnemar(first, first)[2] == 1.0
    with pytest.raises(InputError, match="same prompts"):
        mcnemar(first, second[:4])


def test_wilson_by_formula() -> None:
    n, p, z = 40, 0.75, stats.norm.ppf(0.975)
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)),
    )
    assert wilson_interval(30, 40) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_metrics_one_value_per_example() -> None:
    logits = torch.randn(6, 11, generator=seeds.generator(0, "logits"), dtype=torch.float64)
    answers, distractors = torch.arange(6), torch.arange(6) + 1
    rows = torch.arange(6)
    assert metrics.log_probability(logits, answers, distractors).tolist() == pytest.approx(
        logits.log_softmax(-1)[rows, answers].tolist()
    )
    assert metrics.probability(logits, answers, distractors).tolist() == pytest.approx(
        logits.softmax(-1)[rows, answers].tolist()
    )
    assert metrics.logit_difference(logits, answers, distractors).tolist() == pytest.approx(
        (logits[rows, answers] - logits[rows, distractors]).tolist()
    )
    assert metrics.accuracy(logits, logits.argmax(-1), distractors).tolist() == [1.0] * 6
    other = torch.randn(6, 11, generator=seeds.generator(0, "other"), dtype=torch.float64)
    by_hand = [stats.entropy(other[i].softmax(-1).numpy(), logits[i].softmax(-1).numpy()) for i in range(6)]
    assert metrics.kl_divergence(logits, other).tolist() == pytest.approx(by_hand)
    assert metrics.relative_fall(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0])).isnan().tolist() == [False, True]


def written_before(path: Path, scores: Scores) -> None:
    """A file as version 0.1 wrote it: without a format number."""
    described = {"axes": scores.axes, "labels": scores.labels, "unit": scores.unit, "baseline": scores.baseline}
    storage.write_tensors(
        path, {"values": scores.values}, metadata={"scores": json.dumps(described), "identity": "abc"}
    )


@pytest.mark.parametrize(
    ("unit", "today", "turned"),
    [
        ("change of log probability, path from last to the logits", "fall of log probability, path from", True),
        ("relative change of probability, path from last to L1H0.q at last", "relative fall of probability", True),
        ("change of logit difference, exact path effect, MLPs frozen", "fall of logit difference, exact", True),
        ("change of logit difference, EAP-IG (5 steps), all edges of a sender", "fall of logit difference", True),
        ("change of logit difference, z patched", "fall of logit difference, z patched", True),
        ("fall of accuracy when the head is ablated at last", "fall of accuracy when the head is ablated", False),
        ("share of the logit difference, direct", "share of the logit difference, direct", False),
        ("attention probability", "attention probability", False),
    ],
)
def test_effects_of_earlier_files_get_todays_sign_and_others_stay(unit, today, turned, tmp_path: Path) -> None:
    file, scores = tmp_path / "old.safetensors", replace(sample(), unit=unit)
    written_before(file, scores)
    found = Scores.load(file)
    assert found.unit.startswith(today)
    sign = -1.0 if turned else 1.0
    assert torch.equal(found.values.nan_to_num(7.0), (sign * scores.values).nan_to_num(7.0))
    found.save(file)
    again = Scores.load(file)
    assert torch.equal(again.values.nan_to_num(7.0), found.values.nan_to_num(7.0)), "a file is turned once"
    assert again.unit == found.unit


def test_an_earlier_file_is_no_sweeps_own_and_a_later_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.safetensors"
    written_before(file, sample())
    with pytest.raises(InputError, match="earlier version"):
        Scores.load(file, identity="an identity of today")
    sample().save(file, identity="abc")
    assert Scores.load(file, identity="abc").unit == "nats"
    tensors, metadata = storage.read_tensors(file)
    described = json.loads(metadata["scores"]) | {"format": 99}
    storage.write_tensors(file, tensors, metadata={"scores": json.dumps(described)})
    with pytest.raises(InputError, match="later version"):
        Scores.load(file)


@pytest.mark.parametrize("path", sorted(Path("assets/results").rglob("*.safetensors")), ids=str)
def test_committed_scores_open_with_their_sign(path: Path) -> None:
    """No committed file holds path effects: impacts of ablation and attention keep their numbers."""
    tensors, metadata = storage.read_tensors(path)
    if "scores" not in metadata:
        return
    unit = json.loads(metadata["scores"])["unit"]
    scores = Scores.load(path)
    assert not unit.startswith("change of")
    assert scores.unit == unit
    assert torch.equal(scores.values.nan_to_num(7.0), tensors["values"].nan_to_num(7.0))


def test_heads_and_ends_are_read_from_text() -> None:
    assert heads_named(["L1H2", Head(0, 3), "2.1"]) == [Head(1, 2), Head(0, 3), Head(2, 1)]
    assert [sender_named(text) for text in ("embed", "M2", "L1H0")] == [Embedding(), Mlp(2), Head(1, 0)]
    assert [path_end_named(text) for text in ("M2", "L1H0.v")] == [Mlp(2), Receiver(Head(1, 0), "v")]
    for refused in (lambda: heads_named("L1H2"), lambda: path_end_named("L1H0"), lambda: sender_named("X")):
        with pytest.raises(InputError, match="write"):
            refused()
