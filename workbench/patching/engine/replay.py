"""Replay: the part of a forward pass that an intervention changes, and nothing else, for many variants of the
intervention at once.

An edit at layer l and position p leaves everything below l and before p as it was. So a replay enters at layer l with
the residual stream of the clean run, recomputes the positions from p to the last token (the window), attends to the
clean keys and values in front of them, stacks the variants on one axis, and does the last layer at the last token only.
All of it is the model's own arithmetic: its norms, MLPs, rotary angles and weights; no scale is frozen.

A replay exists only for a model whose last token it computes as the hooked forward does, on these very prompts
(`Replay.agrees`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, last_position
from workbench.models.parts import BlockParts, DecoderParts, decoder_parts
from workbench.patching.engine.attend import Keys, attend, ready
from workbench.patching.engine.window import Spots, Window
from workbench.tasks.base import PromptPairs

log = logging.getLogger("workbench")
_SAID: "WeakKeyDictionary[HookedModel, set[str]]" = WeakKeyDictionary()
"""What has been said of a model that goes through hooks: once, not for every batch."""
Residual = Float[Tensor, "variant batch slot d_model"]
Left = Float[Tensor, "variant batch left d_model"]
"""What leaves a layer: as many slots as entered it, or after the last layer the last slot alone."""
MLP_COPIES = 6
"""How many tensors of the MLP's inner width an activation function holds at a time (GPT-2's own formula; a gated MLP
has fewer)."""
PRECISION = 1e3
"""How many roundings of the model's dtype a replay may differ from the hooked forward (as the self-check on loading
allows)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CleanLayer:
    """One layer of the clean run, each [batch pos ...]; q and k as attention multiplies them (normalised and
    rotated)."""

    pre: Tensor
    attention: Tensor
    mlp: Tensor
    z: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    together: Tensor | None
    """The sum of the heads' outputs and the output bias, where a norm stands between it and the residual stream."""

    @property
    def middle(self) -> Tensor:
        """The residual stream after attention."""
        return self.pre + self.attention

    @property
    def post(self) -> Tensor:
        """The residual stream that leaves the layer."""
        return self.pre + self.attention + self.mlp

    def rows(self, index: Tensor) -> "CleanLayer":
        """The layer on some of the prompts."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[index] for name, value in values.items()}
        return CleanLayer(**chosen)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """Replaced inputs of a layer at some slots of the window: q by query head, k and v by key-value head, the residual
    that the MLP reads.

    With `by_query_head` k and v are keyed by query head, and only that head sees them.
    """

    where: Bool[Tensor, "batch slot"]
    q: Mapping[int, Tensor]
    k: Mapping[int, Tensor]
    v: Mapping[int, Tensor]
    mlp: Residual | None = None
    by_query_head: bool = False

    @property
    def attention(self) -> bool:
        """Whether a q, k or v is replaced."""
        return bool(self.q or self.k or self.v)


class Replay:
    """The clean run of some prompts, from which edited runs are continued."""

    def __init__(
        self,
        model: HookedModel,
        parts: DecoderParts,
        mask: Bool[Tensor, "batch pos"],
        clean: list[CleanLayer],
        logits: Tensor,
    ) -> None:
        self.model, self.parts, self.mask, self.clean, self.clean_logits = model, parts, mask, clean, logits

    @classmethod
    def of(cls, model: HookedModel, parts: DecoderParts, pairs: PromptPairs) -> "Replay":
        """The clean run through hooks."""
        kinds = {
            "pre": hooks.residual_pre,
            "attention": hooks.attention_output,
            "mlp": hooks.mlp_output,
            "z": hooks.z,
            "q": hooks.q,
            "k": hooks.k,
            "v": hooks.v,
        }
        if parts.blocks[0].post_attention is not None:
            kinds["together"] = hooks.attention_sum
        if hooks.rotary_cos(0) in model.model.hook_dict:
            kinds |= {"cos": hooks.rotary_cos, "sin": hooks.rotary_sin}
        names = [kind(layer) for layer in range(model.n_layers) for kind in kinds.values()]
        logits, activations = model.activations(pairs.clean, pairs.mask, names)
        clean = [
            _clean_layer(part, {name: activations[kind(layer)] for name, kind in kinds.items()})
            for layer, part in enumerate(parts.blocks)
        ]
        return cls(model, parts, pairs.mask, clean, logits)

    def rows(self, index: Tensor) -> "Replay":
        """The same on some of the prompts (itself when they are all, in order)."""
        if len(index) == len(self.mask) and bool((index[1:] > index[:-1]).all()):
            return self
        clean = [layer.rows(index) for layer in self.clean]
        return Replay(self.model, self.parts, self.mask[index], clean, self.clean_logits[index])

    def variant_bytes(self, window: Window) -> int:
        """How much memory one variant takes at most, in the attention or the MLP of a layer, or in the unembedding."""
        batch, slots = window.index.shape
        columns, keys = (
            (self.parts.n_heads + 2 * self.parts.n_kv_heads) * self.parts.d_head,
            slots + window.prefix.shape[1],
        )
        attention = 3 * columns + 3 * self.parts.n_heads * keys
        block = 5 * self.d_model + max(attention, MLP_COPIES * self.parts.d_mlp)
        return batch * max(slots * block, self.unembedding) * self.clean_logits.element_size()

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.clean[0].pre.shape[-1]

    @property
    def unembedding(self) -> int:
        """Values that one prompt's last token takes on its way to the logits."""
        return 4 * self.d_model + 2 * self.clean_logits.shape[-1]

    def agrees(self) -> bool:
        """Whether the last token, recomputed through every layer, gives the hooked forward's logits to rounding."""
        window = Window.of(self.mask, last_position(self.mask))
        logits = self.logits(self.upward(0, window.at(self.clean[0].pre)[None], window, {}))[0]
        inside = torch.float32 if self.parts.blocks[0].softmax_in_float32 else logits.dtype
        rounding = max(torch.finfo(logits.dtype).eps, torch.finfo(inside).eps)
        allowed = min(PRECISION * rounding, 0.1) * max(1.0, float(self.clean_logits.abs().max()))
        return logits.shape == self.clean_logits.shape and float((logits - self.clean_logits).abs().max()) <= allowed

    @torch.no_grad()
    def upward(
        self, layer: int, residual: Residual, window: Window, inputs: Mapping[int, Inputs]
    ) -> Float[Tensor, "variant batch d_model"]:
        """From the residual stream that enters `layer` to the one that leaves the last layer, at the last token."""
        for above in range(layer, len(self.parts.blocks)):
            residual = self._block(above, residual, window, inputs.get(above))
        return residual[:, :, -1]

    @torch.no_grad()
    def joined_upward(
        self, left: Mapping[int, Float[Tensor, "_ _ _ _"]], window: Window
    ) -> Float[Tensor, "variant batch d_model"]:
        """As `upward`, for variants that join at several layers (`left`: layer -> what leaves it), in the order of the
        layers."""
        final, x = len(self.parts.blocks) - 1, None
        for layer in range(min(left), final + 1):
            x = None if x is None else self._block(layer, x, window, None)
            if layer in left:
                joining = left[layer]
                x = joining if x is None else torch.cat([x, joining])
        assert x is not None
        return x[:, :, -1]

    @torch.no_grad()
    def logits(self, final: Float[Tensor, "variant batch d_model"]) -> Float[Tensor, "variant batch d_vocab"]:
        """The last normalisation and the unembedding."""
        return self.parts.unembed(self.parts.norm_final(final))

    @torch.no_grad()
    def after_attention(self, layer: int, change: Residual, window: Window, mlp_input: Inputs | None = None) -> Left:
        """The residual stream that leaves a layer when its attention output changes by `change` and what enters the
        layer does not.

        In the last layer only the last slot is given.
        """
        clean, part = self.clean[layer], self.parts.blocks[layer]
        if layer == len(self.parts.blocks) - 1:
            change = change[:, :, -1:]
        pre, attention, mlp = (
            window.at(value)[:, -change.shape[2] :] for value in (clean.pre, clean.attention, clean.mlp)
        )
        middle = pre + attention + change
        replaced = mlp_input is not None and mlp_input.mlp is not None
        if part.parallel and not replaced:
            return middle + mlp
        read = _replaced(pre[None] if part.parallel else middle, mlp_input)
        return middle + part.mlp(part.norm_mlp(read))

    @torch.no_grad()
    def entered(self, layer: int, inputs: Inputs, window: Window) -> Left:
        """The residual stream that leaves the lowest layer with replaced inputs, where what enters it is clean."""
        if inputs.attention:
            return self.after_attention(layer, self._attention_change(layer, inputs, window), window, inputs)
        if inputs.mlp is None:
            raise ValueError("nothing is replaced in the layer that is entered")
        return self.after_attention(layer, torch.zeros_like(inputs.mlp), window, inputs)

    def _attention_change(
        self, layer: int, inputs: Inputs, window: Window
    ) -> Float[Tensor, "variant batch slot d_model"]:
        """What replaced q, k and v change in the attention output of a layer: only the heads that read them are
        computed."""
        clean, part, group = self.clean[layer], self.parts.blocks[layer], self.parts.n_heads // self.parts.n_kv_heads
        by_head = inputs.by_query_head or not (inputs.k or inputs.v)
        heads = sorted({*inputs.q, *inputs.k, *inputs.v} if by_head else _group_heads(inputs, group))
        kv = [head // group for head in heads] if by_head else sorted({head // group for head in heads})
        q = _with(
            window.at(clean.q)[None][..., heads, :],
            {heads.index(head): value for head, value in inputs.q.items()},
            inputs.where,
        )
        if inputs.k or inputs.v:
            place = {head: number for number, head in enumerate(heads if by_head else kv)}
            new = [
                _with(
                    window.at(values)[None][..., kv, :],
                    {place[head]: value for head, value in replaced.items()},
                    inputs.where,
                )
                for values, replaced in ((clean.k, inputs.k), (clean.v, inputs.v))
            ]
            count = max(len(value) for value in (q, *new))
            q, k, v = (value.expand(count, *value.shape[1:]) for value in (q, *new))
            z = attend(
                q,
                self._prefix(layer, window, kv),
                Keys(k=k, v=v, visible=window.visible),
                part.scale,
                part.softmax_in_float32,
                part.soft_cap,
            )
        else:
            z = attend(
                q,
                Keys(k=clean.k[:, :, kv], v=clean.v[:, :, kv], visible=self._up_to(window)),
                None,
                part.scale,
                part.softmax_in_float32,
                part.soft_cap,
            )
        change = z - window.at(clean.z)[..., heads, :]
        return self.added(layer, change.flatten(-2) @ part.weight_o[heads].flatten(0, 1), window)

    def head_changes(
        self,
        layer: int,
        composition: str,
        value: Tensor,
        where: Bool[Tensor, "*sender batch slot"],
        window: Window,
        heads: Sequence[int],
    ) -> Float[Tensor, "path batch slot d_model"]:
        """What replacing the q (or a group's k or v) of each of some heads alone does to the attention output; path =
        sender x head.

        `value` is [sender batch slot head d_head] (k, v: kv_head).
        """
        clean, part = self.clean[layer], self.parts.blocks[layer]
        mixed = {name: window.at(getattr(clean, name))[None] for name in ("q", "k", "v")}
        mixed[composition] = torch.where(where[..., None, None], value, mixed[composition])
        q, k, v = (mixed[name].expand(len(value), *mixed[name].shape[1:]) for name in ("q", "k", "v"))
        if composition == "q":
            z = attend(
                q,
                Keys(k=clean.k, v=clean.v, visible=self._up_to(window)),
                None,
                part.scale,
                part.softmax_in_float32,
                part.soft_cap,
            )
        else:
            z = attend(
                q,
                self._prefix(layer, window, None),
                Keys(k=k, v=v, visible=window.visible),
                part.scale,
                part.softmax_in_float32,
                part.soft_cap,
            )
        receivers = self.parts.n_heads if composition == "q" else self.parts.n_kv_heads
        change = (z - window.at(clean.z)).unflatten(3, (receivers, -1)).flatten(4)
        weights = part.weight_o.unflatten(0, (receivers, -1)).flatten(1, 2)
        change = torch.einsum("sbnrw,rwd->srbnd", change[:, :, :, list(heads)], weights[list(heads)]).flatten(0, 1)
        return self.added(layer, change, window)

    def written_by_heads(
        self,
        layer: int,
        z: Float[Tensor, "_ pos head d_head"],
        where: Bool[Tensor, "mask batch slot"],
        window: Window,
        heads: Sequence[int],
    ) -> Float[Tensor, "variant batch slot d_model"]:
        """What each head alone changes in the attention output when it writes `z` at some slots; variant = mask x
        head."""
        z = z.expand(len(self.mask), *z.shape[1:])
        change = window.at((z - self.clean[layer].z)[:, :, list(heads)])
        change = torch.einsum("bshd,hdm->hbsm", change, self.parts.blocks[layer].weight_o[list(heads)])
        change = self.added(layer, change, window)
        return torch.where(where[:, None, ..., None], change, 0.0).flatten(0, 1)

    def added(
        self, layer: int, change: Float[Tensor, "variant batch slot d_model"], place: Window | Spots
    ) -> Float[Tensor, "variant batch slot d_model"]:
        """What a change in the sum of a layer's head outputs changes in what attention adds to the residual stream:
        itself, but where a norm stands between, which is computed anew."""
        clean, part = self.clean[layer], self.parts.blocks[layer]
        if clean.together is None:
            return change
        return part.added(place.at(clean.together) + change) - place.at(clean.attention)

    def _block(self, layer: int, residual: Residual, window: Window, inputs: Inputs | None) -> Left:
        part, clean = self.parts.blocks[layer], self.clean[layer]
        heads, kv_heads, last = self.parts.n_heads, self.parts.n_kv_heads, layer == len(self.parts.blocks) - 1
        split = heads * self.parts.d_head
        normed = part.norm_attention(residual)
        cos, sin = (
            (None, None) if clean.cos is None or clean.sin is None else (window.at(clean.cos), window.at(clean.sin))
        )
        if last and window.width > 1:
            q = linear(normed[:, :, -1:], part.weight_qkv[:, :split], part.bias_qkv, slice(0, split)).unflatten(
                -1, (heads, -1)
            )
            k, v = (
                linear(normed, part.weight_qkv[:, split:], part.bias_qkv, slice(split, None))
                .unflatten(-1, (2, kv_heads, -1))
                .unbind(-3)
            )
            q = ready(q, part.q_norm, None if cos is None else cos[:, -1:], None if sin is None else sin[:, -1:])
            k = ready(k, part.k_norm, cos, sin)
            residual = residual[:, :, -1:]
        else:
            q, k, v = (
                linear(normed, part.weight_qkv, part.bias_qkv, slice(None))
                .unflatten(-1, (-1, self.parts.d_head))
                .split([heads, kv_heads, kv_heads], -2)
            )
            q, k = ready(q, part.q_norm, cos, sin), ready(k, part.k_norm, cos, sin)
        prefix, visible = self._prefix(layer, window, None), window.visible
        if last and visible is not None:
            visible = visible[:, -1:]
        new = Keys(k=k, v=v, visible=visible)
        if inputs is not None and inputs.attention:
            q = _with(q, inputs.q, inputs.where)
            if inputs.by_query_head:
                new, prefix = (
                    new.per_query_head(heads // kv_heads),
                    None if prefix is None else prefix.per_query_head(heads // kv_heads),
                )
            new = Keys(k=_with(new.k, inputs.k, inputs.where), v=_with(new.v, inputs.v, inputs.where), visible=visible)
        z = attend(q, prefix, new, part.scale, part.softmax_in_float32, part.soft_cap)
        written = z.flatten(-2) @ part.weight_o.flatten(0, 1)
        middle = residual + part.added(written if part.bias_o is None else written + part.bias_o)
        read = _replaced(residual if part.parallel else middle, inputs)
        return middle + part.mlp(part.norm_mlp(read))

    def _prefix(self, layer: int, window: Window, kv: list[int] | None) -> Keys | None:
        """The clean keys and values in front of the window."""
        length = window.prefix.shape[1]
        if length == 0:
            return None
        clean = self.clean[layer]
        k, v = clean.k[:, :length], clean.v[:, :length]
        visible = None if bool(window.prefix.all()) else window.prefix
        return Keys(k=k if kv is None else k[:, :, kv], v=v if kv is None else v[:, :, kv], visible=visible)

    def _up_to(self, window: Window) -> Bool[Tensor, "batch slot pos"]:
        """Which real positions each slot sees (itself always)."""
        positions = torch.arange(self.mask.shape[1], device=self.mask.device)
        return (positions <= window.index[..., None]) & self.mask[:, None] | (positions == window.index[..., None])


def _clean_layer(part: BlockParts, values: Mapping[str, Tensor]) -> CleanLayer:
    batch = len(values["pre"])
    angles = {name: values[name].expand(batch, *values[name].shape[1:]) for name in ("cos", "sin") if name in values}
    cos, sin = angles.get("cos"), angles.get("sin")
    rotated = {"q": ready(values["q"], part.q_norm, cos, sin), "k": ready(values["k"], part.k_norm, cos, sin)}
    as_they_are = {name: values[name] for name in ("pre", "attention", "mlp", "z", "v")}
    return CleanLayer(**as_they_are, **rotated, cos=cos, sin=sin, together=values.get("together"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, columns: slice | Tensor) -> Tensor:
    """x @ weight plus some columns of the bias."""
    out = x @ weight
    return out if bias is None else out.add_(bias[columns])


def _group_heads(inputs: Inputs, group: int) -> set[int]:
    """All query heads of the groups that a replaced q, k or v touches."""
    groups = {head // group for head in inputs.q} | {*inputs.k, *inputs.v}
    return {kv * group + member for kv in groups for member in range(group)}


def _with(x: Tensor, replaced: Mapping[int, Tensor], where: Bool[Tensor, "batch slot"]) -> Tensor:
    """x [variant batch slot head d_head] with some heads replaced where asked ([variant batch slot d_head] each); fewer
    slots: the last ones."""
    if not replaced:
        return x
    slots, count = x.shape[2], max(len(value) for value in replaced.values())
    x = x.expand(count, *x.shape[1:]).clone() if len(x) < count else x.clone()
    for head, value in replaced.items():
        x[:, :, :, head] = torch.where(where[:, -slots:, None], value[:, :, -slots:], x[:, :, :, head])
    return x


def _replaced(read: Tensor, inputs: Inputs | None) -> Tensor:
    """What the MLP reads, replaced where asked."""
    if inputs is None or inputs.mlp is None:
        return read
    slots = read.shape[2]
    return torch.where(inputs.where[:, -slots:, None], inputs.mlp[:, :, -slots:], read)


def replay_of(model: HookedModel, pairs: PromptPairs) -> Replay | None:
    """The clean run of some prompts to replay, or None where the replay does not reproduce this model (patch through
    hooks then)."""
    model.require_eval()
    because = "its blocks do more than the replay knows"
    try:
        parts = decoder_parts(model, post_norms=True)
        replay = None if parts is None else Replay.of(model, parts, pairs)
        if replay is not None and replay.agrees():
            return replay
    except InputError:
        raise
    except Exception as error:  # arithmetic that a part of the model does not take, such as a mixture of experts
        because += f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
    if because not in _SAID.setdefault(model, set()):
        _SAID[model].add(because)
        log.warning("%s: patching goes through hooked forwards, which is slow: %s", model.name, because)
    return None
