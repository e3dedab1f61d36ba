"""Rules for the way back: what a gradient leaves out so that attribution is closer to what patching does.

The forward pass keeps every value; only derivatives change.

    rule    norms             attention pattern            q, k / v         activation a(g)     product a * u
    plain   as they are       as it is                     1 / 1            a'(g)               both factors
    relp    scale constant    constant                     0 / 1            a(g) / g            half to each
    gim     scale constant    softmax at temperature 2     1/4 / 1/2        a'(g)               half to each

RelP (Jafari et al. 2025, arXiv 2508.21258) takes the coefficients of layer-wise relevance propagation: LN-rule,
AH-rule, identity rule and half rule. What they leave is linear in the residual stream, so that without biases relevance
is conserved: sum over positions of x . d metric / d x is the metric itself, at any layer, for a metric that is linear
in the logits.

GIM (Edin et al. 2025, arXiv 2505.17630) counters self-repair in attention: where a head looks at several tokens that
say the same, taking one away moves attention to the others and nothing seems lost; at a higher temperature the softmax
gives each its share. Every factor of a product takes half of the gradient: queries and keys stand in two products
(scores, and pattern times values), values in one. The softmax's gradient is that of softmax(s / T) to s / T, as in the
authors' code. Norms of single queries and keys (Qwen 3) keep their gradient.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.models.parts import DecoderParts, Map

Rule = Literal["plain", "relp", "gim"]
TEMPERATURE = 2.0
QUERY_KEY, VALUE, FACTOR = 0.25, 0.5, 0.5
"""What GIM leaves of the gradient at a query or key, at a value, and (RelP too) at a factor of the MLP's product."""
LEAST = 1e-6
"""Below this an activation's input counts as this, where it is divided by."""
GATED = ("gate_proj", "up_proj", "act_fn", "down_proj")
PLAIN = (("c_fc", "act", "c_proj"), ("dense_h_to_4h", "act", "dense_4h_to_h"))
"""Names of an MLP's parts, as `transformers` spells them: gated (Llama, Qwen, Gemma), or not (GPT-2, NeoX)."""


def rule_edits(model: HookedModel, parts: DecoderParts, rule: Rule) -> dict[str, hooks.Edit]:
    """Edits under which a backward follows the rule, and every value stays as it is. Errors: `InputError` for norms and
    MLPs whose parts are not known."""
    if rule == "plain":
        return {}
    edits: dict[str, hooks.Edit] = _frozen(hooks.norm_ends("final", 0), parts.norm_final)
    for layer, part in enumerate(parts.blocks):
        edits |= _frozen(hooks.norm_ends("attention", layer), part.norm_attention)
        second = hooks.norm_ends("mlp", layer)
        if second[0] in model.model.hook_dict:
            edits |= _frozen(second, part.norm_mlp)
        edits |= _replaced((hooks.mlp_input(layer), hooks.mlp_output(layer)), _mlp_by(part.mlp, rule, model.name))
        if rule == "relp":
            edits[hooks.pattern(layer)] = torch.detach
        else:
            edits[hooks.pattern(layer)] = softened
            edits |= {kind(layer): _scaled(QUERY_KEY) for kind in (hooks.q, hooks.k)}
            edits[hooks.v(layer)] = _scaled(VALUE)
    return edits


def softened(pattern: Tensor) -> Tensor:
    """The same pattern, with the gradient at its scores that softmax(scores / T) has at scores / T.

    softmax(s / T) is the pattern to the power 1 / T, normalised, so that scores are not needed.
    """
    logs = pattern.clamp(min=torch.finfo(pattern.dtype).tiny).log()
    return _valued(pattern, TEMPERATURE * torch.softmax(logs / TEMPERATURE, -1))


def frozen_norm(norm: Map, residual: Tensor, *, name: str = "this model") -> Callable[[Tensor], Tensor]:
    """The norm with the scale that it has at `residual`. Errors: `InputError` for another norm than LayerNorm and
    RMSNorm."""
    kind, settings = getattr(norm, "func", None), getattr(norm, "keywords", {})
    if kind not in (nn.functional.layer_norm, nn.functional.rms_norm):
        raise InputError(f"{name}: its norms are no LayerNorm or RMSNorm that the rules know; use eap or eap_ig.")
    centres = kind is nn.functional.layer_norm

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if centres else x

    scale = (centred(residual.detach()).square().mean(-1, keepdim=True) + settings["eps"]).rsqrt()
    return lambda x: centred(x) * scale * settings["weight"]


def _frozen(ends: tuple[str, str], norm: Map) -> dict[str, hooks.Edit]:
    return _replaced(ends, lambda x: frozen_norm(norm, x)(x))


def _replaced(ends: tuple[str, str], way_back: Callable[[Tensor], Tensor]) -> dict[str, hooks.Edit]:
    """Edits at a component's input and output: its value, with another function's gradient."""
    entered: dict[str, Tensor] = {}

    def enter(x: Tensor) -> Tensor:
        entered["x"] = x
        return x

    return {ends[0]: enter, ends[1]: lambda value: _valued(value, way_back(entered.pop("x")).view_as(value))}


def _mlp_by(mlp: Any, rule: Rule, name: str) -> Callable[[Tensor], Tensor]:
    """An MLP by a rule's derivatives."""
    if all(hasattr(mlp, part) for part in GATED):
        gate, up, activation, down = (getattr(mlp, part) for part in GATED)

        def gated(x: Tensor) -> Tensor:
            opened, linear = _activated(activation, gate(x), rule), up(x)
            return down(_share(opened, FACTOR) * _share(linear, FACTOR))

        return gated
    for names in PLAIN:
        if all(hasattr(mlp, part) for part in names):
            enter, activation, leave = (getattr(mlp, part) for part in names)
            return lambda x: leave(_activated(activation, enter(x), rule))
    raise InputError(f"{name}: the rules do not know its MLP ({type(mlp).__name__}); use eap or eap_ig.")


def _activated(activation: Callable[[Tensor], Tensor], x: Tensor, rule: Rule) -> Tensor:
    if rule != "relp":
        return activation(x)
    at = torch.where(x.abs() < LEAST, LEAST, x).detach()
    return x * (activation(at) / at)


def _scaled(share: float) -> hooks.Edit:
    return lambda value: _share(value, share)


def _share(value: Tensor, share: float) -> Tensor:
    """The value, with a share of its gradient."""
    return _valued(value, share * value)


def _valued(value: Tensor, way_back: Tensor) -> Tensor:
    """One tensor's value, another's gradient."""
    return value.detach() + (way_back - way_back.detach())
