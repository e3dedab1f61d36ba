"""What the beginnings of a ranking keep of the model, on the prompts that the search has seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workbench.errors import InputError
from workbench.patching.replacement import Kind
from workbench.storage import read_typed
from workbench.values.display import Row, Shown

Of = Literal["accuracy", "metric", "kl_divergence"]
"""What a target is a share of: the whole model's accuracy; the way from nothing left to the whole model in the metric
(the logit difference recovered, say); or the KL divergence from the whole model, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SearchCurve(Shown):
    """Of the first k parts of a ranking, everything else ablated, on the discovery prompts. Prompts that a search has
    seen flatter its circuit: what a circuit is worth is said by fresh ones."""

    sizes: tuple[int, ...]
    """Parts that are there, from none to all."""
    accuracy: tuple[float | None, ...]
    """None where it was not measured (inside a round of removals)."""
    metric: tuple[float | None, ...]
    divergence: tuple[float | None, ...]
    """Mean KL divergence from the whole model, nats."""
    unit: str
    """What `metric` is, in words."""
    ablation: Kind
    prompts: int

    def __post_init__(self) -> None:
        if any(len(each) != len(self.sizes) for each in (self.accuracy, self.metric, self.divergence)):
            raise InputError("the curve of a search has a value of each measure for each of its sizes.")

    def share(self, size: int, of: Of = "accuracy") -> float | None:
        """How much of the model so many parts keep; None where that was not measured."""
        at = self.sizes.index(size)
        values = {"accuracy": self.accuracy, "metric": self.metric, "kl_divergence": self.divergence}[of]
        value, whole, empty = values[at], values[-1], values[0]
        if value is None or of == "kl_divergence":
            return value
        if whole is None or empty is None:
            return None
        floor = 0.0 if of == "accuracy" else empty
        return (value - floor) / (whole - floor) if whole != floor else 0.0

    def reaches(self, size: int, target: float, of: Of = "accuracy") -> bool:
        """Whether so many parts keep the target."""
        share = self.share(size, of)
        return share is not None and (share <= target if of == "kl_divergence" else share >= target)

    def _title(self) -> str:
        return f"Curve of a search on its own {self.prompts} prompts, the other parts ablated ({self.ablation})"

    def _table(self) -> tuple[Row, Sequence[Row]]:
        columns = zip(self.sizes, self.accuracy, self.metric, self.divergence, strict=True)
        rows = [(str(size), *("" if x is None else f"{x:.3f}" for x in rest)) for size, *rest in columns]
        return ("parts", "accuracy", self.unit, "KL"), rows

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, value: Any) -> "SearchCurve":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        return read_typed(value, cls, what="the curve of a search")


def plain(values: Sequence[float]) -> tuple[float | None, ...]:
    """NaN, which JSON has not, becomes None."""
    return tuple(None if math.isnan(value) else float(value) for value in values)
