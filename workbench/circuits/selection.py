"""From scores to heads: how many of the ranked heads make the circuit. Every rule takes `Scores` over (layer, head) and
a sign.

`needed="negative"`: a negative score means that the task needs the head (path patching); `positive`: impacts of
ablation.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor

from workbench import seeds
from workbench.values.refs import Head
from workbench.values.scores import Scores

Side = Literal["negative", "positive"]


def importance(scores: Scores, needed: Side) -> Scores:
    """The scores turned so that larger is more important."""
    return replace(scores, values=-scores.values if needed == "negative" else scores.values)


def ranked(scores: Scores, needed: Side) -> list[Head]:
    """Measured heads, most important first."""
    return scores.ranked(by="lowest" if needed == "negative" else "highest")


def by_count(scores: Scores, count: int, *, needed: Side = "negative") -> list[Head]:
    """The `count` most important heads."""
    return ranked(scores, needed)[:count]


def by_threshold(scores: Scores, least: float, *, needed: Side = "negative") -> list[Head]:
    """Heads whose mean effect is at least `least` (in the scores' unit) on the needed side."""
    means = importance(scores, needed).mean()
    return [head for head in ranked(scores, needed) if float(means[head.layer, head.index]) >= least]


def by_elbow(scores: Scores, *, needed: Side = "negative") -> list[Head]:
    """Heads in front of the elbow: the point of the ranked, positive means that lies farthest below the line from the
    first to the last.

    Source: the "kneedle" idea of Satopaa et al. 2011. With fewer than three positive means all of them are taken.
    """
    means = importance(scores, needed).mean()
    order = [head for head in ranked(scores, needed) if float(means[head.layer, head.index]) > 0]
    if len(order) < 3:
        return order
    heights = np.array([float(means[head.layer, head.index]) for head in order])
    line = np.linspace(heights[0], heights[-1], len(heights))
    return order[: int((line - heights).argmax())]


def by_significance(
    scores: Scores, *, needed: Side = "negative", rate: float = 0.05, permutations: int = 9999, seed: int = 0
) -> list[Head]:
    """Heads whose mean effect differs from 0 on the needed side, with the false-discovery rate held at `rate`
    (Benjamini-Hochberg).

    p values come from a sign-flip permutation test over the examples (`Scores.permutation_p_values`). Note that a head
    may be significant and small.
    """
    p = importance(scores, needed).permutation_p_values(permutations=permutations, seed=seed, side="greater")
    measured = ~p.isnan()
    adjusted = torch.full_like(p, torch.nan)
    adjusted[measured] = torch.from_numpy(stats.false_discovery_control(p[measured].numpy())).to(p.dtype)
    return [head for head in ranked(scores, needed) if float(adjusted[head.layer, head.index]) <= rate]


def bootstrap_stability(
    choose: Callable[[Int[Tensor, " rows"]], Iterable[Head]], examples: int, *, resamples: int = 20, seed: int = 0
) -> list[float]:
    """Jaccard overlap of the heads that `choose(rows)` takes on resampled prompts with those on all prompts; `rows` are
    example indices."""
    whole, found = set(choose(torch.arange(examples))), []
    for draw in range(resamples):
        rows = torch.randint(0, examples, (examples,), generator=seeds.generator(seed, "bootstrap", draw))
        again = set(choose(rows))
        found.append(len(whole & again) / len(whole | again) if whole | again else 1.0)
    return found
