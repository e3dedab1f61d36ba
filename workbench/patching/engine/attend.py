"""Attention as arithmetic on q, k and v: rotation, scores, softmax, for many variants of the queries (and of the newest
keys) at once."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.models.parts import Map


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Keys:
    """Keys and values with who may see them. `visible` is [batch key] (for every query), [batch slot key], or None (all
    of them)."""

    k: Tensor
    v: Tensor
    visible: Tensor | None

    def per_query_head(self, group: int) -> "Keys":
        """Repeated for each of the `group` query heads that share them."""
        return Keys(k=self.k.repeat_interleave(group, -2), v=self.v.repeat_interleave(group, -2), visible=self.visible)

    def heads(self, index: list[int]) -> "Keys":
        """Those of some key-value heads."""
        return Keys(k=self.k[..., index, :], v=self.v[..., index, :], visible=self.visible)


def ready(
    x: Float[Tensor, "*batch slot head d_head"], norm: Map | None, cos: Tensor | None, sin: Tensor | None
) -> Float[Tensor, "*batch slot head d_head"]:
    """Queries or keys as attention multiplies them: normalised head by head where the model does so, then rotated by
    half-width pairs.

    `cos` and `sin` are [batch slot rotary_width]; a width below d_head leaves the rest of each head as it is (NeoX).
    """
    x = x if norm is None else norm(x)
    if cos is None or sin is None:
        return x
    cos, sin, width = cos[..., None, :], sin[..., None, :], cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    rotated = turned * cos + half * sin
    return rotated if width == x.shape[-1] else torch.cat([rotated, rest], -1)


def attend(
    q: Float[Tensor, "variant batch slot head d_head"],
    clean: Keys | None,
    new: Keys | None,
    scale: float,
    softmax_in_float32: bool,
    soft_cap: float | None = None,
) -> Float[Tensor, "variant batch slot head d_head"]:
    """z of each head: softmax(scale * q k) v over clean keys [batch pos kv_head d_head], shared by the variants, and
    new ones [variant batch slot kv_head d_head], which each variant has for itself. `soft_cap`: scores s become
    cap tanh(s / cap)."""
    variants, batch, slots, heads, width = q.shape
    kv_heads = (clean or new).k.shape[-2]  # type: ignore[union-attr]
    group = heads // kv_heads
    rows = q.reshape(variants, batch, slots, kv_heads, group, width).permute(
        1, 3, 0, 4, 2, 5
    )  # batch kv_head variant group slot d_head
    scores = []
    if clean is not None:
        flat = rows.reshape(batch, kv_heads, variants * group * slots, width)
        products = (flat @ clean.k.permute(0, 2, 3, 1)).view(batch, kv_heads, variants, group, slots, -1)
        scores.append(_masked(_capped(products.mul_(scale), soft_cap), clean.visible))
    if new is not None:
        flat = rows.reshape(batch, kv_heads, variants, group * slots, width)
        products = (flat @ new.k.permute(1, 3, 0, 4, 2)).view(batch, kv_heads, variants, group, slots, -1)
        scores.append(_masked(_capped(products.mul_(scale), soft_cap), new.visible))
    weights = torch.softmax(
        scores[0] if len(scores) == 1 else torch.cat(scores, -1),
        -1,
        dtype=torch.float32 if softmax_in_float32 else None,
    ).to(q.dtype)
    z = torch.zeros(())
    if clean is not None:
        old = weights[..., : clean.k.shape[1]].reshape(batch, kv_heads, variants * group * slots, -1)
        z = (old @ clean.v.permute(0, 2, 1, 3)).view(batch, kv_heads, variants, group, slots, width)
    if new is not None:
        own = weights[..., weights.shape[-1] - new.k.shape[2] :].reshape(batch, kv_heads, variants, group * slots, -1)
        own = (own @ new.v.permute(1, 3, 0, 2, 4)).view(batch, kv_heads, variants, group, slots, width)
        z = own if clean is None else z.add_(own)
    return z.permute(2, 0, 4, 1, 3, 5).reshape(variants, batch, slots, heads, width)


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _masked(scores: Tensor, visible: Bool[Tensor, "..."] | None) -> Tensor:
    """Scores [batch kv_head variant group slot key] with what may not be seen at minus infinity."""
    if visible is None:
        return scores
    shaped = visible[:, None, None, None, None] if visible.ndim == 2 else visible[:, None, None, None]
    return scores.masked_fill_(~shaped, -torch.inf)
