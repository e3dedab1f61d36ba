"""How far a match can be trusted: does it come out again on other prompts, and do its heads do anything that stands out
of the noise?"""

from collections.abc import Callable, Sequence

from workbench.values.refs import Head
from workbench.values.scores import Scores


def heads_within_noise(profile: Scores, confidence: float) -> set[Head]:
    """The measured heads whose mean impact over the examples can't be told from 0: its t interval holds 0 (or a single
    example gives none)."""
    low, high = profile.confidence_interval(confidence)
    outside = (low > 0) | (high < 0)
    measured = ~profile.mean().isnan()
    return {Head(layer, index) for layer, index in (measured & ~outside).nonzero().tolist()}


def stability(
    choice: Sequence[int | None], again: Callable[[int], Sequence[int | None]], *, resamples: int
) -> list[float | None]:
    """The share of resamples in which each head is matched as in `choice`; `again(draw)` matches on a resample."""
    drawn = [again(draw) for draw in range(resamples)]
    return [
        None if column is None else sum(other[row] == column for other in drawn) / resamples
        for row, column in enumerate(choice)
    ]
