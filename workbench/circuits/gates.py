"""Elimination by attribution, in rounds: for models whose exact elimination costs too much.

Every part p has a gate g_p: it writes r_p + g_p (z_p - r_p), its own output at g = 1 and its replacement r_p at 0. With
the removed parts' gates at 0 and all others together at t,

    score(p) = mean over prompts of | 1/S sum over t = 1/S, 2/S, ..., 1 of  d m / d g_p |

the integrated gradient of the metric over the gates of *what is left* (Sundararajan et al. 2017; over gates as in edge
and node pruning, arXiv 2406.16778). On the way to t = 0 parts that stand in for each other lose their stand-ins
together, so each shows what it is worth; the gradient at t = 1 alone, or a signed mean, says that backups are useless.
After each round the parts of least score go, a share of what is left, and the scores are taken anew. The last size is
found exactly, by evaluating what is left.

Cost: S forwards and backwards a round (about 3 S plain forwards), whatever the number of parts.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.engine.remains import Place, StandIns
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Mlp


def gate_scores(
    model: HookedModel,
    pairs: PromptPairs,
    values: StandIns,
    left: Sequence[Place],
    metric: Callable[[Tensor], Tensor],
    *,
    steps: int,
) -> Float[Tensor, "part batch"]:
    """The absolute integrated gradient of a metric of the logits over the gate of each part that is left, for each
    prompt; every other head (and, where MLPs have stand-ins, every other MLP) is removed."""
    total = torch.zeros(len(left), len(pairs), device=pairs.clean.device)
    for step in range(1, steps + 1):
        gates = torch.full_like(total, step / steps).requires_grad_(True)
        with torch.enable_grad(), hooks.edit(model.model, gated(model, pairs, values, left, gates)):
            total += torch.autograd.grad(metric(model.final_logits(pairs.clean, pairs.mask)).sum(), gates)[0]
    return (total / steps).abs()


def gated(
    model: HookedModel, pairs: PromptPairs, values: StandIns, left: Sequence[Place], gates: Float[Tensor, "part batch"]
) -> dict[str, hooks.Edit]:
    """Edits that let each part write its own output as far as its gate is open, and its stand-in for the rest."""
    shape = (*pairs.clean.shape, model.n_heads)
    heads = {layer: gates.new_zeros(shape) for layer in values.z}
    mlps = {layer: gates.new_zeros(shape[:2]) for layer in values.mlp}
    for place, gate in zip(left, gates, strict=True):
        opened = place.where * gate[:, None]
        if isinstance(place.part, Mlp):
            mlps[place.layer] = mlps[place.layer] + opened
        else:
            one = torch.nn.functional.one_hot(torch.tensor(place.part.index), model.n_heads).to(gates)
            heads[place.layer] = heads[place.layer] + opened[..., None] * one
    edits = {hooks.z(layer): _mixed(opened[..., None], values.z[layer]) for layer, opened in heads.items()}
    return edits | {hooks.mlp_output(layer): _mixed(each[..., None], values.mlp[layer]) for layer, each in mlps.items()}


def _mixed(opened: Tensor, stand_in: Tensor) -> hooks.Edit:
    return lambda value: stand_in.to(value) + opened * (value - stand_in.to(value))
