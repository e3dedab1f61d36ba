"""Attribution patching: every edge's effect at once, to first order, from gradients (EAP; Syed et al. 2023) or averaged
gradients (EAP-IG).

    score(sender -> receiver)
      = sum over positions of (clean - corrupt output of the sender) . d metric / d (what the receiver reads)

The gradient is taken at the clean run (EAP), or averaged over `steps` points on the line from the clean to the corrupt
input embeddings (EAP-IG-inputs; Hanna et al. 2024). A Riemann sum takes one end of the line and leaves the other out:
ours the clean end by default, the authors' library the corrupt one (`end="corrupt"` gives its numbers), and `both` is
the trapezoid rule. It is a linear estimate of an exact path effect with MLPs frozen: `exact_edges` measures that, and
`agreement` reports the rank correlation. Direction and sign are those of `path.py`: corrupt into clean, clean minus
patched.

Receivers: q by query head, k and v by key-value head (with grouped-query attention the group's), each MLP's input, the
logits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from workbench.errors import InputError, nearest
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.models.parts import decoder_parts
from workbench.patching.edge_gradients import POINTS, Gradients, Run, Sent, add_products, graph_bytes
from workbench.patching.engine.frozen import Variant
from workbench.patching.engine.passage import Route
from workbench.patching.execution import Execution
from workbench.patching.gradient_rules import Rule
from workbench.patching.path import PathPatcher
from workbench.patching.progress import PartialFile, Progress, identity, load_or_sweep, progress_bar
from workbench.patching.reference import reading, require_model, require_pairs
from workbench.tasks.base import PromptPairs
from workbench.tasks.counterparts import refuse_unequal
from workbench.values.metrics import Metric, metric_named
from workbench.values.refs import Composition, Embedding, Head, Mlp, PathEnd, Receiver, Sender, sender_named
from workbench.values.scores import Scores

Input = Composition | Literal["logits"]
"""The kinds of input that exact edges lead into."""
End = Literal["clean", "corrupt", "both"]
"""Which end of the line the Riemann sum takes: `both` are taken by half (the trapezoid rule)."""
BATCH, EXACT_BATCH = 32, 128
"""Default numbers of prompts in one forward and backward (at most), and in one forward of exact edges."""
GRAPH = 4
"""How many times the memory of a chunk the graph of one backward may take, where no batch is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """The graph of a model: who writes, who reads, in the order of the residual stream."""

    senders: tuple[Sender, ...]
    receivers: tuple[PathEnd | Literal["logits"], ...]

    @classmethod
    def of(cls, model: HookedModel) -> "Edges":
        """Every sender and receiver of a model."""
        return cls.of_shape(model.n_layers, model.n_heads, model.n_kv_heads)

    @classmethod
    def of_shape(cls, layers: int, heads: int, kv_heads: int) -> "Edges":
        """Every sender and receiver of so many layers and heads; k and v by the first query head of their group."""
        group = heads // kv_heads
        senders: list[Sender] = [Embedding()]
        receivers: list[PathEnd | Literal["logits"]] = []
        for layer in range(layers):
            senders += [*(Head(layer, index) for index in range(heads)), Mlp(layer)]
            receivers += [Receiver(Head(layer, index), "q") for index in range(heads)]
            for composition in ("k", "v"):
                receivers += [Receiver(Head(layer, kv * group), composition) for kv in range(kv_heads)]
            receivers.append(Mlp(layer))
        return cls(senders=tuple(senders), receivers=(*receivers, "logits"))

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The labels of scores of these edges."""
        return {"sender": tuple(map(str, self.senders)), "receiver": tuple(map(str, self.receivers))}

    def connected(self, *, parallel: bool) -> Float[Tensor, "sender receiver"]:
        """1 where the sender writes before the receiver reads, else NaN."""
        return torch.tensor(
            [
                [1.0 if _before(sender, receiver, parallel) else torch.nan for receiver in self.receivers]
                for sender in self.senders
            ]
        )

    @property
    def group(self) -> int:
        """Query heads that share a k and a v."""
        kinds = [end.composition for end in self.receivers if isinstance(end, Receiver)]
        return kinds.count("q") // kinds.count("k")

    def counts(self) -> Float[Tensor, " receiver"]:
        """How many edges of a graph whose k and v go to each query head on its own (MIB's) one into this receiver
        is."""
        shared = [isinstance(end, Receiver) and end.composition != "q" for end in self.receivers]
        return torch.tensor([float(self.group) if one else 1.0 for one in shared])

    def feeds(self) -> Bool[Tensor, "receiver sender"]:
        """Whether what a receiver reads goes into what a sender writes: a head's q, its group's k and v, an MLP."""
        group = self.group

        def fed(end: PathEnd | Literal["logits"], sender: Sender) -> bool:
            if not isinstance(end, Receiver):
                return end == sender
            if not isinstance(sender, Head) or sender.layer != end.head.layer:
                return False
            return 0 <= sender.index - end.head.index < (1 if end.composition == "q" else group)

        return torch.tensor([[fed(end, sender) for sender in self.senders] for end in self.receivers])

    def pruned(self, present: Bool[Tensor, "sender receiver"]) -> Bool[Tensor, "sender receiver"]:
        """The edges that lie on a way from the embedding to the logits: those out of a sender that nothing reaches, and
        those into a receiver from which nothing leads on, change nothing."""
        feeds, present = self.feeds(), present.clone()
        while True:
            reached = present.any(0).float() @ feeds.float() > 0
            reached[0] = True
            alive = reached & present.any(1)
            onward = (feeds & alive).any(1)
            onward[-1] = True
            left = present & alive[:, None] & onward
            if torch.equal(left, present):
                return left
            present = left


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
    end: End = "clean",
    rule: Rule = "plain",
    execution: Execution = Execution(),
) -> Scores:
    """EAP (`steps=1`) or EAP-IG scores of every edge: [sender receiver example], NaN where there is no edge.

    Labels are those of `refs` (`embed`, `L1H2`, `M1`; `L2H0.q`, `M2`, `logits`). `end`: which end of the line from the
    clean to the corrupt embeddings the `steps` points take; `corrupt` is what EAP-IG's library takes, `both` costs one
    point more. `rule`: `relp` and `gim` change the gradient (`gradient_rules`). Costs one forward and `steps` forwards
    with a backward; `execution`: its memory (for the senders' outputs beside a layer's gradients), batch, bar and file
    are used (nothing is kept before the end). Errors: `InputError` in training mode, for clean and corrupt prompts that
    differ in length, an unknown metric, end or rule, a model whose blocks `parts.py` does not know, and another sweep's
    file. Source: Syed et al. 2023 (EAP), Hanna et al. 2024 (EAP-IG).
    """
    require_model(model)
    require_pairs(pairs)
    model.require_eval()
    pairs, measured = reading(model, pairs), metric_named(metric)
    refuse_unequal(pairs.counterparts, "the attribution of edges")
    if steps < 1:
        raise InputError(f"`steps` is the number of gradient points, at least 1, not {steps}.")
    if end not in get_args(End):
        raise InputError(f"the sum of gradients has no end {end!r}; {nearest(str(end), get_args(End))}")
    if rule not in get_args(Rule):
        raise InputError(f"gradients have no rule {rule!r}; {nearest(str(rule), get_args(Rule))}")
    settings: dict[str, object] = {"steps": steps} if end == "clean" else {"steps": steps, "end": end}
    settings |= {} if rule == "plain" else {"rule": rule}
    return load_or_sweep(
        execution.path,
        lambda: identity("attribution", model, [pairs], metrics=[measured], settings=settings),
        lambda _: _attributed(model, pairs, measured, _points(steps, end), rule, execution),
    )


def _points(steps: int, end: End) -> dict[float, float]:
    """Where on the line from clean (0) to corrupt (1) a gradient is taken -> its weight in the sum."""
    if end == "both":
        return {step / steps: (0.5 if step in (0, steps) else 1.0) / steps for step in range(steps + 1)}
    return {(step + (end == "corrupt")) / steps: 1 / steps for step in range(steps)}


def _method(points: dict[float, float], rule: Rule) -> str:
    ends, name = {0.0, 1.0} & set(points), {"plain": "EAP", "relp": "RelP", "gim": "GIM"}[rule]
    taken = "" if ends == {0.0} else ", both ends" if len(ends) == 2 else ", corrupt end"
    if len(points) == 1:
        return f"{name}{taken}"
    steps = len(points) - (len(ends) == 2)
    return f"{name}-IG ({steps} step{'s' if steps > 1 else ''}{taken})"


def _attributed(
    model: HookedModel, pairs: PromptPairs, metric: Metric, points: dict[float, float], rule: Rule, execution: Execution
) -> Scores:
    parts = decoder_parts(model)
    if parts is None:
        raise InputError(
            f"{model.name}: attribution needs blocks of pre-norm attention and an MLP on TransformerLens 4; use exact "
            "path patching instead."
        )
    edges = Edges.of(model)
    there = edges.connected(parallel=model.has_parallel_blocks)
    memory = execution.memory_on(model.device)
    affordable = GRAPH * memory // graph_bytes(parts, pairs.clean.shape[1])
    batches, values = list(pairs.batches(execution.batch_of(min(max(affordable, 1), BATCH)))), []
    for part in progress_bar(
        batches, desc=f"attributing edges of {model.name}", unit="batch", shown=execution.progress
    ):
        scores = _scores(Gradients.none(model, parts, rule), part, metric, points, memory)
        values.append(scores.cpu().float() * there[..., None])
    return Scores(
        values=torch.cat(values, -1),
        axes=("sender", "receiver", "example"),
        labels=edges.labels,
        unit=f"fall of {metric.unit}, {_method(points, rule)}",
    )


def _scores(
    gradients: Gradients, pairs: PromptPairs, metric: Metric, points: Mapping[float, float], memory: int
) -> Float[Tensor, "sender receiver batch"]:
    """Of one batch. The run at an end of the line that is a point too is that point's own forward, not another one."""
    model, mask, name = gradients.model, pairs.mask, hooks.residual_pre(0)
    shares = sorted(points, reverse=1.0 in points)
    here, there = (pairs.corrupt, pairs.clean) if shares[0] else (pairs.clean, pairs.corrupt)
    runs = [Run.of(model, there, mask)]
    embedded = model.early_activations(here, mask, [name])[name]
    runs.append(gradients.add(pairs, metric, embedded, points[shares[0]]))
    clean, corrupt = runs if shares[0] else reversed(runs)
    sent = Sent.between(model, clean, corrupt, mask)
    scores = sent.clean.new_zeros(sent.count, gradients.receivers, len(pairs))
    for share in shares[1:]:
        if gradients.points == POINTS:
            add_products(scores, sent, gradients, memory)
            gradients = Gradients.none(model, gradients.parts, gradients.rule)
        gradients.add(pairs, metric, sent.clean + share * (sent.corrupt - sent.clean), points[share])
    add_products(scores, sent, gradients, memory)
    return scores


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
    refuse_unequal(pairs.counterparts, "exact edges over all tokens")
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
