"""The settings of a discovery."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from workbench.patching.effects import Effect


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DiscoveryConfig:
    """How a circuit is searched for."""

    method: Literal["path_patching", "mean_ablation"] = "path_patching"
    metric: Literal["log_probability", "probability", "logit_difference", "accuracy"] = "log_probability"
    effect: Effect = "difference"
    """`relative` with `probability` is Prakash's score; the default is the distillation paper's log-probability."""
    heads: Annotated[int, Field(ge=1)] = 6
    """Most heads of one group, or the size of the circuit with `mean_ablation`."""
    least_effect: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Smallest mean effect of a head, as a share of the gap between the clean and the corrupt metric; weaker heads are
    left out."""
    selection: Literal["interval", "top", "threshold", "elbow", "significance"] = "interval"
    """How many of the ranked heads: at most `heads` in each case; `interval` and `threshold` those of at least
    `least_effect` (`interval`: with their confidence interval above 0), `elbow` those in front of the bend,
    `significance` those that pass a sign-flip test."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """`interval`: a head is taken only if this confidence interval of its mean effect lies wholly above 0;
    `significance`: 1 minus the false-discovery rate."""
