"""One activation of a clean run replaced at some positions, for all heads of a layer and many sets of positions at
once, by replay."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.models.hooked_model import HookedModel
from workbench.patching.engine.chunks import in_chunks
from workbench.patching.engine.passage import group_by_stretch
from workbench.patching.engine.replay import Replay
from workbench.patching.engine.window import Window

Site = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v"]
"""What is replaced; `z` and `q` head by head, `k` and `v` by key-value head."""
SITES: tuple[Site, ...] = get_args(Site)
BY_HEAD: tuple[Site, ...] = ("z", "q", "k", "v")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patched:
    """The logits of one variant on some prompts."""

    mask: int
    """Which of the position masks."""
    head: int
    """Which head (or key-value head); 0 where the site has none."""
    rows: Int[Tensor, " rows"]
    logits: Float[Tensor, "rows d_vocab"]


def heads_of(site: Site, model: HookedModel) -> int:
    """How many heads (or key-value heads) a site has; 1 where it has none."""
    return {"z": model.n_heads, "q": model.n_heads, "k": model.n_kv_heads, "v": model.n_kv_heads}.get(site, 1)


def replaced(
    replay: Replay,
    site: Site,
    layer: int,
    value: Float[Tensor, "_ pos *rest"],
    masks: Sequence[Bool[Tensor, "batch pos"]],
    *,
    memory: int,
    heads: Sequence[int] | None = None,
) -> Iterator[Patched]:
    """Logits with the site of a layer replaced by `value`, at each mask's positions, each head alone.

    `heads`: which heads (or key-value heads); None means all. q and k are given as attention multiplies them (as in
    `CleanLayer`). A prompt without any position of a mask is left out: it stays clean.
    """
    wanted = list(range(heads_of(site, replay.model)) if heads is None else heads)
    for numbers in _like_masks(masks):
        together = torch.stack([masks[number] for number in numbers])
        for rows in group_by_stretch(replay.mask, together.any(0)):
            part = replay.rows(rows)
            window = Window.of(part.mask, together[:, rows].any(0).int().argmax(1))
            fit = max(1, memory // part.variant_bytes(window))
            where, there = (
                torch.stack([window.at(mask[rows]) for mask in together]),
                value[rows] if len(value) > 1 else value,
            )
            for start in range(0, len(wanted), fit):
                some = wanted[start : start + fit]

                def work(chunk: list[int], part: Replay = part, some: list[int] = some) -> Tensor:
                    return _logits(part, site, layer, there, where[chunk], window, some)  # noqa: B023 (called before the loop goes on)

                for chunk, logits in in_chunks(range(len(numbers)), max(1, fit // len(some)), work):
                    for place, per_head in zip(chunk, logits.unflatten(0, (len(chunk), len(some))), strict=True):
                        yield from (
                            Patched(mask=numbers[place], head=head, rows=rows, logits=each)
                            for head, each in zip(some, per_head, strict=True)
                        )


def _like_masks(masks: Sequence[Bool[Tensor, "batch pos"]], together: int = 8) -> Iterator[list[int]]:
    """Masks in groups of near first positions, so that a window is not much longer than what each of them needs."""
    order = sorted(range(len(masks)), key=lambda number: int(masks[number].any(0).int().argmax()))
    return (order[start : start + together] for start in range(0, len(order), together))


def _logits(
    replay: Replay,
    site: Site,
    layer: int,
    value: Tensor,
    where: Bool[Tensor, "mask batch slot"],
    window: Window,
    heads: Sequence[int],
) -> Float[Tensor, "variant batch d_vocab"]:
    clean = replay.clean[layer]
    if site in ("q", "k", "v"):
        change = replay.head_changes(
            layer, site, window.at(value)[None].expand(len(where), -1, -1, -1, -1), where, window, heads
        )
        return replay.logits(replay.upward(layer + 1, replay.after_attention(layer, change, window), window, {}))
    if site == "z":
        change = replay.written_by_heads(layer, value, where, window, heads)
    else:
        known = {
            "resid_pre": clean.pre,
            "resid_mid": clean.middle,
            "resid_post": clean.post,
            "attn_out": clean.attention,
            "mlp_out": clean.mlp,
        }
        change = torch.where(where[..., None], window.at(value - known[site]), 0.0)
    if site == "resid_pre":
        return replay.logits(replay.upward(layer, window.at(clean.pre) + change, window, {}))
    if site in ("resid_post", "mlp_out"):
        return replay.logits(replay.upward(layer + 1, window.at(clean.post) + change, window, {}))
    return replay.logits(replay.upward(layer + 1, replay.after_attention(layer, change, window), window, {}))
