"""Accuracy by how much a prompt asks for: the number of operations in it (moves in a scene, hops of a question)."""

from dataclasses import dataclass

import pandas as pd
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.values.scores import wilson_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyByCount:
    """Share of right answers among the prompts of each count, with Wilson's 95 % interval over prompts."""

    counts: tuple[int, ...]
    accuracy: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    prompts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.counts or len({*map(len, (self.counts, self.accuracy, self.intervals, self.prompts))}) != 1:
            raise InputError(
                "accuracy by count needs as many accuracies, intervals and numbers of prompts as counts, and at least "
                "one."
            )

    @classmethod
    def of(cls, correct: Bool[Tensor, " example"], counts: Int[Tensor, " example"]) -> "AccuracyByCount":
        """From one outcome and one count a prompt."""
        groups = [correct[counts == count] for count in counts.unique().tolist()]
        return cls(
            counts=tuple(counts.unique().tolist()),
            accuracy=tuple(float(group.float().mean()) for group in groups),
            intervals=tuple(wilson_interval(int(group.sum()), len(group)) for group in groups),
            prompts=tuple(map(len, groups)),
        )

    def to_frame(self) -> pd.DataFrame:
        """A row per count."""
        low, high = zip(*self.intervals, strict=True)
        return pd.DataFrame(
            {"operations": self.counts, "accuracy": self.accuracy, "low": low, "high": high, "prompts": self.prompts}
        )
