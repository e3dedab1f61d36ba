"""The settings of a discovery."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from workbench.circuits.methods.registry import require_method
from workbench.patching.effects import Effect
from workbench.values.metric_names import require_metric

ReplacementKind = Literal["mean", "per_position_mean", "pooled_mean", "resampled", "counterfactual", "zero"]
"""What stands in for an ablated head: its mean over reference prompts (as `data.per_position_means` says, or position
by position, or over all tokens), its output on a drawn reference prompt, on the prompt's own corrupt counterpart, or
zero."""


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DiscoveryConfig:
    """How a circuit is searched for."""

    method: str = "path_patching"
    """A method by name: one of ours (`workbench.circuits.methods`) or of an installed package (an entry point of the
    group `workbench.discovery`)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the method, e.g. `{target: 0.9, positions: [last]}` of `elimination`."""
    replacement: ReplacementKind = "mean"
    """What stands in for what the search ablates."""
    metric: str = "log_probability"
    """What heads are ranked by: `log_probability`, `probability`, `logit_difference`, `accuracy`, or a metric of an
    installed package (an entry point of the group `workbench.metrics`)."""
    effect: Effect = "difference"
    """Of path patching. `relative` with `probability` is Prakash's score; the default is the distillation paper's
    log-probability."""
    heads: Annotated[int, Field(ge=1)] = 6
    """Most heads of one group (path patching), or of the circuit (`mean_ablation`, `eap`, `eap_ig`, `relp`,
    `gim`). Methods with a target take as many as it needs."""
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

    resamples: Annotated[int, Field(ge=0)] = 0
    """Search again on so many resampled sets of the prompts (as many, drawn with repeats), to say how stable the
    circuit is: each costs a search."""

    def __post_init__(self) -> None:
        require_method(self.method)
        require_metric(self.metric)
