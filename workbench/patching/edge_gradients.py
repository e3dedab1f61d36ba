"""What edge attribution multiplies: the change of every sender's output, and the metric's gradient at what every
receiver reads; and their products, in chunks that fit a memory budget.

    product[sender, receiver, example] = sum over positions of (clean - corrupt output of the sender) . gradient

A run keeps a sender's change in its smallest form (a head's z, before W_O) and a receiver's gradient likewise (at q, k
or v, before the projection and the norm). They are spelled out in the residual stream for one layer of receivers, some
prompts and some senders at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.models.parts import DecoderParts, Map
from workbench.patching.gradient_rules import Rule, frozen_norm, rule_edits
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric

GRAPH_COPIES = 24
"""How many copies of the residual stream a layer's graph holds (seen on GPT-2: of its MLP's inner width 8 to 10)."""
NORM_COPIES = 3
"""How many copies of a layer's gradients the way back through a norm takes at a time."""
FULL = (torch.float32, torch.float64)
"""Precisions in which a norm's gradient is taken by its formula."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sent:
    """Clean minus corrupt output of every sender on some prompts, and the two runs' embeddings."""

    model: HookedModel
    clean: Float[Tensor, "batch pos d_model"]
    corrupt: Float[Tensor, "batch pos d_model"]
    z: tuple[Float[Tensor, "batch pos head d_head"], ...]
    mlp: tuple[Float[Tensor, "batch pos d_model"], ...]
    mask: Tensor

    @classmethod
    def of(cls, model: HookedModel, pairs: PromptPairs) -> "Sent":
        """Two forwards."""
        layers = range(model.n_layers)
        names = [hooks.residual_pre(0), *(kind(layer) for layer in layers for kind in (hooks.z, hooks.mlp_output))]
        clean, corrupt = (model.activations(tokens, pairs.mask, names)[1] for tokens in (pairs.clean, pairs.corrupt))
        change = {name: clean[name].sub_(corrupt[name]) for name in names[1:]}
        return cls(
            model=model,
            clean=clean[names[0]],
            corrupt=corrupt[names[0]],
            z=tuple(change[hooks.z(layer)] for layer in layers),
            mlp=tuple(change[hooks.mlp_output(layer)] for layer in layers),
            mask=pairs.mask,
        )

    @property
    def count(self) -> int:
        """Senders: the embedding, and every head and MLP."""
        return 1 + len(self.z) * (self.model.n_heads + 1)

    @property
    def row_bytes(self) -> int:
        """Memory of one sender's output on one prompt."""
        return self.clean[0].numel() * self.clean.element_size()

    def outputs(self, prompts: slice, senders: range) -> Float[Tensor, "batch sender pos_d_model"]:
        """The change of consecutive senders, positions and width in one axis; zero on padding."""
        width, heads = self.clean.shape[-1], self.model.n_heads
        out = self.clean.new_empty(len(self.clean[prompts]), len(senders), self.clean.shape[1], width)
        if 0 in senders:
            out[:, 0] = self.clean[prompts] - self.corrupt[prompts]
        for layer in range(len(self.z)):
            first = 1 + layer * (heads + 1) - senders.start  # the place of the layer's first head in `out`
            low, high = max(first, 0), min(first + heads, len(senders))
            if low < high:
                index = slice(low - first, high - first)
                weights = self.model.output_weights(layer)[index].detach()
                out[:, low:high] = torch.einsum("bphw,hwd->bhpd", self.z[layer][prompts][:, :, index], weights)
            if 0 <= first + heads < len(senders):
                out[:, first + heads] = self.mlp[layer][prompts]
        return out.mul_(self.mask[prompts][:, None, :, None]).flatten(2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """Gradients of the summed metric at every q, k, v, MLP input and at the last residual, with the residual streams
    that the norms in front of them read."""

    model: HookedModel
    parts: DecoderParts
    at: dict[str, Tensor]
    pre: tuple[Float[Tensor, "batch pos d_model"], ...]
    middle: tuple[Float[Tensor, "batch pos d_model"], ...]
    rule: Rule = "plain"

    @classmethod
    def of(
        cls,
        model: HookedModel,
        parts: DecoderParts,
        pairs: PromptPairs,
        metric: Metric,
        embedded: Tensor,
        rule: Rule = "plain",
    ) -> "Gradients":
        """One forward from these embeddings and one backward, by a rule."""
        layers, read = range(model.n_layers), (hooks.q, hooks.k, hooks.v, hooks.mlp_input)
        taps: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        wanted = [*(kind(layer) for layer in layers for kind in read), hooks.residual_post(model.n_layers - 1)]
        edits = {name: _tap(taps, name) for name in wanted}
        edits |= {name: _look(seen, name) for name in (hooks.attention_output(layer) for layer in layers)}
        edits |= {name: _look(seen, name) for name in (hooks.residual_pre(layer) for layer in layers[1:])}
        with torch.enable_grad():
            leaf = embedded.clone().requires_grad_()
            edits[hooks.residual_pre(0)] = lambda activation: leaf
            for name, change in rule_edits(model, parts, rule).items():
                edits[name] = _then(edits[name], change) if name in edits else change
            with hooks.edit(model.model, edits):
                logits = model.final_logits(pairs.clean, pairs.mask)
            values = metric(logits, pairs.answers, pairs.distractors)
            unused = rule == "relp"  # constant patterns: nothing goes through queries and keys
            leaves = [taps[name] for name in wanted]
            gradients = torch.autograd.grad(values.sum(), leaves, allow_unused=unused, materialize_grads=unused)
        seen[hooks.residual_pre(0)] = embedded
        pre = [seen[hooks.residual_pre(layer)] for layer in layers]
        middle = [
            pre[layer] if parts.blocks[layer].parallel else pre[layer] + seen[hooks.attention_output(layer)]
            for layer in layers
        ]
        return cls(
            model=model,
            parts=parts,
            at=dict(zip(wanted, gradients, strict=True)),
            pre=tuple(pre),
            middle=tuple(middle),
            rule=rule,
        )

    def into_attention(self, layer: int, prompts: slice) -> Float[Tensor, "batch receiver pos d_model"]:
        """At the residual stream that each q, k and v of a layer reads for itself."""
        part, pre, counts = self.parts.blocks[layer], self.pre[layer][prompts], self.counts
        weights = part.weight_qkv.split([count * self.parts.d_head for count in counts.values()], 1)
        normed, place = pre.new_empty(len(pre), sum(counts.values()), *pre.shape[1:]), 0
        for (name, count), weight in zip(counts.items(), weights, strict=True):
            at = self.at[{"q": hooks.q, "k": hooks.k, "v": hooks.v}[name](layer)][prompts]
            normed[:, place : place + count] = torch.einsum(
                "bphw,dhw->bhpd", at, weight.unflatten(1, (count, self.parts.d_head))
            )
            place += count
        return through_norm(part.norm_attention, pre, normed, frozen=self.rule != "plain")

    def into_mlp(self, layer: int, prompts: slice) -> Float[Tensor, "batch receiver pos d_model"]:
        """At the residual stream that the MLP of a layer reads."""
        gradient = self.at[hooks.mlp_input(layer)][prompts][:, None]
        norm, frozen = self.parts.blocks[layer].norm_mlp, self.rule != "plain"
        return through_norm(norm, self.middle[layer][prompts], gradient, frozen=frozen)

    def into_logits(self, prompts: slice) -> Float[Tensor, "batch receiver pos d_model"]:
        """At the last residual stream."""
        return self.at[hooks.residual_post(self.model.n_layers - 1)][prompts][:, None]

    @property
    def counts(self) -> dict[str, int]:
        """Receivers of each kind in a layer's attention."""
        return {"q": self.parts.n_heads, "k": self.parts.n_kv_heads, "v": self.parts.n_kv_heads}


def graph_bytes(parts: DecoderParts, length: int) -> int:
    """About how much one prompt's graph takes, kept for its backward: a dozen copies of the residual stream and of an
    MLP's inner activations a layer, and the attention patterns."""
    weight = parts.blocks[0].weight_o
    values = GRAPH_COPIES * (weight.shape[-1] + parts.d_mlp) // 2 + 4 * parts.n_heads * length
    return len(parts.blocks) * length * values * weight.element_size()


@torch.no_grad()
def add_products(scores: Float[Tensor, "sender receiver batch"], sent: Sent, gradients: Gradients, memory: int) -> None:
    """Add every sender's product with every receiver above it to `scores` (edges that there are not stay as they are).

    `memory`: bytes for the senders' outputs and a layer's gradients together; as many prompts at a time as it allows,
    and where one prompt is too much, as many senders (one at least).
    """
    inputs = sum(gradients.counts.values())
    rows = memory // sent.row_bytes
    prompts = max(1, rows // (sent.count + NORM_COPIES * inputs))
    chunk = min(sent.count, max(1, rows - NORM_COPIES * inputs))
    for start in range(0, len(sent.clean), prompts):
        some = slice(start, start + prompts)
        whole = sent.outputs(some, range(sent.count)) if chunk == sent.count else None
        for receivers, below, into in _receivers(sent, gradients, some):
            for first in range(0, below, chunk):
                senders = range(first, min(first + chunk, below))
                change = sent.outputs(some, senders) if whole is None else whole[:, first : senders.stop]
                scores[first : senders.stop, receivers, some] += (change @ into.flatten(2).mT).permute(1, 2, 0)


def _receivers(
    sent: Sent, gradients: Gradients, prompts: slice
) -> Iterator[tuple[slice, int, Float[Tensor, "batch receiver pos d_model"]]]:
    """(places of some receivers, how many senders come before them, the gradients there), from the first layer up."""
    model, place = sent.model, 0
    for layer in range(model.n_layers):
        into, below = gradients.into_attention(layer, prompts), 1 + layer * (model.n_heads + 1)
        yield slice(place, place + into.shape[1]), below, into
        place += into.shape[1]
        below += 0 if model.has_parallel_blocks else model.n_heads
        yield slice(place, place + 1), below, gradients.into_mlp(layer, prompts)
        place += 1
    yield slice(place, place + 1), sent.count, gradients.into_logits(prompts)


def through_norm(
    norm: Map,
    residual: Float[Tensor, "batch pos d_model"],
    gradient: Float[Tensor, "batch receiver pos d_model"],
    *,
    frozen: bool = False,
) -> Float[Tensor, "batch receiver pos d_model"]:
    """The vector-Jacobian product of a normalisation, for several gradients at its output.

    With n = (x - mean x) / s (LayerNorm) or x / s (RMSNorm), y = w n + b, and g the gradient at n (w times that at y):
    (g - mean g - n mean(g n)) / s, without mean g for RMSNorm. Other norms, and half precision, take autograd's way.
    `frozen`: s is a constant, and n mean(g n) falls away.
    """
    kind, settings = getattr(norm, "func", None), getattr(norm, "keywords", {})
    if kind not in (nn.functional.layer_norm, nn.functional.rms_norm) or gradient.dtype not in FULL or frozen:
        with torch.enable_grad():
            leaf = residual[:, None].expand_as(gradient).clone().requires_grad_()
            return torch.autograd.grad((frozen_norm(norm, leaf) if frozen else norm)(leaf), leaf, gradient)[0]
    centred = residual - residual.mean(-1, keepdim=True) if kind is nn.functional.layer_norm else residual
    scale = (centred.square().mean(-1, keepdim=True) + settings["eps"]).rsqrt()
    normed = centred * scale
    g = gradient * settings["weight"]
    along = torch.einsum("brpd,bpd->brp", g, normed)[..., None] / g.shape[-1]
    if kind is nn.functional.layer_norm:
        g.sub_(g.mean(-1, keepdim=True))
    return g.addcmul_(normed[:, None], along, value=-1).mul_(scale[:, None])


def _tap(taps: dict[str, Tensor], name: str) -> hooks.Edit:
    """An edit that changes nothing, and keeps the tensor that the rest of the forward is computed from."""

    def keep(activation: Tensor) -> Tensor:
        taps[name] = activation.clone()
        return taps[name]

    return keep


def _then(first: hooks.Edit, second: hooks.Edit) -> hooks.Edit:
    return lambda activation: second(first(activation))


def _look(seen: dict[str, Tensor], name: str) -> hooks.Edit:
    """An edit that changes nothing, and keeps the value."""

    def keep(activation: Tensor) -> Tensor:
        seen[name] = activation.detach()
        return activation

    return keep
