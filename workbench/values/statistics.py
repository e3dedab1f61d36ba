"""How sure a comparison of two trainings is: over seeds, over prompts, over both.

Seeds are few and prompts are shared by all of them, so no single number tells it all: the interval over seeds says what
another training would give on these prompts, the one over prompts what these trainings would give on other prompts.
McNemar's test is exact on each seed; pooled over seeds it takes their discordant prompts for independent, which they
are not quite.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy import stats
from torch import Tensor

from workbench.errors import InputError
from workbench.values.scores import mcnemar


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its interval; the interval is missing where a single value leaves nothing to estimate it from."""

    mean: float
    low: float | None
    high: float | None
    count: int
    """Of the values: seeds, or prompts."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def text(self) -> str:
        """`.675 [.65, .70]`."""
        spread = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.mean:.3f}{spread}"


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Mean and Student's t interval. Errors: `InputError` without values."""
    if not len(values):
        raise InputError("there is nothing to average: no seed of this condition has been run.")
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return Estimate(mean=float(array.mean()), low=None, high=None, count=1)
    half = float(stats.t.ppf(0.5 + level / 2, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5)
    return Estimate(
        mean=float(array.mean()), low=float(array.mean()) - half, high=float(array.mean()) + half, count=len(array)
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation of paired values; None where one side never differs. Errors: `InputError` for sides
    of unequal length."""
    if len(first) != len(second):
        raise InputError(f"{len(first)} values stand against {len(second)}; give them in pairs.")
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(stats.spearmanr(first, second)[0])  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A condition against another one on the same seeds and prompts; differences are first minus second, in
    accuracy."""

    over_seeds: Estimate
    over_prompts: Estimate
    """Of each prompt's mean over seeds; prompts of one scene count as one (`clusters`)."""
    per_seed_p: tuple[float, ...]
    """McNemar's exact test of each seed, two-sided."""
    only_first: int
    only_second: int
    """Discordant prompts, summed over seeds."""
    pooled_p: float
    """McNemar's exact test on the summed discordant prompts."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compared(
    first: Sequence[Bool[Tensor, " prompt"]], second: Sequence[Bool[Tensor, " prompt"]], *, clusters: int = 1
) -> Comparison:
    """Two conditions, each with one vector of outcomes (right or wrong) per seed, in the same order of seeds and
    prompts.

    `clusters`: how many consecutive prompts belong to one scene. Errors: `InputError` for unequal seeds, or prompts
    that do not divide into scenes.
    """
    if len(first) != len(second):
        raise InputError(
            f"{len(first)} seeds of the first condition stand against {len(second)} of the second; run both on the "
            "same seeds."
        )
    tests = [mcnemar(a, b) for a, b in zip(first, second, strict=True)]
    differences = np.stack(
        [a.numpy().astype(float) - b.numpy().astype(float) for a, b in zip(first, second, strict=True)]
    )
    if differences.shape[1] % clusters:
        raise InputError(f"{differences.shape[1]} prompts do not divide into scenes of {clusters}.")
    only_first, only_second = sum(test[0] for test in tests), sum(test[1] for test in tests)
    discordant = only_first + only_second
    return Comparison(
        over_seeds=mean_interval(differences.mean(1).tolist()),
        over_prompts=mean_interval(differences.mean(0).reshape(-1, clusters).mean(1).tolist()),
        per_seed_p=tuple(test[2] for test in tests),
        only_first=only_first,
        only_second=only_second,
        pooled_p=float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0,
    )
