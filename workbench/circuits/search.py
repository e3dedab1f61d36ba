"""From a model and pairs of prompts to a circuit, in one call."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict, Unpack

from workbench.circuits.discovery import DiscoveryConfig, backward_search, stacked, top_by_ablation
from workbench.circuits.search_result import CircuitSearch, Method
from workbench.errors import InputError, nearest
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import ablate
from workbench.patching.execution import Execution
from workbench.patching.path import Effect
from workbench.patching.reference import Reference, reading, replacement_of, require_model, require_pairs
from workbench.tasks.base import PromptPairs, Stage
from workbench.values.metrics import Metric, metric_named
from workbench.values.settings import configured

METHODS = ("path_patching", "mean_ablation")
DIRECT = (Stage(name="A", title="direct", position="last"),)
"""The search where no stages are known: heads that write the answer to the logits themselves."""


class SearchSettings(TypedDict, total=False):
    """What of a search can be set besides its method, size and metric; see `DiscoveryConfig`."""

    stages: Sequence[Stage]
    """Of path patching, in place of those that the pairs' task declares."""
    effect: Effect
    least_effect: float
    selection: Literal["interval", "top", "threshold", "elbow", "significance"]
    confidence: float


def find_circuit(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    method: Method | None = None,
    heads: int = 6,
    metric: str | Metric = "log_probability",
    reference: Reference = None,
    execution: Execution = Execution(),
    **settings: Unpack[SearchSettings],
) -> CircuitSearch:
    """The few attention heads that do a task in a model.

    `method=None` takes `path_patching` where the pairs come from a task that declares the stages of its circuit (at
    most `heads` in each stage, searched backward from the logits), else `mean_ablation` (the `heads` whose ablation
    costs most). A head counts if its effect is at least `least_effect` (0.02) of the gap between clean and corrupt
    metric (path patching) or of the whole model's metric (ablation), and its 95 % interval lies above 0: see
    `SearchSettings`. Ablated heads take their mean over the pairs' corrupt prompts, never over the evaluated clean
    ones, unless `reference` says otherwise; the result tells which. `execution.file`: where the scores are kept (path
    patching: beside it, with the stage's name). Errors: `InputError` for an unknown method, metric or setting, and for
    pairs on which clean and corrupt don't differ.
    """
    measured = metric_named(metric)
    require_model(model)
    require_pairs(pairs)
    if method is not None and method not in METHODS:
        raise InputError(f"no method {method!r} of finding a circuit; {nearest(str(method), METHODS)}")
    own = settings.pop("stages", None)
    stages = tuple(own) if own is not None else () if pairs.origin is None else pairs.origin.stages
    chosen = method or ("path_patching" if stages else "mean_ablation")
    given = {"method": chosen, "heads": heads, **settings}
    config = configured(DiscoveryConfig, given, call="find_circuit")
    if chosen == "path_patching":
        if reference is not None:
            raise InputError(
                "path patching takes a head's output from the pair's corrupt prompt, so it has no `reference`; leave "
                "it out, or set method='mean_ablation'."
            )
        return _by_paths(model, reading(model, pairs), stages or DIRECT, measured, config, execution)
    mine = reading(model, pairs)
    replacement, words = replacement_of(model, mine, reference)
    profile = ablate(model, mine, replacement, metric=measured, execution=execution)
    circuit = top_by_ablation(profile, config)
    return CircuitSearch(circuit=circuit, scores=profile, method=chosen, reference=f"ablated: {words}")


def _by_paths(
    model: HookedModel,
    pairs: PromptPairs,
    stages: tuple[Stage, ...],
    metric: Metric,
    config: DiscoveryConfig,
    execution: Execution,
) -> CircuitSearch:
    files = _stage_files(execution.path, stages)
    search = backward_search(
        model, pairs, stages, config, metric=metric, execution=dataclasses.replace(execution, file=None), files=files
    )
    scores = stacked(search.scores)
    assert scores is not None  # the first stage is always scored
    return CircuitSearch(
        circuit=search.circuit,
        scores=scores,
        method="path_patching",
        reference=f"patched: the outputs on the {len(pairs)} pairs' corrupt prompts",
        by_stage=search.scores,
    )


def _stage_files(path: Path | None, stages: tuple[Stage, ...]) -> dict[str, Path] | None:
    return None if path is None else {stage.name: path.with_stem(f"{path.stem}-{stage.name}") for stage in stages}
