"""Interchange intervention (Geiger et al. 2021): chosen heads of a run on the clean prompts take, at chosen tokens, the
values that they have on another run, the source.

    logits of f(clean) with z_h[p] := z_h[p](source) for every head h at its tokens p

Here the source of a prompt is its corrupt counterpart. Everything downstream of the heads is computed anew. With
`gradients=True` the logits stay in the autograd graph along both roads: through the edited run, and through the source
values. (Causal distillation, Wu et al. 2022, arXiv 2112.02505, trains through both.) TransformerLens 4.3 has the same
intervention at whole hook points in `tools.analysis.interchange`.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.counterfactual import corrupt_activations
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head

Site = tuple[Head, Bool[Tensor, "batch pos"]]
"""A head and the tokens of each prompt at which it takes the source's value."""


def interchanged_logits(
    model: HookedModel,
    prompts: PromptPairs,
    sites: Sequence[Site],
    *,
    source: Mapping[str, Float[Tensor, "batch pos head d_head"]] | None = None,
    gradients: bool = False,
) -> Float[Tensor, "batch d_vocab"]:
    """Final logits of the clean prompts with every site at its source value. `source`: z by hook name of the source
    run, in the clean prompts' layout; None runs the corrupt prompts. A site that several name is interchanged once.
    Errors: `InputError` for a token without a counterpart, where the prompts differ in length."""
    if source is None:
        for _, where in sites:
            prompts.require_counterparts(where)
        source = corrupt_activations(model, prompts, source_names(sites), gradients=gradients)[1]
    edits = {name: partial(_at_sites, mask, source[name]) for name, mask in _masks(model, sites).items()}
    with torch.set_grad_enabled(gradients), hooks.edit(model.model, edits):
        return model.final_logits(prompts.clean, prompts.mask)


def source_names(sites: Sequence[Site]) -> list[str]:
    """The hooks whose source values the sites take, in layer order."""
    return [hooks.z(layer) for layer in sorted({head.layer for head, _ in sites})]


def _masks(model: HookedModel, sites: Sequence[Site]) -> dict[str, Bool[Tensor, "batch pos head"]]:
    """Which heads are interchanged at which tokens, by hook name."""
    masks: dict[str, Tensor] = {}
    for head, where in sites:
        model.checked(head)
        mask = masks.setdefault(hooks.z(head.layer), where.new_zeros(*where.shape, model.n_heads))
        mask[..., head.index] |= where
    return masks


def _at_sites(mask: Bool[Tensor, "batch pos head"], source: Tensor, z: Tensor) -> Tensor:
    return torch.where(mask[..., None].to(z.device), source.to(z.device, z.dtype), z)
