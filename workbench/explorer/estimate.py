"""A first guess of every head's effect from one gradient, for models whose exact sweep takes seconds.

To first order the metric m falls, when a head's output z becomes z', by

    effect ≈ Σ over positions of (z - z') · ∂m/∂z

with the gradient at the clean prompt. For the total effect (activation patching, ablation) it flows through all that
follows; for the direct one (path patching to the logits) the heads above are constants, so that it flows through MLPs
alone. Positive: the head helps. Source: Nanda 2023, "Attribution patching".
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.replacement import Replacement
from workbench.tasks.base import PromptPairs
from workbench.tasks.counterparts import refuse_unequal
from workbench.values.metrics import Metric
from workbench.values.scores import Scores


def estimated(
    model: HookedModel,
    pairs: PromptPairs,
    replacements: Sequence[Replacement],
    *,
    metric: Metric,
    position: str,
    direct: bool,
) -> list[Scores]:
    """The estimated effect of every head, once for each replacement: [layer head example]. One forward with a backward,
    beside what the replacements take. `direct`: along the path to the logits alone."""
    model.require_eval()
    outputs: dict[int, Tensor] = {}

    def leaf(layer: int) -> hooks.Edit:
        def change(z: Tensor) -> Tensor:
            if direct:
                outputs[layer] = z.detach().requires_grad_()
                return outputs[layer]
            moved = torch.zeros_like(z, requires_grad=True)
            outputs[layer] = moved
            values[layer] = z.detach()
            return z + moved

        return change

    if any(replacement.kind == "counterfactual" for replacement in replacements):
        refuse_unequal(pairs.counterparts, "an estimate of every head's ablation by its corrupt output")
    values: dict[int, Tensor] = {}
    edits = {hooks.z(layer): leaf(layer) for layer in range(model.n_layers)}
    with torch.enable_grad(), hooks.edit(model.model, edits):
        logits = model.final_logits(pairs.clean, pairs.mask)
        whole = metric(logits, pairs.answers, pairs.distractors)
        leaves = [outputs[layer] for layer in range(model.n_layers)]
        gradients = torch.autograd.grad(whole.sum(), leaves, allow_unused=True, materialize_grads=True)
    clean = [outputs[layer].detach() if direct else values[layer] for layer in range(model.n_layers)]
    where = pairs.position(position)[..., None]
    unit = f"fall of {metric.unit}, estimated by attribution"
    return [
        Scores.of_heads(
            torch.stack(
                [
                    _fall(clean[layer], replacement.at(layer, pairs), gradients[layer], where)
                    for layer in range(model.n_layers)
                ]
            ).cpu(),
            unit=unit,
            baseline=float(whole.detach().mean()),
        )
        for replacement in replacements
    ]


def _fall(
    clean: Float[Tensor, "batch pos head d_head"],
    instead: Tensor,
    gradient: Float[Tensor, "batch pos head d_head"],
    where: Tensor,
) -> Float[Tensor, "head batch"]:
    products = ((clean - instead.to(clean)) * gradient).float().sum(-1)
    return (products * where).sum(1).T
