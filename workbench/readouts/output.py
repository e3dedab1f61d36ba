"""From the residual stream to the logits: the final norm and the unembedding as plain tensors, and what one vector of
the stream adds to a logit.

    logits = W_U^T (w * (x - mean x) / s(x) + b) + b_U          (an RMS norm has no mean and no b)

With the scale s(x) frozen at the model's own x this is linear in x, so any sum of vectors that makes x splits a logit
exactly. The tensors are read off the model and are only a claim about it: `agrees` compares with the model's own
logits, and callers refuse where it does not hold.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Output:
    """Final norm and unembedding of a model."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    """LayerNorm subtracts the mean, RMS norm does not."""
    epsilon: float
    unembedding: Float[Tensor, "d_model d_vocab"]
    unembedding_bias: Float[Tensor, " d_vocab"]

    @classmethod
    def of(cls, model: HookedModel) -> "Output":
        """Read from a `TransformerBridge` or a `HookedTransformer`. Errors: `InputError` for a final norm without
        weights."""
        hooked: Any = model.model
        norm = hooked.ln_final
        bridged = hasattr(norm, "original_component")
        plain = norm.original_component if bridged else norm
        names = ("weight", "bias") if bridged else ("w", "b")
        weight, bias = (getattr(plain, name, None) for name in names)
        if bridged and weight is None and not list(plain.parameters()):  # OLMo's has none, which is a weight of 1
            weight = torch.ones(int(hooked.cfg.d_model), device=model.device)
        if not isinstance(weight, Tensor):
            raise InputError(
                f"{model.name}: the final norm has no weights to read; load the model raw, without folded norms."
            )
        weight = weight.detach() + 1.0 if getattr(norm, "uses_weight_offset", False) else weight.detach()
        rms = norm.uses_rms_norm if bridged else str(hooked.cfg.normalization_type).startswith("RMS")
        unembedding = hooked.W_U.detach()
        return cls(
            weight=weight.float(),
            bias=torch.zeros_like(weight).float() if bias is None else bias.detach().float(),
            centred=not rms,
            epsilon=float(getattr(norm.config, "eps", 1e-5) if bridged else plain.eps),
            unembedding=unembedding.float(),
            unembedding_bias=hooked.b_U.detach().float(),
        )

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """What the norm divides by."""
        x = x.float()
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def logits(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """The logits that a residual stream reads as, normalised by its own scale (the logit lens)."""
        centred = x.float() - x.float().mean(-1, keepdim=True) if self.centred else x.float()
        return (centred / self.scale(x) * self.weight + self.bias) @ self.unembedding + self.unembedding_bias

    def directions(
        self, x: Float[Tensor, "batch d_model"], answers: Int[Tensor, " batch"], distractors: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
        """For each example the direction whose dot product with a part of x is that part's share of logit(answer) -
        logit(distractor), and the share of the biases, which belong to no part of x. The scale is x's own, frozen."""
        read = (self.unembedding[:, answers] - self.unembedding[:, distractors]).T
        constant = read @ self.bias + self.unembedding_bias[answers] - self.unembedding_bias[distractors]
        weighted = read * self.weight
        weighted = weighted - weighted.mean(-1, keepdim=True) if self.centred else weighted
        return weighted / self.scale(x), constant


def refuse_unlike(model: HookedModel, actual: Tensor, expected: Tensor, size: float) -> None:
    """`InputError` where `found` is not the model's own `expected` but for rounding in values of a size."""
    allowed = 1e3 * torch.finfo(expected.dtype).eps * max(1.0, size)
    difference = float((actual - expected.float()).abs().max())
    if not difference <= allowed:
        raise InputError(
            f"{model.name}: its parts do not sum to its logits (difference {difference:.2e}, allowed {allowed:.2e}); "
            "it does something that this file "
            "does not know, e.g. soft-capped logits or norms after attention. Use path patching, which is exact for "
            "every model."
        )
