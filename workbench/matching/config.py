"""The settings of a matching."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from workbench.errors import InputError
from workbench.similarity.names import Measure
from workbench.values.metric_names import require_metric

Activation = Literal["z", "result", "pattern"]
"""`hook_z` [d_head], what the head writes to the residual stream [d_model], or its attention probabilities over the
keys [pos]."""
Compared = Literal["activations", "differences"]
"""Of a head's clean run, or clean minus corrupt run: what the two prompts share (the template above all) drops out
(arXiv 2606.16897)."""
Distance = Literal["paper", "own_baseline", "normalised", "profile", "similarity"]
"""Rules that measure a distance between a student head and a teacher head."""
Rule = Literal["paper", "own_baseline", "normalised", "profile", "similarity", "role", "combined", "random", "shuffled"]


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MatchingConfig:
    """How student heads are matched."""

    rule: Rule = "paper"
    """`paper` (eq 5), `own_baseline` (each model against its own), `normalised` (impact / largest impact), `profile`
    (correlation of impacts over examples), `similarity` (CKA of the heads' outputs, not their impact), `combined` (the
    weighted sum of `combine`), `role` (only heads of the same group of the backward search, by `combine` inside it),
    and the controls `random` (to any head of the teacher) and `shuffled` (the paper's matches permuted)."""
    metric: str = "accuracy"
    """What an impact is measured in, by name (of an installed package too); the paper uses accuracy, continuous metrics
    have fewer ties."""
    one_to_one: bool = False
    """Assign each teacher head at most once (optimal assignment), student heads that are left over none; the paper
    allows many-to-one."""
    combine: dict[Distance, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Distances and their weights, e.g. `{similarity: 1.0, profile: 0.5}`: summed for rule `combined`, and inside a
    group for rule `role` (there empty means the paper's distance)."""
    scale: Literal["rank", "minmax"] = "rank"
    """How distances are made comparable before they are summed: by rank among all candidate pairs, or from 0 (least) to
    1 (largest)."""
    measure: Measure = "linear_cka"
    """What `similarity` measures the heads' outputs by; CKA is the debiased one here."""
    compared: Compared = "activations"
    """What of the heads `similarity` measures: their outputs on the clean prompts, or clean minus corrupt."""
    noise: Literal["flag", "drop", "refuse"] = "flag"
    """Heads whose ablation impact can't be told from 0: flag their matches, leave the heads out of the matching, or
    refuse to match."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the interval of an impact that must not hold 0."""
    resamples: Annotated[int, Field(ge=0)] = 50
    """Bootstrap draws of the prompts behind each match's stability; 0 leaves it out."""

    def __post_init__(self) -> None:
        require_metric(self.metric)
        if self.rule == "combined" and not self.combine:
            raise InputError(
                "rule `combined` needs the distances that it sums; set for example `combine: {similarity: 1.0, "
                "profile: 0.5}`."
            )
        if self.combine and self.rule not in ("combined", "role"):
            raise InputError(
                f"rule `{self.rule}` is one distance and combines none; set `rule: combined` (or `role`), or leave "
                "`combine` out."
            )

    @property
    def distances(self) -> dict[Distance, float]:
        """The distances that this rule needs, with their weights; none for the controls (`shuffled` permutes the
        paper's matches)."""
        match self.rule:
            case "random" | "shuffled":
                return {}
            case "combined":
                return self.combine
            case "role":
                return self.combine or {"paper": 1.0}
            case rule:
                return {rule: 1.0}


def replace_rule(config: MatchingConfig, rule: Rule) -> MatchingConfig:
    """The same configuration with another rule."""
    return replace(config, rule=rule, combine=config.combine if rule in ("combined", "role") else {})
