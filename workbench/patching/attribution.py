"""Attribution patching: every edge's effect at once, to first order, from gradients (EAP; Syed et al. 2023) or averaged
gradients (EAP-IG).

    score(sender -> receiver)
      = sum over positions of (clean - corrupt output of the sender) . d metric / d (what the receiver reads)

The gradient is taken at the clean run (EAP), or averaged over `steps` points on the line from the clean to the corrupt
input embeddings (EAP-IG-inputs; Hanna et al. 2024). It is a linear estimate of an exact path effect with MLPs frozen:
`exact_edges` measures that, and `agreement` reports the rank correlation. Direction and sign are those of `path.py`:
corrupt into clean, clean minus patched.

Receivers: q by query head, k and v by key-value head (with grouped-query attention the group's), each MLP's input, the
logits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.models.parts import DecoderParts, decoder_parts
from workbench.patching.engine.frozen import Variant
from workbench.patching.engine.passage import Route
from workbench.patching.execution import Execution
from workbench.patching.path import PathPatcher
from workbench.patching.progress import PartialFile, Progress, identity, load_or_sweep, progress_bar
from workbench.patching.reference import reading, require_model, require_pairs
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric, metric_named
from workbench.values.refs import Composition, Embedding, Head, Mlp, PathEnd, Receiver, Sender, sender_named
from workbench.values.scores import Scores, joined

Input = Composition | Literal["logits"]
"""The kinds of input that exact edges lead into."""
BATCH, EXACT_BATCH = 32, 128
"""Default numbers of prompts in one forward and backward, and in one forward of exact edges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """The graph of a model: who writes, who reads, in the order of the residual stream."""

    senders: tuple[Sender, ...]
    receivers: tuple[PathEnd | Literal["logits"], ...]

    @classmethod
    def of(cls, model: HookedModel) -> "Edges":
        """Every sender and receiver; k and v by the first query head of their group."""
        group = model.n_heads // model.n_kv_heads
        senders: list[Sender] = [Embedding()]
        receivers: list[PathEnd | Literal["logits"]] = []
        for layer in range(model.n_layers):
            senders += [*(Head(layer, index) for index in range(model.n_heads)), Mlp(layer)]
            receivers += [Receiver(Head(layer, index), "q") for index in range(model.n_heads)]
            for composition in ("k", "v"):
                receivers += [Receiver(Head(layer, kv * group), composition) for kv in range(model.n_kv_heads)]
            receivers.append(Mlp(layer))
        return cls(senders=tuple(senders), receivers=(*receivers, "logits"))

    def connected(self, *, parallel: bool) -> Float[Tensor, "sender receiver"]:
        """1 where the sender writes before the receiver reads, else NaN."""
        return torch.tensor(
            [
                [1.0 if _before(sender, receiver, parallel) else torch.nan for receiver in self.receivers]
                for sender in self.senders
            ]
        )


def _before(sender: Sender, receiver: PathEnd | Literal["logits"], parallel: bool) -> bool:
    if receiver == "logits" or isinstance(sender, Embedding):
        return True
    reads, of_mlp = (receiver.layer, True) if isinstance(receiver, Mlp) else (receiver.head.layer, False)
    return sender.layer < reads or (sender.layer == reads and of_mlp and isinstance(sender, Head) and not parallel)


def attribute_edges(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    metric: str | Metric = "log_probability",
    steps: int = 1,
    execution: Execution = Execution(),
) -> Scores:
    """EAP (`steps=1`) or EAP-IG scores of every edge: [sender receiver example], NaN where there is no edge.

    Labels are those of `refs` (`embed`, `L1H2`, `M1`; `L2H0.q`, `M2`, `logits`). Costs two forwards and `steps`
    forwards with a backward; `execution`: its batch, bar and file are used (nothing is kept before the end). Errors:
    `InputError` in training mode, for an unknown metric, a model whose blocks `parts.py` does not know, and another
    sweep's file. Source: Syed et al. 2023 (EAP), Hanna et al. 2024 (EAP-IG).
    """
    require_model(model)
    require_pairs(pairs)
    model.require_eval()
    pairs, measured = reading(model, pairs), metric_named(metric)
    if steps < 1:
        raise InputError(f"`steps` is the number of gradient points, at least 1, not {steps}.")
    return load_or_sweep(
        execution.path,
        lambda: identity("attribution", model, [pairs], metrics=[measured], settings={"steps": steps}),
        lambda _: _attributed(model, pairs, measured, steps, execution),
    )


def _attributed(model: HookedModel, pairs: PromptPairs, metric: Metric, steps: int, execution: Execution) -> Scores:
    parts = decoder_parts(model)
    if parts is None:
        raise InputError(
            f"{model.name}: attribution needs blocks of pre-norm attention and an MLP on TransformerLens 4; use exact "
            "path patching instead."
        )
    edges = Edges.of(model)
    there = edges.connected(parallel=model.has_parallel_blocks)
    batches, values = list(pairs.batches(execution.batch_of(BATCH))), []
    for part in progress_bar(
        batches, desc=f"attributing edges of {model.name}", unit="batch", shown=execution.progress
    ):
        change = _sent(model, part)
        gradients = sum(_gradients(model, parts, part, metric, step / steps) for step in range(steps)) / steps
        values.append(torch.einsum("sbpd,rbpd->srb", change, gradients).cpu() * there[..., None])
    labels = {"sender": tuple(map(str, edges.senders)), "receiver": tuple(map(str, edges.receivers))}
    method = "EAP" if steps == 1 else f"EAP-IG ({steps} steps)"
    scores = [
        Scores(
            values=part.float(),
            axes=("sender", "receiver", "example"),
            labels=labels,
            unit=f"fall of {metric.unit}, {method}",
        )
        for part in values
    ]
    return joined(scores)


def attribute_nodes(scores: Scores) -> Scores:
    """A sender's score: the sum over its edges, which is the gradient's estimate of its total effect. [sender
    example]."""
    values = scores.values.nan_to_num(0.0).sum(1)
    return Scores(
        values=values,
        axes=("sender", "example"),
        labels={"sender": scores.labels["sender"]},
        unit=f"{scores.unit}, all edges of a sender",
    )


@torch.no_grad()
def _sent(model: HookedModel, pairs: PromptPairs) -> Float[Tensor, "sender batch pos d_model"]:
    """Clean minus corrupt output of every sender."""
    names = [
        hooks.residual_pre(0),
        *(kind(layer) for layer in range(model.n_layers) for kind in (hooks.z, hooks.mlp_output)),
    ]
    runs = [model.activations(tokens, pairs.mask, names)[1] for tokens in (pairs.clean, pairs.corrupt)]
    change = {name: runs[0][name] - runs[1][name] for name in names}
    written = [change[hooks.residual_pre(0)][None]]
    for layer in range(model.n_layers):
        written += [
            model.head_outputs(layer, change[hooks.z(layer)]).permute(2, 0, 1, 3),
            change[hooks.mlp_output(layer)][None],
        ]
    return torch.cat(written) * pairs.mask[..., None]


def _gradients(
    model: HookedModel, parts: DecoderParts, pairs: PromptPairs, metric: Metric, share: float
) -> Float[Tensor, "receiver batch pos d_model"]:
    """Gradient of the summed metric at what every receiver reads, with the embeddings `share` of the way from clean to
    corrupt."""
    with torch.no_grad():
        start, end = (
            model.activations(tokens, pairs.mask, [hooks.residual_pre(0)])[1][hooks.residual_pre(0)]
            for tokens in (pairs.clean, pairs.corrupt)
        )
        embedded = start + share * (end - start)
    taps: dict[str, Tensor] = {}
    last = hooks.residual_post(model.n_layers - 1)
    read = [kind(layer) for layer in range(model.n_layers) for kind in (hooks.q, hooks.k, hooks.v, hooks.mlp_input)]
    pre = [hooks.residual_pre(layer) for layer in range(model.n_layers)] + [
        hooks.attention_output(layer) for layer in range(model.n_layers)
    ]
    edits = {name: _tap(taps, name) for name in (*pre[1:], *read, last)}
    with torch.enable_grad():
        leaf = embedded.clone().requires_grad_()
        edits[pre[0]] = lambda activation: leaf
        with hooks.edit(model.model, edits):
            logits = model.final_logits(pairs.clean, pairs.mask)
        values = metric(logits, pairs.answers, pairs.distractors)
        grads = dict(
            zip([*read, last], torch.autograd.grad(values.sum(), [taps[name] for name in (*read, last)]), strict=True)
        )
    taps[pre[0]] = leaf
    found = [part for layer in range(model.n_layers) for part in _into_layer(model, parts, layer, taps, grads)]
    return torch.cat([*found, grads[last][None]]).detach()


def _tap(taps: dict[str, Tensor], name: str) -> hooks.Edit:
    """An edit that changes nothing, and keeps the tensor that the rest of the forward is computed from."""

    def keep(activation: Tensor) -> Tensor:
        taps[name] = activation.clone()
        return taps[name]

    return keep


def _into_layer(
    model: HookedModel, parts: DecoderParts, layer: int, taps: dict[str, Tensor], grads: dict[str, Tensor]
) -> Iterator[Float[Tensor, "receiver batch pos d_model"]]:
    """From the gradients at a layer's q, k, v and MLP input to those at each receiver's own copy of the residual
    stream."""
    part, counts = parts.blocks[layer], {"q": parts.n_heads, "k": parts.n_kv_heads, "v": parts.n_kv_heads}
    pre, weights = (
        taps[hooks.residual_pre(layer)].detach(),
        part.weight_qkv.split([count * parts.d_head for count in counts.values()], 1),
    )
    for (name, count), weight in zip(counts.items(), weights, strict=True):
        own = grads[{"q": hooks.q, "k": hooks.k, "v": hooks.v}[name](layer)]
        normed = torch.einsum("bphw,dhw->hbpd", own, weight.unflatten(1, (count, parts.d_head)))
        yield _through_norm(part.norm_attention, pre, normed)
    middle = pre if part.parallel else pre + taps[hooks.attention_output(layer)].detach()
    yield _through_norm(part.norm_mlp, middle, grads[hooks.mlp_input(layer)][None])


def _through_norm(
    norm: object, residual: Tensor, gradient: Float[Tensor, "receiver batch pos d_model"]
) -> Float[Tensor, "receiver batch pos d_model"]:
    """The vector-Jacobian product of a normalisation, for several gradients at its output."""
    with torch.enable_grad():
        leaf = residual.expand_as(gradient).clone().requires_grad_()
        return torch.autograd.grad(norm(leaf), leaf, gradient)[0]  # type: ignore[operator]


def exact_edges(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    metric: str | Metric,
    senders: Sequence[Sender | str] | None = None,
    compositions: Sequence[Composition] = ("q", "k", "v"),
    freeze_mlps: bool = True,
    execution: Execution = Execution(),
) -> Scores:
    """Exact path effects of senders on the logits and on each head's q, k, v: [sender receiver example], the same
    labels as `attribute_edges`.

    Clean minus patched. With `freeze_mlps` the path is the residual stream alone, which is what attribution estimates.
    MLP receivers are NaN. Errors: `InputError` for an unknown metric, head or MLP, and another sweep's file.
    """
    measured = metric_named(metric)
    edges = Edges.of(model)
    chosen = edges.senders if senders is None else tuple(sender_named(sender) for sender in senders)
    sweep = _ExactEdges(model, measured, chosen, compositions, Route(freeze_mlps=freeze_mlps), execution)
    settings = {"senders": chosen, "compositions": tuple(compositions), "freeze_mlps": freeze_mlps}
    return load_or_sweep(
        execution.path,
        lambda: identity("exact edges", model, [pairs], metrics=[measured], settings=settings),
        lambda partial: sweep.scores(pairs, edges, partial),
    )


@dataclass(frozen=True, slots=True)
class _ExactEdges:
    """A sweep of path effects."""

    model: HookedModel
    metric: Metric
    senders: tuple[Sender, ...]
    compositions: Sequence[Composition]
    route: Route
    execution: Execution

    def scores(self, pairs: PromptPairs, edges: Edges, partial: PartialFile | None) -> Scores:
        """Batch by batch."""
        model, batch = self.model, self.execution.batch_of(EXACT_BATCH)
        there = Edges(senders=self.senders, receivers=edges.receivers).connected(parallel=model.has_parallel_blocks)
        values = torch.full((*there.shape, len(pairs)), torch.nan)
        progress = _progress(model, len(self.senders), len(pairs), self.compositions, partial)
        for start, part in zip(range(0, len(pairs), batch), pairs.batches(batch), strict=True):
            mine: dict[Input, Progress] = {
                name: one.examples(start, start + len(part)) for name, one in progress.items()
            }
            for receiver, effects in self._on_receivers(part, mine):
                values[:, edges.receivers.index(receiver), start : start + len(part)] = effects.float().cpu()
        mlps = ", MLPs frozen" if self.route.freeze_mlps else ""
        return Scores(
            values=values * there[..., None],
            axes=("sender", "receiver", "example"),
            labels={"sender": tuple(map(str, self.senders)), "receiver": tuple(map(str, edges.receivers))},
            unit=f"fall of {self.metric.unit}, exact path effect{mlps}",
        )

    def _on_receivers(
        self, pairs: PromptPairs, progress: Mapping[Input, Progress]
    ) -> Iterator[tuple[PathEnd | Literal["logits"], Float[Tensor, "sender batch"]]]:
        """(receiver, effect of each sender on it) on one batch of prompts."""
        model, route, metric = self.model, self.route, self.metric
        variants: list[Variant] = [frozenset([sender]) for sender in self.senders]
        patcher = PathPatcher(model, pairs, execution=self.execution)
        clean = metric(patcher.clean_logits, pairs.answers, pairs.distractors)
        for name, one in progress_bar(
            progress.items(), desc=f"patching edges of {model.name}", unit="input", shown=self.execution.progress
        ):
            if name == "logits":
                yield "logits", clean - patcher.effects(variants, route, metric, progress=one)
                continue
            each = clean - patcher.effects_on_each(variants, range(model.n_layers), name, route, metric, progress=one)
            group = model.n_heads // each.shape[2]
            for layer in range(model.n_layers):
                yield from (
                    (Receiver(Head(layer, place * group), name), each[:, layer, place])
                    for place in range(each.shape[2])
                )


def _progress(
    model: HookedModel, senders: int, examples: int, compositions: Sequence[Composition], partial: PartialFile | None
) -> dict[Input, Progress]:
    """What is found of the senders' paths into each kind of input."""
    counts = {"q": model.n_heads, "k": model.n_kv_heads, "v": model.n_kv_heads}
    progress: dict[Input, Progress] = {
        "logits": Progress.of((senders,), examples, file=partial and partial.named("logits"))
    }
    for name in compositions:
        progress[name] = Progress.of(
            (senders, model.n_layers), examples, extra=(counts[name],), file=partial and partial.named(name)
        )
    return progress


def agreement(estimated: Scores, exact: Scores) -> float:
    """Spearman's rank correlation of the mean scores of the edges that both have measured."""
    means = [
        dict(
            zip(
                product(*(scores.labels[axis] for axis in scores.axes[:2])),
                scores.mean().flatten().tolist(),
                strict=True,
            )
        )
        for scores in (estimated, exact)
    ]
    shared = [
        edge
        for edge, value in means[0].items()
        if not math.isnan(value) and not math.isnan(means[1].get(edge, math.nan))
    ]
    if len(shared) < 3:
        raise InputError("fewer than three edges are measured in both; give both the same senders.")
    return float(stats.spearmanr([means[0][edge] for edge in shared], [means[1][edge] for edge in shared])[0])  # pyright: ignore[reportArgumentType]
