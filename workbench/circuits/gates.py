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

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.engine.remains import StandIns
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import MetricFunction


def gate_scores(
    model: HookedModel,
    pairs: PromptPairs,
    values: StandIns,
    alive: Float[Tensor, "layer head"],
    metric: MetricFunction,
    *,
    steps: int,
) -> Float[Tensor, "layer head batch"]:
    """The integrated gradient of the metric over every head's gate, for each prompt; `alive` is 1 where a head is left,
    0 where it is removed."""
    total = torch.zeros(*alive.shape, len(pairs), device=pairs.clean.device)
    for step in range(1, steps + 1):
        gates = (alive * step / steps)[..., None].expand_as(total).clone().requires_grad_(True)
        with torch.enable_grad(), hooks.edit(model.model, _gated(model, values, gates)):
            logits = model.final_logits(pairs.clean, pairs.mask)
            reached = metric(logits, pairs.answers, pairs.distractors).sum()
            total += torch.autograd.grad(reached, gates)[0]
    return total / steps


def _gated(model: HookedModel, values: StandIns, gates: Tensor) -> dict[str, hooks.Edit]:
    def edit(layer: int) -> hooks.Edit:
        def change(z: Tensor) -> Tensor:
            stand_in = values.z[layer].to(z)
            return stand_in + gates[layer].T[:, None, :, None] * (z - stand_in)

        return change

    return {hooks.z(layer): edit(layer) for layer in range(model.n_layers)}
