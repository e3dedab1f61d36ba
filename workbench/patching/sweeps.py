"""Ablation and attribution as one call each, with the defaults that a first look wants."""

from collections.abc import Iterable

from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import ablation_profiles
from workbench.patching.attribution import attribute_edges
from workbench.patching.execution import Execution
from workbench.patching.reference import Reference, head_of, reading, replacement_of, require_model, require_pairs
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric, metric_named
from workbench.values.refs import Head, Position
from workbench.values.scores import Scores

PLAIN = Execution()


def ablate(
    model: HookedModel,
    pairs: PromptPairs,
    heads: Iterable[Head | str] | None = None,
    *,
    metric: str | Metric = "log_probability",
    position: Position = "all",
    reference: Reference = None,
    execution: Execution = PLAIN,
) -> Scores:
    """Impact of ablating each head on its own: metric of the whole model minus metric without the head (eq 3, 4).

    Returns [layer head example], positive = the head helps; NaN for heads that were not asked for. An ablated head's
    output becomes its mean over the pairs' corrupt prompts (never the evaluated clean ones), or what `reference` says:
    prompts whose means are taken, `"counterfactual"` (the prompt's own corrupt output), or `"zero"`. Errors:
    `InputError` for an unknown metric, head or position.
    """
    measured = metric_named(metric)
    require_model(model)
    require_pairs(pairs)
    mine = reading(model, pairs)
    asked = None if heads is None else [model.checked(head_of(head)) for head in heads]
    if asked is not None and not asked:
        raise InputError("there are no heads to ablate; name some, or leave `heads` out for all.")
    replacement, _ = replacement_of(model, mine, reference)
    found = ablation_profiles(
        model,
        mine,
        replacement,
        metrics={measured.name: measured},
        heads=asked,
        position=position,
        batch=execution.batch_of(256),
        memory=execution.memory,
        files=None if execution.path is None else {measured.name: execution.path},
    )
    return found[measured.name]


def attribute(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    metric: str | Metric = "logit_difference",
    steps: int = 1,
    execution: Execution = PLAIN,
) -> Scores:
    """Effect of every edge to first order, from gradients: [sender receiver example], positive = the edge helps.

    `steps=1` is EAP (Syed et al. 2023), more are EAP-IG (Hanna et al. 2024). An estimate; `path_patch` is exact.
    Errors: `InputError` for an unknown metric, and for a model whose blocks attribution does not know.
    """
    measured = metric_named(metric)
    require_model(model)
    require_pairs(pairs)
    return attribute_edges(
        model,
        reading(model, pairs),
        metric=measured,
        unit=measured.unit,
        steps=steps,
        batch=execution.batch_of(32),
    )
