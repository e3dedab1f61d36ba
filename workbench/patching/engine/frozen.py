"""The frozen run: every attention head at its clean output but the senders, MLPs recomputed. No attention is left to
compute in it.

With the heads fixed, a sender's change at a position stays at that position: it is added to the clean residual stream
there, and only the MLPs above (at those positions) have to be recomputed. All senders go up together, one row each,
joining where they write.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.models import hooks
from workbench.patching.engine.replay import MLP_COPIES, Replay
from workbench.patching.engine.window import Spots
from workbench.values.refs import Embedding, Head, Mlp, Sender

Corrupt = dict[str, Tensor]
"""Activations of the corrupt run by hook name."""
Variant = frozenset[Sender]
"""Senders that are patched together."""


def entry(variant: Collection[Sender]) -> tuple[int, int]:
    """Where a variant first writes: (layer, 0 for attention, 1 for the MLP); the embedding writes below everything."""
    return min(
        ((-1, 0) if isinstance(s, Embedding) else (s.layer, int(isinstance(s, Mlp))) for s in variant),
        default=(10**9, 0),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenRun:
    """Residual streams of the frozen run [variant batch spot d_model] by layer, for the variants that have written by
    then (the first ones)."""

    pre: dict[int, Float[Tensor, "_ _ _ _"]]
    """Entering a layer (n_layers: leaving the last)."""
    middle: dict[int, Float[Tensor, "_ _ _ _"]]
    """After the attention of a layer."""


class FrozenRuns:
    """Frozen runs on some prompts, from their clean replay and the corrupt run's activations."""

    def __init__(self, replay: Replay, corrupt: Corrupt) -> None:
        self.replay, self.corrupt = replay, corrupt

    def variant_bytes(self, spots: Spots, layers: Collection[int]) -> int:
        """How much memory one variant takes at most, what is recorded at some layers included."""
        width = (5 + 2 * len(layers)) * self.replay.d_model + MLP_COPIES * self.replay.parts.d_mlp
        return spots.index.numel() * width * self.replay.clean_logits.element_size()

    @torch.no_grad()
    def run(
        self,
        variants: Sequence[Variant],
        spots: Spots,
        sending: Bool[Tensor, "batch spot"],
        *,
        freeze_mlps: bool,
        layers: Collection[int],
    ) -> FrozenRun:
        """The variants (ordered by `entry`) at spots, with what enters each of `layers`; they send where `sending` is
        True."""
        where, pre, middle = sending[..., None], {}, {}
        x = self._embedded(variants, spots, where)
        for layer in range(max(layers)):
            clean, part = self.replay.clean[layer], self.replay.parts.blocks[layer]
            entered = x
            if layer in layers:
                pre[layer] = x
            written = spots.at(clean.attention)
            x = self._joined(x + written, sum(entry(v) <= (layer, 0) for v in variants), spots.at(clean.pre) + written)
            x = self._with_heads(layer, variants[: len(x)], x, spots, where)
            if layer in layers:
                middle[layer] = x
            read = self._joined(entered, len(x), spots.at(clean.pre)) if part.parallel else x
            out = spots.at(clean.mlp)[None].expand_as(x) if freeze_mlps else part.mlp(part.norm_mlp(read))
            count = sum(entry(v) <= (layer, 1) for v in variants)
            x, out = (
                self._joined(x, count, spots.at(clean.pre) + written),
                self._joined(out, count, spots.at(clean.mlp)),
            )
            x = x + self._with_mlp(layer, variants[:count], out, spots, where)
        pre[max(layers)] = x
        return FrozenRun(pre=pre, middle=middle)

    def _embedded(self, variants: Sequence[Variant], spots: Spots, where: Tensor) -> Tensor:
        count = sum(Embedding() in variant for variant in variants)
        clean = spots.at(self.replay.clean[0].pre)[None]
        if not count:
            return clean[:0]
        change = spots.at(self.corrupt[hooks.residual_pre(0)] - self.replay.clean[0].pre)
        return (clean + torch.where(where, change, 0.0)[None]).expand(count, *clean.shape[1:])

    @staticmethod
    def _joined(x: Tensor, count: int, clean: Tensor) -> Tensor:
        """Rows of the clean run for the variants that write here for the first time."""
        return x if count == len(x) else torch.cat([x, clean[None].expand(count - len(x), *clean.shape)])

    def _with_heads(self, layer: int, variants: Sequence[Variant], x: Tensor, spots: Spots, where: Tensor) -> Tensor:
        sent = [[Head(layer, index) in variant for index in range(self.replay.parts.n_heads)] for variant in variants]
        member = torch.tensor(sent, dtype=x.dtype, device=x.device).reshape(len(variants), self.replay.parts.n_heads)
        rows = member.any(1).nonzero().flatten()
        if not len(rows):
            return x
        change = spots.at(self.corrupt[hooks.z(layer)] - self.replay.clean[layer].z)
        written = torch.einsum(
            "bphd,hdm->hbpm", torch.where(where[..., None], change, 0.0), self.replay.parts.blocks[layer].weight_o
        )
        x = x.clone()
        x[rows] += self.replay.added(
            layer, (member[rows] @ written.flatten(1)).view(len(rows), *written.shape[1:]), spots
        )
        return x

    def _with_mlp(self, layer: int, variants: Sequence[Variant], out: Tensor, spots: Spots, where: Tensor) -> Tensor:
        rows = [row for row, variant in enumerate(variants) if Mlp(layer) in variant]
        if rows:
            out = out.clone()
            out[rows] = torch.where(where, spots.at(self.corrupt[hooks.mlp_output(layer)]), out[rows])
        return out
