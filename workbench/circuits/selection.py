"""From scores to heads: how many of the ranked heads make the circuit. Every rule takes `Scores` over (layer, head), in
which a head that helps is positive.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor

from workbench import seeds
from workbench.values.refs import Head
from workbench.values.scores import Scores


def by_count(scores: Scores, count: int) -> list[Head]:
    """The `count` heads that help most."""
    return scores.ranked()[:count]


def by_threshold(scores: Scores, least: float) -> list[Head]:
    """Heads whose mean effect is at least `least` (in the scores' unit)."""
    means = scores.mean()
    return [head for head in scores.ranked() if float(means[head.layer, head.index]) >= least]


def by_interval(scores: Scores, *, most: int, least: float, confidence: float) -> list[Head]:
    """The strongest heads: at most `most`, of mean effect at least `least`, with their confidence interval above 0."""
    low, _ = scores.confidence_interval(confidence)
    means = scores.mean()
    return [
        head
        for head in scores.top(most)
        if float(means[head.layer, head.index]) >= least and float(low[head.layer, head.index]) > 0
    ]


def by_elbow(scores: Scores) -> list[Head]:
    """Heads in front of the elbow: the point of the ranked, positive means that lies farthest below the line from the
    first to the last.

    Source: the "kneedle" idea of Satopaa et al. 2011. With fewer than three positive means all of them are taken.
    """
    means = scores.mean()
    order = [head for head in scores.ranked() if float(means[head.layer, head.index]) > 0]
    if len(order) < 3:
        return order
    heights = np.array([float(means[head.layer, head.index]) for head in order])
    line = np.linspace(heights[0], heights[-1], len(heights))
    return order[: int((line - heights).argmax())]


def by_significance(scores: Scores, *, rate: float = 0.05, permutations: int = 9999, seed: int = 0) -> list[Head]:
    """Heads whose mean effect is above 0, with the false-discovery rate held at `rate` (Benjamini-Hochberg).

    p values come from a sign-flip permutation test over the examples (`Scores.permutation_p_values`). Note that a head
    may be significant and small.
    """
    p = scores.permutation_p_values(permutations=permutations, seed=seed, side="greater")
    measured = ~p.isnan()
    adjusted = torch.full_like(p, torch.nan)
    adjusted[measured] = torch.from_numpy(stats.false_discovery_control(p[measured].numpy())).to(p.dtype)
    return [head for head in scores.ranked() if float(adjusted[head.layer, head.index]) <= rate]


def bootstrap_stability(
    choose: Callable[[Int[Tensor, " rows"]], Iterable[Head]], examples: int, *, resamples: int = 20, seed: int = 0
) -> list[float]:
    """Jaccard overlap of the heads that `choose(rows)` takes on resampled prompts with those on all prompts; `rows` are
    example indices."""
    whole, overlaps = set(choose(torch.arange(examples))), []
    for draw in range(resamples):
        rows = torch.randint(0, examples, (examples,), generator=seeds.generator(seed, "bootstrap", draw))
        again = set(choose(rows))
        overlaps.append(len(whole & again) / len(whole | again) if whole | again else 1.0)
    return overlaps
