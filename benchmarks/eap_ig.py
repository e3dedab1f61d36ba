"""EAP-IG as its authors' library computes it, written anew from the paper and the description of that library: the
reference of `attribute_edges` in a benchmark and a test.

Every node's change is kept in one dense array [batch pos sender d_model]; the model runs with a copy of the residual
stream for each head's q, k and v (its own switches); a gradient is multiplied with all senders in front of it as soon
as the backward pass meets it. The points of the Riemann sum hold the corrupt end and not the clean one. The library
leaves the model's weights as they are loaded, so their gradients are computed too (`frozen=True` leaves them out).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric


def eap_ig(model: HookedModel, pairs: PromptPairs, metric: Metric, *, steps: int, frozen: bool = False) -> Tensor:
    """Mean scores [sender receiver], in the order of `attribution.Edges`; zero where there is no edge. No grouped-query
    attention."""
    bridge: Any = model.model
    switches = (bridge.set_use_split_qkv_input, bridge.set_use_attn_result)
    weights = [parameter for parameter in model.parameters().values() if not parameter.requires_grad]
    for switch in switches:
        switch(True)
    for weight in weights:
        weight.requires_grad_(not frozen)
    try:
        return _scores(model, pairs, metric, steps)
    finally:
        for switch in switches:
            switch(False)
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def _scores(model: HookedModel, pairs: PromptPairs, metric: Metric, steps: int) -> Tensor:
    layers, heads = model.n_layers, model.n_heads
    batch, length = pairs.clean.shape
    senders, receivers = 1 + layers * (heads + 1), layers * (3 * heads + 1) + 1
    change = torch.zeros(batch, length, senders, int(model.model.cfg.d_model))
    scores, name = torch.zeros(senders, receivers), hooks.residual_pre(0)

    def write(index: int | slice, sign: float) -> Callable[[Tensor], Tensor]:
        def record(activation: Tensor) -> Tensor:
            change[:, :, index] += sign * activation.detach()
            return activation

        return record

    def read(before: int, index: int | slice) -> Callable[[Tensor], Tensor]:
        def record(activation: Tensor) -> Tensor:
            copy = activation.clone()  # so that what goes past the reader has no part in its gradient
            copy.register_hook(lambda gradient: multiply(gradient, before, index))
            return copy

        def multiply(gradient: Tensor, before: int, index: int | slice) -> None:
            gradient = gradient if gradient.ndim == 4 else gradient[:, :, None]
            product = torch.einsum("bpsd,bprd->sr", change[:, :, :before], gradient)
            scores[:before, index] += product if isinstance(index, slice) else product[:, 0]

        return record

    def writers(sign: float) -> dict[str, hooks.Edit]:
        edits = {name: write(0, sign)}
        for layer in range(layers):
            first = 1 + layer * (heads + 1)
            edits[f"blocks.{layer}.attn.hook_result"] = write(slice(first, first + heads), sign)
            edits[hooks.mlp_output(layer)] = write(first + heads, sign)
        return edits

    readers: dict[str, hooks.Edit] = {}
    for layer in range(layers):
        before, place = 1 + layer * (heads + 1), layer * (3 * heads + 1)
        for number, kind in enumerate("qkv"):
            index = slice(place + number * heads, place + (number + 1) * heads)
            readers[f"blocks.{layer}.hook_{kind}_input"] = read(before, index)
        readers[f"blocks.{layer}.ln2.hook_in"] = read(before + heads, place + 3 * heads)
    readers[hooks.residual_post(layers - 1)] = read(senders, receivers - 1)

    with torch.no_grad(), hooks.edit(model.model, writers(-1.0)):
        model.model(pairs.corrupt, attention_mask=pairs.mask.long())
    corrupt = -change[:, :, 0].clone()
    with torch.no_grad(), hooks.edit(model.model, writers(1.0)):
        model.model(pairs.clean, attention_mask=pairs.mask.long())
    clean = corrupt + change[:, :, 0]
    for step in range(steps):
        point = (corrupt + step / steps * (clean - corrupt)).requires_grad_()
        with hooks.edit(model.model, {name: lambda activation, point=point: point, **readers}):
            logits = model.model(pairs.clean, attention_mask=pairs.mask.long())
        last = pairs.mask.shape[1] - 1 - pairs.mask.flip(1).int().argmax(1)
        values = metric(logits[torch.arange(batch), last], pairs.answers, pairs.distractors)
        values.sum().backward()
    return scores / batch / steps
