"""The way back through a normalisation for all that read it, summed over several points of a line of inputs.

With n = c(x) / s (c subtracts the mean for LayerNorm, and nothing for RMSNorm), y = w n + b, and W h the gradient that
a reader has at y, its gradient at x is

    (c(w W h) - n mean(w W h . n)) / s.

W is the same at every point, h, n and s are not. So a sum over points with shares a needs W once, at the end:

    c(w W sum of a h / s) - sum of n (a / s) mean(w W h . n),

and of each point only h, in the reader's own width, goes into a sum; n and one number a reader and token are kept.
Other norms, and half precision, take autograd's way, point by point.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.models.parts import Map
from workbench.patching.gradient_rules import frozen_norm

FULL = (torch.float32, torch.float64)
"""Precisions in which a norm's gradient is taken by its formula."""


@dataclass(slots=True, kw_only=True, eq=False)
class Readers:
    """The readers of one norm, and the sum of their gradients."""

    norm: Map
    weight: Float[Tensor, "d_model reader width"] | None = None
    """What each reader takes from the norm's output; None: one reader, of all of it."""
    frozen: bool = False
    """Whether s is a constant on the way back."""
    summed: Float[Tensor, "batch pos reader width"] | None = None
    points: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """By formula: n and the readers' numbers; else: x and the readers' gradients."""

    def add(
        self,
        residual: Float[Tensor, "batch pos d_model"],
        gradient: Float[Tensor, "batch pos reader width"],
        share: float,
    ) -> None:
        """Add a share of the readers' gradients (at what they read) at one point."""
        if not self._by_formula(gradient.dtype):
            self.points.append((residual, gradient * share))
            return
        normed, scale = self._normed(residual)
        gradient = gradient * (scale * share)[..., None]
        self.summed = gradient if self.summed is None else self.summed.add_(gradient)
        if not self.frozen:
            read = normed * self._settings["weight"]
            heard = read[:, :, None] if self.weight is None else torch.einsum("bpd,drw->bprw", read, self.weight)
            self.points.append((normed, (gradient * heard).sum(-1).mT / normed.shape[-1]))

    def at(self, prompts: slice) -> Float[Tensor, "batch reader pos d_model"]:
        """The sum of their gradients at the residual stream that the norm reads."""
        if self.summed is None:
            through = (
                through_norm(self.norm, residual[prompts], self._at_norm(gradient[prompts]), frozen=self.frozen)
                for residual, gradient in self.points
            )
            total = next(through)
            for more in through:
                total += more
            return total
        total = self._at_norm(self.summed[prompts]) * self._settings["weight"]
        if self._centres:
            total.sub_(total.mean(-1, keepdim=True))
        for normed, along in () if self.frozen else self.points:
            total.addcmul_(normed[prompts][:, None], along[prompts][..., None], value=-1)
        return total

    def _at_norm(self, gradient: Float[Tensor, "batch pos reader width"]) -> Float[Tensor, "batch reader pos d_model"]:
        """At the norm's output."""
        return (
            gradient.transpose(1, 2) if self.weight is None else torch.einsum("bprw,drw->brpd", gradient, self.weight)
        )

    def _by_formula(self, dtype: torch.dtype) -> bool:
        kinds = (nn.functional.layer_norm, nn.functional.rms_norm)
        return getattr(self.norm, "func", None) in kinds and dtype in FULL

    def _normed(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos 1"]]:
        """(n, 1 / s)."""
        centred = residual - residual.mean(-1, keepdim=True) if self._centres else residual
        scale = (centred.square().mean(-1, keepdim=True) + self._settings["eps"]).rsqrt()
        return centred * scale, scale

    @property
    def _centres(self) -> bool:
        return getattr(self.norm, "func", None) is nn.functional.layer_norm

    @property
    def _settings(self) -> dict[str, Any]:
        return getattr(self.norm, "keywords", {})


def through_norm(
    norm: Map,
    residual: Float[Tensor, "batch pos d_model"],
    gradient: Float[Tensor, "batch reader pos d_model"],
    *,
    frozen: bool = False,
) -> Float[Tensor, "batch reader pos d_model"]:
    """The vector-Jacobian product of any normalisation by autograd, for several gradients at its output; `frozen`: with
    a constant scale."""
    with torch.enable_grad():
        leaf = residual[:, None].expand_as(gradient).clone().requires_grad_()
        return torch.autograd.grad((frozen_norm(norm, leaf) if frozen else norm)(leaf), leaf, gradient)[0]
