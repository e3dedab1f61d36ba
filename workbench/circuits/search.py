"""From a model and pairs of prompts to a circuit, in one call."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict, Unpack

from workbench.circuits.config import DiscoveryConfig
from workbench.circuits.methods.base import Inquiry, search_by
from workbench.circuits.methods.registry import method_named, method_names, options_of, require_method
from workbench.circuits.search_curve import Of
from workbench.circuits.search_result import CircuitSearch
from workbench.errors import InputError, nearest
from workbench.models.hooked_model import HookedModel
from workbench.patching.execution import Execution
from workbench.patching.path import Effect
from workbench.patching.reference import Reference, reading, replacement_of, require_model, require_pairs
from workbench.tasks.base import PromptPairs, Stage
from workbench.values.metrics import Metric, metric_named
from workbench.values.settings import configured

METHODS = tuple(method_names())
COMMON = ("effect", "least_effect", "selection", "confidence", "resamples")
"""Settings of `DiscoveryConfig` that a call can name beside `heads` and `metric`."""


class SearchSettings(TypedDict, total=False):
    """What of a search can be set besides its method, size and metric; see `DiscoveryConfig`, and the method's own
    options, of which some stand here."""

    stages: Sequence[Stage]
    """Of path patching, in place of those that the pairs' task declares."""
    effect: Effect
    least_effect: float
    selection: Literal["interval", "top", "threshold", "elbow", "significance"]
    confidence: float
    resamples: int
    target: float
    """Of the eliminations, `greedy` and `learned_gates`: how much the circuit must keep, of `until`."""
    until: Of
    positions: tuple[str, ...]
    """Of the eliminations: named positions at which heads are removed one by one."""
    mlps: bool
    to_the_end: bool
    exchange: bool
    exact_from: int
    """Of `elimination_by_gates`: exact from so many parts on."""
    steps: int
    """Of `eap_ig` and `gim`: points of the integral; of `learned_gates`: steps of the optimiser."""
    ranking: str
    """Of `greedy`: the method whose ranking is walked."""


def find_circuit(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    method: str | None = None,
    heads: int = 6,
    metric: str | Metric = "log_probability",
    reference: Reference = None,
    execution: Execution = Execution(),
    **settings: Unpack[SearchSettings],
) -> CircuitSearch:
    """The few attention heads that do a task in a model.

    `method`: `path_patching` (at most `heads` in each stage, searched backward from the logits), `mean_ablation`,
    `eap`, `eap_ig`, `relp` or `gim` (the `heads` that a ranking puts first), `elimination`, `elimination_by_gates`,
    `greedy` or `learned_gates` (as many as keep `target`, 0.9, of the accuracy), or one of an installed package; None
    takes path patching where the pairs come from a task that declares the stages of its circuit, else `mean_ablation`.
    Where `heads` are taken, one counts if its effect is at least `least_effect` (0.02) of the gap between clean and
    corrupt metric (path patching) or of the whole model's metric (ablation), and its 95 % interval lies above 0: see
    `SearchSettings`, and the methods in `workbench.circuits.methods` for their options. Ablated heads take their mean
    over the pairs' corrupt prompts, never over the evaluated clean ones, unless `reference` says otherwise; the result
    tells which. `execution.file`: where the scores are kept (path patching: beside it, with the stage's name;
    elimination: as JSON), to resume from. Errors: `InputError` for an unknown method, metric or setting, and for pairs
    on which clean and corrupt don't differ.
    """
    measured = metric_named(metric)
    require_model(model)
    require_pairs(pairs)
    own = settings.pop("stages", None)
    stages = tuple(own) if own is not None else () if pairs.origin is None else pairs.origin.stages
    chosen = method or ("path_patching" if stages else "mean_ablation")
    require_method(chosen)
    common, options = _sorted(chosen, dict(settings))
    if chosen == "path_patching" and reference is not None:
        raise InputError(
            "path patching takes a head's output from the pair's corrupt prompt, so it has no `reference`; leave it "
            "out, or set method='mean_ablation'."
        )
    config = configured(DiscoveryConfig, {"method": chosen, "heads": heads, **common}, call="find_circuit")
    finder, mine = method_named(chosen, options), reading(model, pairs)
    inquiry = Inquiry(
        model=model,
        pairs=mine,
        metric=measured,
        config=config,
        stand_in=lambda some: replacement_of(model, some, reference),
        stages=stages,
        execution=dataclasses.replace(execution, file=None),
        file_of=_beside(execution.path),
    )
    return search_by(finder, inquiry)


def _sorted(method: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(common settings, options of the method). Errors: `InputError` for what is neither, with the nearest."""
    options, common = options_of(method), {field.name for field in dataclasses.fields(DiscoveryConfig)} & set(COMMON)
    for name in settings:
        if name not in common and name not in options:
            known = [*common, *options, "stages"]
            raise InputError(f"find_circuit has no setting {name!r} with method {method!r}; {nearest(name, known)}")
    return (
        {name: value for name, value in settings.items() if name in common},
        {name: value for name, value in settings.items() if name not in common},
    )


def _beside(path: Path | None) -> Callable[[str], Path] | None:
    """The file of some scores: the caller's own; a stage's beside it, with the stage's name."""
    if path is None:
        return None
    return lambda name: (
        path.with_stem(f"{path.stem}-{name.removeprefix('path-')}") if name.startswith(("path-", "resample-")) else path
    )
