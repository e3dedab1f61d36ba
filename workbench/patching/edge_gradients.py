"""What edge attribution multiplies: the change of every sender's output, and the metric's gradient at what every
receiver reads; and their products, in chunks that fit a memory budget.

    product[sender, receiver, example] = sum over positions of (clean - corrupt output of the sender) . gradient

A run keeps a sender's change in its smallest form (a head's z, before W_O) and a receiver's gradient likewise (at q, k
or v, before the projection and the norm). They are spelled out in the residual stream for one layer of receivers, some
prompts and some senders at a time. The change is the same at every point of the line from clean to corrupt, so the
gradients are summed over the points first, in their smallest form, and multiplied once (`norm_gradients`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.models.parts import DecoderParts
from workbench.patching.gradient_rules import Rule, rule_edits
from workbench.patching.norm_gradients import Readers
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric

GRAPH_COPIES = 24
"""How many copies of the residual stream a layer's graph holds (seen on GPT-2: of its MLP's inner width 8 to 10)."""
READ = (hooks.q, hooks.k, hooks.v, hooks.mlp_input)
NORM_COPIES = 3
"""How many copies of a layer's gradients the way back through a norm takes at a time."""
POINTS = 8
"""Points whose gradients are summed before they are multiplied: of each, two copies of the residual stream a layer are
kept."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """What every sender puts out in one forward."""

    embedded: Float[Tensor, "batch pos d_model"]
    z: tuple[Float[Tensor, "batch pos head d_head"], ...]
    mlp: tuple[Float[Tensor, "batch pos d_model"], ...]

    @classmethod
    def of(cls, model: HookedModel, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> "Run":
        """One forward."""
        names = [hooks.residual_pre(0), *_written(model)]
        return cls.read(model, model.activations(tokens, mask, names)[1])

    @classmethod
    def read(cls, model: HookedModel, values: Mapping[str, Tensor]) -> "Run":
        """Of captured activations."""
        layers = range(model.n_layers)
        return cls(
            embedded=values[hooks.residual_pre(0)],
            z=tuple(values[hooks.z(layer)] for layer in layers),
            mlp=tuple(values[hooks.mlp_output(layer)] for layer in layers),
        )


def _written(model: HookedModel) -> list[str]:
    return [kind(layer) for layer in range(model.n_layers) for kind in (hooks.z, hooks.mlp_output)]


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
        clean, corrupt = (Run.of(model, tokens, pairs.mask) for tokens in (pairs.clean, pairs.corrupt))
        return cls.between(model, clean, corrupt, pairs.mask)

    @classmethod
    def between(cls, model: HookedModel, clean: Run, corrupt: Run, mask: Bool[Tensor, "batch pos"]) -> "Sent":
        """Of two runs that have been made."""
        return cls(
            model=model,
            clean=clean.embedded,
            corrupt=corrupt.embedded,
            z=tuple(one - other for one, other in zip(clean.z, corrupt.z, strict=True)),
            mlp=tuple(one - other for one, other in zip(clean.mlp, corrupt.mlp, strict=True)),
            mask=mask,
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


@dataclass(slots=True, kw_only=True, eq=False)
class Gradients:
    """Gradients of the summed metric at every q, k, v, MLP input and at the last residual, summed over points."""

    model: HookedModel
    parts: DecoderParts
    attention: tuple[Readers, ...]
    """Of each layer: its queries, keys and values, head by head."""
    mlp: tuple[Readers, ...]
    rule: Rule = "plain"
    last: Float[Tensor, "batch pos d_model"] | None = None
    """At the last residual stream; None before the first point."""
    points: int = 0

    @classmethod
    def none(cls, model: HookedModel, parts: DecoderParts, rule: Rule = "plain") -> "Gradients":
        """The sum over no point yet."""
        frozen = rule != "plain"
        weights = [part.weight_qkv.unflatten(1, (-1, parts.d_head)) for part in parts.blocks]
        return cls(
            model=model,
            parts=parts,
            attention=tuple(
                Readers(norm=part.norm_attention, weight=weight, frozen=frozen)
                for part, weight in zip(parts.blocks, weights, strict=True)
            ),
            mlp=tuple(Readers(norm=part.norm_mlp, frozen=frozen) for part in parts.blocks),
            rule=rule,
        )

    def add(self, pairs: PromptPairs, metric: Metric, embedded: Tensor, share: float) -> Run:
        """Add a share of the gradients at these embeddings, by the rule: one forward and one backward. Returns what the
        senders put out there."""
        model, layers = self.model, range(self.model.n_layers)
        taps: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        wanted = [*(kind(layer) for layer in layers for kind in READ), hooks.residual_post(model.n_layers - 1)]
        edits = {name: _tap(taps, name) for name in wanted}
        looked = [*_written(model), *map(hooks.attention_output, layers), *map(hooks.residual_pre, layers[1:])]
        edits |= {name: _look(seen, name) for name in looked}
        with torch.enable_grad():
            leaf = embedded.clone().requires_grad_()
            edits[hooks.residual_pre(0)] = lambda activation: leaf
            for name, change in rule_edits(model, self.parts, self.rule).items():
                edits[name] = _then(edits[name], change) if name in edits else change
            with hooks.edit(model.model, edits):
                logits = model.final_logits(pairs.clean, pairs.mask)
            values = metric(logits, pairs.answers, pairs.distractors)
            unused = self.rule == "relp"  # constant patterns: nothing goes through queries and keys
            leaves = [taps[name] for name in wanted]
            gradients = torch.autograd.grad(values.sum(), leaves, allow_unused=unused, materialize_grads=unused)
        seen[hooks.residual_pre(0)] = embedded
        self._sum(dict(zip(wanted, gradients, strict=True)), seen, share)
        return Run.read(model, seen)

    @torch.no_grad()
    def _sum(self, at: Mapping[str, Tensor], seen: Mapping[str, Tensor], share: float) -> None:
        for layer, part in enumerate(self.parts.blocks):
            residual = seen[hooks.residual_pre(layer)]
            heads = torch.cat([at[kind(layer)] for kind in (hooks.q, hooks.k, hooks.v)], 2)
            self.attention[layer].add(residual, heads, share)
            middle = residual if part.parallel else residual + seen[hooks.attention_output(layer)]
            self.mlp[layer].add(middle, at[hooks.mlp_input(layer)][:, :, None], share)
        last = at[hooks.residual_post(self.model.n_layers - 1)] * share
        self.last = last if self.last is None else self.last + last
        self.points += 1

    @property
    def inputs(self) -> int:
        """Receivers in a layer's attention."""
        return self.parts.n_heads + 2 * self.parts.n_kv_heads

    @property
    def receivers(self) -> int:
        """All of them: a layer's, its MLP, the logits."""
        return len(self.parts.blocks) * (self.inputs + 1) + 1


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
    inputs = gradients.inputs
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
        into, below = gradients.attention[layer].at(prompts), 1 + layer * (model.n_heads + 1)
        yield slice(place, place + into.shape[1]), below, into
        place += into.shape[1]
        below += 0 if model.has_parallel_blocks else model.n_heads
        yield slice(place, place + 1), below, gradients.mlp[layer].at(prompts)
        place += 1
    if gradients.last is not None:
        yield slice(place, place + 1), sent.count, gradients.last[prompts][:, None]


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
