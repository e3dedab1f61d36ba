"""What is left of a model when some of its heads and MLPs are ablated, and that without each of some more, exactly.

A removed head writes its stand-in (a mean, its output on another prompt, zero) whatever is below it, so what it writes
is a constant: neither its queries nor its attention are computed any more. Removing one more head at layer l and from
position p on leaves everything below l and before p as it was. So a candidate enters at its layer with what its removal
changes there, the candidates of all layers are stacked on one axis, and only the last token of the last layer is done.

`Remains` is this arithmetic; `HookedRemains` the same through hooked forwards, for models whose blocks the replay does
not know, and as the reference that tests and benchmarks hold it against.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, last_position
from workbench.models.parts import DecoderParts
from workbench.patching.engine.attend import Keys, attend, ready
from workbench.patching.engine.replay import MLP_COPIES, Replay, linear
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head, Mlp

Logits = Float[Tensor, "batch d_vocab"]
Part = Head | Mlp
"""What can be removed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """A head or an MLP at some tokens of some prompts: what is removed at once."""

    part: Part
    where: Bool[Tensor, "batch pos"]

    @property
    def layer(self) -> int:
        """Its layer."""
        return self.part.layer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StandIns:
    """What removed parts write on some prompts. `z`: layer -> [batch pos head d_head], `mlp`: layer -> [batch pos
    d_model]; an axis of prompts that are all alike has length 1."""

    z: Mapping[int, Float[Tensor, "_ pos head d_head"]]
    mlp: Mapping[int, Float[Tensor, "_ pos d_model"]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Layer:
    """A layer of the present run, and what is removed of it."""

    removed: Bool[Tensor, "batch pos head"]
    removed_mlp: Bool[Tensor, "batch pos"]
    pre: Tensor
    attention: Tensor
    mlp: Tensor
    z: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    together: Tensor | None = None
    """The sum of what its heads write and the output bias, where a norm stands in front of the residual stream."""
    heads: list[int]
    """The heads that are computed: those not removed at every token."""
    constant: Tensor
    """What the others and the output bias write."""


class Remains:
    """The present run on some prompts by the model's own arithmetic, each layer's tensors at hand."""

    def __init__(self, replay: Replay, stand_ins: StandIns, *, memory: int) -> None:
        self.parts: DecoderParts = replay.parts
        self.mask, self.stand_ins, self.memory = replay.mask, stand_ins, memory
        self.rotary = [(layer.cos, layer.sin) for layer in replay.clean]
        self.last = last_position(self.mask)
        self.rows = torch.arange(len(self.mask), device=self.mask.device)
        positions = torch.arange(self.mask.shape[1], device=self.mask.device)
        causal = (positions[None, :] <= positions[:, None]) & self.mask[:, None]
        self.visible = causal | torch.eye(len(positions), dtype=torch.bool, device=self.mask.device)
        nothing = torch.zeros(*self.mask.shape, self.parts.n_heads, dtype=torch.bool, device=self.mask.device)
        self.layers = [
            _Layer(
                removed=nothing.clone(),
                removed_mlp=nothing[..., 0].clone(),
                pre=clean.pre,
                attention=clean.attention,
                mlp=clean.mlp,
                z=clean.z,
                heads=list(range(self.parts.n_heads)),
                constant=self._bias(layer, clean.pre),
            )
            for layer, clean in enumerate(replay.clean)
        ]
        self._weights: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor | None]] = {}
        self._run(0)

    def copy(self) -> "Remains":
        """The same run, to remove parts from without removing them here; tensors are shared until they change."""
        other = copy.copy(self)
        other.layers = [replace(layer, removed=layer.removed.clone()) for layer in self.layers]
        return other

    def _bias(self, layer: int, like: Tensor) -> Tensor:
        bias = self.parts.blocks[layer].bias_o
        return torch.zeros_like(like[:1, :1]) if bias is None else bias[None, None].to(like)

    @torch.no_grad()
    def remove(self, *places: Place) -> None:
        """Take parts away for good, and run what lies above the lowest anew."""
        for place in places:
            layer, where = self.layers[place.layer], place.where & self.mask
            if isinstance(place.part, Mlp):
                layer.removed_mlp = layer.removed_mlp | where
            else:
                layer.removed[..., place.part.index] |= where
        for number in {place.layer for place in places}:
            layer = self.layers[number]
            gone = (layer.removed | ~self.mask[..., None]).all(0).all(0)
            layer.heads = (~gone).nonzero().flatten().tolist()
            layer.constant = self._constant(number, gone.nonzero().flatten().tolist())
        if places:
            self._run(min(place.layer for place in places))

    def _constant(self, layer: int, heads: Sequence[int]) -> Tensor:
        """What the removed heads of a layer and its output bias write."""
        z, weight = self.stand_ins.z[layer][:, :, list(heads)], self.parts.blocks[layer].weight_o[list(heads)]
        return z.flatten(-2) @ weight.flatten(0, 1) + self._bias(layer, self.layers[layer].pre)

    @torch.no_grad()
    def _run(self, first: int) -> None:
        """The present run from a layer on, which is entered by what it was entered by before."""
        x = self.layers[first].pre[None]
        for number in range(first, len(self.layers)):
            layer, part = self.layers[number], self.parts.blocks[number]
            layer.pre = x[0]
            z, k, v = self._heads(number, x, 0, whole=True)
            layer.k, layer.v = (None, None) if k is None or v is None else (k[0], v[0])
            layer.z = self._spread(number, None if z is None else z[0])
            together = self._together(number, z, 0, x)[0]
            layer.attention = part.added(together)
            layer.together = together if part.post_attention is not None else None
            middle = layer.pre + layer.attention
            layer.mlp = self._mlp(number, layer.pre[None] if part.parallel else middle[None], 0)[0]
            x = (middle + layer.mlp)[None]
        self.final = x[0, self.rows, self.last]

    def _spread(self, number: int, z: Tensor | None) -> Tensor:
        """z of all heads, those that are not computed by their stand-ins."""
        every = self.stand_ins.z[number].expand(len(self.mask), *self.stand_ins.z[number].shape[1:]).clone()
        if z is not None:
            every[:, :, self.layers[number].heads] = z
        return every

    @property
    def logits(self) -> Logits:
        """Final logits of what is left."""
        return self._unembedded(self.final[None])[0]

    def _unembedded(self, final: Float[Tensor, "variant batch d_model"]) -> Tensor:
        with torch.no_grad():
            return self.parts.unembed(self.parts.norm_final(final))

    def without_each(self, places: Sequence[Place]) -> Iterator[tuple[int, Logits]]:
        """What is left without each of some places, on its own; those that begin at one token are stacked."""
        starts: dict[int, list[int]] = {}
        for number, place in enumerate(places):
            inside = (place.where & self.mask).any(0).nonzero()
            first = int(inside[0]) if len(inside) else self.mask.shape[1] - 1
            starts.setdefault(min(first, int(self.last.min())), []).append(number)
        for start, numbers in starts.items():
            numbers.sort(key=lambda number: places[number].layer)
            size = max(1, self.memory // self._variant_bytes(self.mask.shape[1] - start))
            for first in range(0, len(numbers), size):
                chunk = numbers[first : first + size]
                final = self._through([places[number] for number in chunk], start)
                yield from zip(chunk, self._unembedded(final), strict=True)

    def _variant_bytes(self, slots: int) -> int:
        """Memory of one candidate at most: attention or MLP of a layer, or the unembedding."""
        parts, keys = self.parts, self.mask.shape[1]
        d_model, d_vocab = self.final.shape[-1], getattr(parts.unembed, "out_features", 0) or 0
        attention = 3 * 3 * parts.n_heads * parts.d_head + 3 * parts.n_heads * keys
        block = 5 * d_model + max(attention, MLP_COPIES * parts.d_mlp)
        return len(self.mask) * max(slots * block, 4 * d_model + 2 * d_vocab) * self.final.element_size()

    @torch.no_grad()
    def _through(self, places: Sequence[Place], start: int) -> Float[Tensor, "variant batch d_model"]:
        """The final residual stream at the last token of each candidate; `places` in the order of their layers."""
        top, x = len(self.layers) - 1, None
        for number in range(places[0].layer, top + 1):
            joining = [place for place in places if place.layer == number]
            parts = [] if x is None else [self._block(number, x, start)]
            parts += [self._changed(place, start) for place in joining]
            x = torch.cat(parts) if len(parts) > 1 else parts[0]
        assert x is not None
        return x[:, :, 0] if x.shape[2] == 1 else x[:, self.rows, self.last - start]

    def _changed(self, place: Place, start: int) -> Float[Tensor, "one batch slot d_model"]:
        """What leaves a layer when one more of its parts is removed and what enters it is as it was."""
        number, layer, part = place.layer, self.layers[place.layer], self.parts.blocks[place.layer]
        if number == len(self.layers) - 1:
            take = lambda value: value[self.rows % len(value), self.last][:, None]  # noqa: E731
        else:
            take = lambda value: value[:, start:]  # noqa: E731
        where, pre, attention, mlp = map(take, (place.where & self.mask, layer.pre, layer.attention, layer.mlp))
        if isinstance(place.part, Mlp):
            stand_in = take(self.stand_ins.mlp[number])
            return (pre + attention + torch.where(where[..., None], stand_in, mlp))[None]
        head = place.part.index
        change = (take(self.stand_ins.z[number])[:, :, head] - take(layer.z)[:, :, head]) @ part.weight_o[head]
        if layer.together is not None:
            change = part.added(take(layer.together) + change) - attention
        middle = pre + attention + torch.where(where[..., None], change, 0.0)
        if part.parallel:
            return (middle + mlp)[None]
        return (middle + self._mlp(number, middle[None], start)[0])[None]

    def _block(self, number: int, x: Tensor, start: int) -> Tensor:
        """A layer as it is left, on residual streams that enter it from token `start` on."""
        part = self.parts.blocks[number]
        z, _, _ = self._heads(number, x, start)
        if number == len(self.layers) - 1:
            x = x[:, self.rows, self.last - start][:, :, None]
        middle = x + part.added(self._together(number, z, start, x))
        return middle + self._mlp(number, x if part.parallel else middle, start)

    def _heads(
        self, number: int, x: Tensor, start: int, *, whole: bool = False
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """z, k and v of the heads that are computed (k and v head by head); of the last layer the last token's z alone,
        unless it is wanted `whole`."""
        layer, part, heads = self.layers[number], self.parts.blocks[number], self.layers[number].heads
        if not heads:
            return None, None, None
        weight, bias = self._columns(number)
        normed, split = part.norm_attention(x), len(heads) * self.parts.d_head
        cos, sin = (None if angle is None else angle[:, start:] for angle in self.rotary[number])
        k, v = (
            linear(normed, weight[:, split:], bias, slice(split, None))
            .unflatten(-1, (2, -1, self.parts.d_head))
            .unbind(-3)
        )
        k, visible = ready(k, part.k_norm, cos, sin), self.visible[:, start:, start:]
        only_last = number == len(self.layers) - 1 and not whole
        if only_last:
            normed, at = normed[:, self.rows, self.last - start][:, :, None], self.last - start
            cos, sin = (None if angle is None else angle[self.rows % len(angle), at][:, None] for angle in (cos, sin))
            visible = visible[self.rows, at][:, None]
        q = linear(normed, weight[:, :split], bias, slice(0, split)).unflatten(-1, (-1, self.parts.d_head))
        q = ready(q, part.q_norm, cos, sin)
        readers = self._key_of(heads)
        full = len(heads) == self.parts.n_heads
        new = Keys(k=k if full else k[..., readers, :], v=v if full else v[..., readers, :], visible=visible)
        prefix = None
        if start:
            assert layer.k is not None
            assert layer.v is not None
            before = self.mask[:, :start]
            prefixes = (value[:, :start] if full else value[:, :start][..., readers, :] for value in (layer.k, layer.v))
            prefix = Keys(
                **dict(zip(("k", "v"), prefixes, strict=True)), visible=None if bool(before.all()) else before
            )
        z = attend(q, prefix, new, part.scale, part.softmax_in_float32, part.soft_cap)
        removed = layer.removed[:, start:][..., heads]
        stand_in = self.stand_ins.z[number][:, start:][:, :, heads]
        if only_last:
            removed = removed[self.rows, self.last - start][:, None]
            stand_in = stand_in[self.rows % len(stand_in), self.last - start][:, None]
        if bool(removed.any()):
            z = torch.where(removed[..., None], stand_in, z)
        return z, k, v

    def _key_of(self, heads: Sequence[int]) -> list[int]:
        """Which of the computed key-value heads each computed head reads."""
        group = self.parts.n_heads // self.parts.n_kv_heads
        order = sorted({head // group for head in heads})
        return [order.index(head // group) for head in heads]

    def _columns(self, number: int) -> tuple[Tensor, Tensor | None]:
        """W_Q of the computed heads, then W_K and W_V of the groups that they read, with their biases."""
        heads = tuple(self.layers[number].heads)
        if (number, heads) not in self._weights:
            part, width = self.parts.blocks[number], self.parts.d_head
            group = self.parts.n_heads // self.parts.n_kv_heads
            keys = [self.parts.n_heads + kv for kv in sorted({head // group for head in heads})]
            wanted = [*heads, *keys, *(key + self.parts.n_kv_heads for key in keys)]
            columns = (torch.tensor(wanted)[:, None] * width + torch.arange(width)).flatten().to(self.mask.device)
            bias = None if part.bias_qkv is None else part.bias_qkv[columns]
            self._weights = {key: value for key, value in self._weights.items() if key[0] != number}
            self._weights[number, heads] = part.weight_qkv[:, columns], bias
        return self._weights[number, heads]

    def _together(self, number: int, z: Tensor | None, start: int, like: Tensor) -> Tensor:
        """The sum of the head outputs of a layer as it is left, and the output bias."""
        layer, part = self.layers[number], self.parts.blocks[number]
        constant = layer.constant
        if constant.shape[1] > 1:
            if like.shape[2] == 1 and number == len(self.layers) - 1:
                constant = constant[self.rows % len(constant), self.last][:, None]
            else:
                constant = constant[:, start:]
        if z is None:
            return constant.expand(len(like), *like.shape[1:])
        return z.flatten(-2) @ part.weight_o[layer.heads].flatten(0, 1) + constant

    def _mlp(self, number: int, read: Tensor, start: int) -> Tensor:
        """The MLP of a layer as it is left, on [variant batch slot d_model] from token `start` on (or the last)."""
        layer, part = self.layers[number], self.parts.blocks[number]
        removed = layer.removed_mlp
        if not bool(removed.any()):
            return part.mlp(part.norm_mlp(read))
        stand_in = self.stand_ins.mlp[number]
        if read.shape[2] == 1 and number == len(self.layers) - 1:
            removed = removed[self.rows, self.last][:, None]
            stand_in = stand_in[self.rows % len(stand_in), self.last][:, None]
        else:
            removed, stand_in = removed[:, start:], stand_in[:, start:]
        if bool((removed | ~self.mask[:, -removed.shape[1] :]).all()) and removed.shape[1] > 1:
            return stand_in.expand(read.shape[1], *stand_in.shape[1:])[None].expand_as(read)
        return torch.where(removed[..., None], stand_in, part.mlp(part.norm_mlp(read)))


class HookedRemains:
    """The same through hooked forwards of the whole model: slow, and right for any model."""

    def __init__(self, model: HookedModel, pairs: PromptPairs, stand_ins: StandIns) -> None:
        self.model, self.pairs, self.stand_ins = model, pairs, stand_ins
        self.removed: list[Place] = []

    def copy(self) -> "HookedRemains":
        """The same, from which parts are removed without removing them here."""
        other = HookedRemains(self.model, self.pairs, self.stand_ins)
        other.removed = [*self.removed]
        return other

    @property
    def logits(self) -> Logits:
        """Final logits of what is left."""
        return self._logits(self.removed)

    def remove(self, *places: Place) -> None:
        """Take parts away for good."""
        self.removed += places

    def without_each(self, places: Sequence[Place]) -> Iterator[tuple[int, Logits]]:
        """A forward for each place."""
        for number, place in enumerate(places):
            yield number, self._logits([*self.removed, place])

    @torch.no_grad()
    def _logits(self, places: Sequence[Place]) -> Logits:
        with hooks.edit(self.model.model, self._edits(places)):
            return self.model.final_logits(self.pairs.clean, self.pairs.mask)

    def _edits(self, places: Sequence[Place]) -> dict[str, hooks.Edit]:
        masks: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        shape = (*self.pairs.clean.shape, self.model.n_heads)
        for place in places:
            if isinstance(place.part, Mlp):
                name, value = hooks.mlp_output(place.layer), self.stand_ins.mlp[place.layer]
                masks[name] = masks.get(name, torch.zeros(*shape[:2], 1, dtype=torch.bool)) | place.where[..., None]
            else:
                name, value = hooks.z(place.layer), self.stand_ins.z[place.layer]
                mask = masks.setdefault(name, torch.zeros(*shape, 1, dtype=torch.bool))
                mask[:, :, place.part.index, 0] |= place.where
            values[name] = value
        return {name: _put(masks[name], values[name]) for name in masks}


def _put(mask: Tensor, value: Tensor) -> hooks.Edit:
    return lambda activation: torch.where(mask.to(activation.device), value.to(activation), activation)


Ablatable = Remains | HookedRemains
"""A model on some prompts from which parts are removed one after another."""
