"""Paths into receivers: what the frozen run records at them is put into a clean run, which goes on from the lowest
receiver."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.models.hooked_model import last_position
from workbench.patching.engine.attend import ready
from workbench.patching.engine.frozen import Corrupt, FrozenRun, FrozenRuns, Variant, entry
from workbench.patching.engine.replay import Inputs, Replay, linear
from workbench.patching.engine.window import Spots, Window
from workbench.values.refs import Composition, Mlp, PathEnd, Position, Receiver

SHARE_OF_STRETCH = 0.8
"""Prompts whose stretch to recompute is at least this share of the longest one's are replayed together."""
Level = tuple[int, int]
"""(layer, 0 for the inputs of its attention, 1 for that of its MLP)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Route:
    """From where to where paths are patched."""

    position: Position = "all"
    receivers: tuple[PathEnd, ...] = ()
    receiver_position: Position = "all"
    freeze_mlps: bool = False
    """Leave the MLPs at their clean outputs too, so that only the residual stream carries the path."""
    by_query_head: bool = False
    """k and v receivers: the head's own view of its group's key or value, in place of the whole group's."""


def level_of(receiver: PathEnd) -> Level:
    """Where a receiver reads."""
    return (receiver.layer, 1) if isinstance(receiver, Mlp) else (receiver.head.layer, 0)


def by_first_receiver(
    variants: Sequence[Variant], order: Sequence[int], receivers: Sequence[PathEnd], *, parallel: bool
) -> Iterator[tuple[Level, list[int]]]:
    """The variants (numbers, in `order`) that share the lowest receiver they can reach; those that reach none are left
    out."""
    places = sorted({level_of(receiver) for receiver in receivers})
    groups: dict[Level, list[int]] = {}
    for number in order:
        layer, part = entry(variants[number])
        reached = [
            place
            for place in places
            if place > (layer, part) and place[0] > layer - (not parallel and part == 0 and place[1])
        ]
        if reached:
            groups.setdefault(reached[0], []).append(number)
    yield from groups.items()


def group_by_stretch(
    mask: Bool[Tensor, "batch pos"], changed: Bool[Tensor, "batch pos"]
) -> Iterator[Int[Tensor, " rows"]]:
    """Prompts in groups of like stretches from their first changed position to the last token; prompts without a change
    are left out."""
    stretch = torch.where(changed.any(1), last_position(mask) - changed.int().argmax(1) + 1, 0)
    rows = stretch.argsort(descending=True, stable=True)
    rows = rows[stretch[rows] > 0]
    while len(rows):
        count = int((stretch[rows] >= SHARE_OF_STRETCH * stretch[rows[0]]).sum())
        yield rows[:count].sort().values
        rows = rows[count:]


class Passage:
    """A route on prompts that are replayed together."""

    def __init__(
        self,
        replay: Replay,
        corrupt: Corrupt,
        sending: Bool[Tensor, "batch pos"],
        receiving: Bool[Tensor, "batch pos"],
        route: Route,
    ) -> None:
        self.replay, self.route = replay, route
        changed = sending & receiving
        self.window = Window.of(replay.mask, changed.int().argmax(1))
        self.spots = Spots.of(changed)
        self.runs = FrozenRuns(replay, corrupt)
        self.where = self.window.at(receiving)
        self.spot, self.inside = self.window.find(self.spots)

    def variant_bytes(self, layers: Collection[int]) -> int:
        """How much memory one variant takes at most on its way through receivers in some layers."""
        return self.replay.variant_bytes(self.window) + self.runs.variant_bytes(self.spots, layers)

    def _layers(self, places: Sequence[Level]) -> set[int]:
        """Where the frozen run is recorded: the receivers' layers, and one more where an MLP's input stands above its
        layer's attention."""
        return {layer for layer, _ in places} | {layer + 1 for layer, part in places if part == 1}

    @torch.no_grad()
    def through(self, first: Level, variants: Sequence[Variant]) -> Float[Tensor, "variant batch d_vocab"]:
        """Patched logits of variants whose lowest receiver is at `first`, in the order of their entry."""
        places = [place for place in sorted({level_of(r) for r in self.route.receivers}) if place >= first]
        run = self.runs.run(
            variants, self.spots, self.spots.real, freeze_mlps=self.route.freeze_mlps, layers=self._layers(places)
        )
        inputs = {layer: self._inputs(layer, run, places) for layer in sorted({layer for layer, _ in places})}
        left = self.replay.entered(first[0], inputs[first[0]], self.window)
        return self.replay.logits(self.replay.upward(first[0] + 1, left, self.window, inputs))

    @torch.no_grad()
    def into_each(
        self, layers: Sequence[int], composition: Composition, variants: Sequence[Variant]
    ) -> list[tuple[int, int, Float[Tensor, "receiver batch d_vocab"]]]:
        """(layer, number of the variant, logits) with each variant into each head's q (each group's k or v) of a layer
        alone.

        Layers are in order, variants in that of their entry; a variant that writes too late for a layer is left out
        there.
        """
        run = self.runs.run(variants, self.spots, self.spots.real, freeze_mlps=self.route.freeze_mlps, layers=layers)
        count = self.replay.parts.n_heads if composition == "q" else self.replay.parts.n_kv_heads
        left, whose = {}, []
        for layer in layers:
            if len(run.pre[layer]):
                value = self._recorded(layer, composition, list(range(count)), run.pre[layer])
                change = self.replay.head_changes(layer, composition, value, self.where, self.window, range(count))
                left[layer] = self.replay.after_attention(layer, change, self.window)
                whose += [(layer, number) for number in range(len(run.pre[layer]))]
        if not left:
            return []
        logits = self.replay.logits(self.replay.joined_upward(left, self.window))
        return [
            (layer, number, part)
            for (layer, number), part in zip(whose, logits.unflatten(0, (len(whose), count)), strict=True)
        ]

    def _inputs(self, layer: int, run: FrozenRun, places: Sequence[Level]) -> Inputs:
        replaced: dict[str, dict[int, Tensor]] = {"q": {}, "k": {}, "v": {}}
        if (layer, 0) in places:
            for name in ("q", "k", "v"):
                heads = sorted(
                    {
                        self._seen_by(r)
                        for r in self.route.receivers
                        if isinstance(r, Receiver) and (r.head.layer, r.composition) == (layer, name)
                    }
                )
                if heads:
                    values = self._recorded(layer, name, heads, run.pre[layer])
                    replaced[name] = dict(zip(heads, values.unbind(3), strict=True))
        return Inputs(
            where=self.where,
            **replaced,
            mlp=self._recorded_residual(layer, run)
            if Mlp(layer) in self.route.receivers and (layer, 1) in places
            else None,
            by_query_head=self.route.by_query_head,
        )

    def _seen_by(self, receiver: Receiver) -> int:
        """The query head, or the key-value head, that a receiver's replaced input belongs to."""
        group = (
            1
            if receiver.composition == "q" or self.route.by_query_head
            else self.replay.parts.n_heads // self.replay.parts.n_kv_heads
        )
        return receiver.head.index // group

    def _recorded(
        self, layer: int, name: str, heads: list[int], pre: Tensor
    ) -> Float[Tensor, "variant batch slot head d_head"]:
        """q, k or v of some heads in the frozen run, on the window; clean where no sender reaches."""
        clean, part, parts = self.replay.clean[layer], self.replay.parts.blocks[layer], self.replay.parts
        own = heads
        if name != "q" and self.route.by_query_head:
            own = [head // (parts.n_heads // parts.n_kv_heads) for head in heads]
        offset = {"q": 0, "k": parts.n_heads, "v": parts.n_heads + parts.n_kv_heads}[name]
        columns = torch.tensor(
            [(offset + head) * parts.d_head + column for head in own for column in range(parts.d_head)],
            device=pre.device,
        )
        value = linear(part.norm_attention(pre), part.weight_qkv[:, columns], part.bias_qkv, columns).unflatten(
            -1, (len(own), parts.d_head)
        )
        if name != "v":
            cos, sin = (None if angle is None else self.spots.at(angle) for angle in (clean.cos, clean.sin))
            value = ready(value, part.q_norm if name == "q" else part.k_norm, cos, sin)
        return self._on_window(value, self.window.at(getattr(clean, name))[:, :, own])

    def _recorded_residual(self, layer: int, run: FrozenRun) -> Float[Tensor, "variant batch slot d_model"]:
        clean = self.replay.clean[layer]
        if self.replay.parts.blocks[layer].parallel:
            return self._on_window(run.pre[layer], self.window.at(clean.pre))
        return self._on_window(run.middle[layer], self.window.at(clean.pre + clean.attention))

    def _on_window(
        self, value: Float[Tensor, "variant batch spot ..."], clean: Float[Tensor, "batch slot ..."]
    ) -> Tensor:
        rows = torch.arange(value.shape[1], device=value.device)[:, None]
        inside = self.inside.reshape(*self.inside.shape, *(1,) * (clean.ndim - 2))
        return torch.where(inside, value[:, rows, self.spot], clean)


def rows_of(corrupt: Corrupt, rows: Int[Tensor, " rows"]) -> Corrupt:
    """The corrupt run on some prompts."""
    whole = len(rows) == len(next(iter(corrupt.values()))) and bool((rows[1:] > rows[:-1]).all())
    return corrupt if whole else {name: value[rows] for name, value in corrupt.items()}
