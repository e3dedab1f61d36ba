"""Intervals and tests of the study against scipy, against simulations, and at their limits."""

import numpy as np
import pytest
import torch
from scipy import stats

from workbench.errors import InputError
from workbench.values.scores import mcnemar
from workbench.values.statistics import compared, mean_interval, rank_correlation


def outcomes(rates: list[float], prompts: int, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(prompts, generator=draw) < rate for rate in rates]


def test_the_interval_of_a_mean_is_students():
    values = [0.61, 0.66, 0.58, 0.7, 0.63]
    found = mean_interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.text == "0.636 [0.58, 0.69]"


def test_one_value_has_no_interval_and_none_is_refused():
    assert mean_interval([0.5]).low is None
    assert mean_interval([0.5]).text == "0.500"
    with pytest.raises(InputError, match="no seed"):
        mean_interval([])


def test_an_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = mean_interval(draw.normal(0.3, 0.1, 5).tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.3 <= found.high
    assert 0.93 < covered / 1000 < 0.97


def test_a_comparison_is_mcnemars_on_each_seed_and_on_their_sum():
    first, second = outcomes([0.7, 0.72, 0.68], 200, 0), outcomes([0.6, 0.58, 0.62], 200, 1)
    found = compared(first, second)
    each = [mcnemar(a, b) for a, b in zip(first, second, strict=True)]
    assert found.per_seed_p == tuple(test[2] for test in each)
    assert (found.only_first, found.only_second) == (sum(test[0] for test in each), sum(test[1] for test in each))
    assert found.pooled_p == mcnemar(torch.cat(first), torch.cat(second))[2]
    differences = [float(a.float().mean() - b.float().mean()) for a, b in zip(first, second, strict=True)]
    assert found.over_seeds.mean == pytest.approx(np.mean(differences))
    assert found.over_prompts.mean == pytest.approx(found.over_seeds.mean)
    assert found.pooled_p < 0.01 < found.over_seeds.mean
    back = compared(second, first)
    assert back.over_prompts.mean == pytest.approx(-found.over_prompts.mean)
    assert back.pooled_p == found.pooled_p


def test_a_condition_against_itself_shows_nothing():
    same = outcomes([0.6, 0.7], 100, 0)
    found = compared(same, same)
    assert found.pooled_p == 1.0
    assert (found.over_seeds.low, found.over_prompts.high) == (0.0, 0.0)


def test_prompts_of_one_scene_count_as_one():
    """Seven equal copies of each prompt add nothing: the interval is that of the scenes."""
    first, second = outcomes([0.7, 0.7], 40, 0), outcomes([0.5, 0.5], 40, 1)
    alone = compared(first, second)
    copied = compared([a.repeat_interleave(7) for a in first], [b.repeat_interleave(7) for b in second], clusters=7)
    assert copied.over_prompts == alone.over_prompts
    naive = compared([a.repeat_interleave(7) for a in first], [b.repeat_interleave(7) for b in second])
    assert naive.over_prompts.high is not None
    assert alone.over_prompts.high is not None
    assert naive.over_prompts.high < alone.over_prompts.high


def test_unequal_seeds_and_ragged_scenes_are_refused():
    with pytest.raises(InputError, match="same seeds"):
        compared(outcomes([0.5], 10, 0), outcomes([0.5, 0.5], 10, 0))
    with pytest.raises(InputError, match="do not divide"):
        compared(outcomes([0.5], 10, 0), outcomes([0.5], 10, 1), clusters=3)


def test_rank_correlation_by_hand() -> None:
    """1 - 6 * (sum of squared differences of ranks) / (n (n^2 - 1)): ranks 1 2 3 4 against 2 1 4 3 differ by 1 each."""
    assert rank_correlation([0.1, 0.2, 0.3, 0.9], [5, 4, 9, 8]) == pytest.approx(1 - 6 * 4 / (4 * 15))
    assert rank_correlation([1, 2, 3], [9, 8, -7]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([], []) is None
    with pytest.raises(InputError, match="in pairs"):
        rank_correlation([1, 2], [1])
