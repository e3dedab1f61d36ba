"""Path patching (Wang et al. 2022; Prakash et al. 2024), exact: what does a sender do to a receiver, directly?

Clean run and corrupt run. A sender at its position takes its corrupt output; every other attention head is frozen to
clean; MLPs are recomputed (so the path runs through MLPs and the residual stream, never through another head). The
receivers' q, k or v (or what an MLP reads) is recorded, and a clean run with only that replaced gives the patched
logits. With no receivers the frozen run's own logits are the direct effect.

Direction: corrupt into clean; for clean into corrupt pass `pairs.swapped()`. Sign: clean minus patched, so a head that
helps has a positive score. LayerNorm is recomputed, rotary positions are the model's own. With grouped-query
attention a k or v receiver is the head's whole key-value group, or with `by_query_head` that head's own view of it.

Cost, in forwards of the whole model: two for the clean and the corrupt run, whatever the number of senders; a sender to
the logits then costs the MLPs above it at the last token (`frozen.py`), a path into heads the layers above them from
the receivers' position on (`replay.py`).
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, last_position
from workbench.patching.counterfactual import corrupt_activations, early_corrupt_activations
from workbench.patching.effects import Effect
from workbench.patching.engine.chunks import in_chunks
from workbench.patching.engine.frozen import Corrupt, FrozenRuns, Variant, entry
from workbench.patching.engine.hooked import HookedPatcher
from workbench.patching.engine.passage import (
    Level,
    Passage,
    Route,
    by_first_receiver,
    group_by_stretch,
    level_of,
    rows_of,
)
from workbench.patching.engine.window import Spots
from workbench.patching.execution import Engine, Execution
from workbench.patching.progress import PartialFile, Progress, identity, load_or_sweep, progress_bar
from workbench.patching.reference import reading, require_model, require_pairs
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric, MetricFunction, metric_named, relative_fall
from workbench.values.refs import (
    Composition,
    Embedding,
    Head,
    Mlp,
    PathEnd,
    Position,
    Receiver,
    Sender,
    heads_named,
    path_end_named,
)
from workbench.values.scores import Scores

BATCH = 128
"""Default number of prompts in one forward."""


class PathPatcher:
    """Path patching on one batch of pairs: the clean and corrupt runs are done once, and every path shares what it can
    with them."""

    def __init__(self, model: HookedModel, pairs: PromptPairs, *, execution: Execution = Execution()) -> None:
        """`execution`: its engine and memory are used.

        Errors: `InputError` in training mode, and where `replay` is asked for and not to be had.
        """
        model.require_eval()
        self.model, self.pairs, self.memory = model, pairs, execution.memory_on(model.device)
        self.replay = execution.replay(model, pairs)
        if self.replay is None:
            self.hooked = HookedPatcher(model, pairs)
            self.clean_logits = self.hooked.clean_logits
            return
        self.clean_logits = self.replay.clean_logits
        self._corrupt: Corrupt = {}
        self._corrupt_layers = -1

    @functools.cached_property
    def corrupt_logits(self) -> Float[Tensor, "batch d_vocab"]:
        """Final logits of the corrupt run."""
        if self.replay is None:
            return self.hooked.corrupt_logits
        logits, self._corrupt = corrupt_activations(self.model, self.pairs, _written_below(self.model.n_layers))
        self._corrupt_layers = self.model.n_layers
        return logits

    def _sent_by(self, variants: Iterable[Variant]) -> Corrupt:
        """The corrupt run as far up as the highest sender writes."""
        layers = max(
            (0 if isinstance(sender, Embedding) else sender.layer + 1 for variant in variants for sender in variant),
            default=0,
        )
        if layers > self._corrupt_layers:
            self._corrupt = early_corrupt_activations(self.model, self.pairs, _written_below(layers))
            self._corrupt_layers = layers
        return self._corrupt

    @property
    def engine(self) -> Engine:
        """How the paths are computed."""
        return "hooks" if self.replay is None else "replay"

    @torch.no_grad()
    def logits(
        self,
        senders: Collection[Sender],
        position: Position = "all",
        *,
        receivers: Sequence[PathEnd] = (),
        receiver_position: Position = "all",
        freeze_mlps: bool = False,
        by_query_head: bool = False,
    ) -> Float[Tensor, "batch d_vocab"]:
        """Patched final logits when the senders jointly take their corrupt outputs at a position, along paths to the
        receivers."""
        route = Route(
            position=position,
            receivers=tuple(receivers),
            receiver_position=receiver_position,
            freeze_mlps=freeze_mlps,
            by_query_head=by_query_head,
        )
        patched = self.clean_logits.clone()
        for _, rows, logits in self.patched([frozenset(senders)], route):
            patched[rows] = logits
        return patched

    def effects(
        self,
        variants: Sequence[Variant],
        route: Route,
        metric: MetricFunction,
        *,
        done: Callable[[int], object] = bool,
        progress: Progress | None = None,
    ) -> Float[Tensor, "variant batch"]:
        """The metric of each variant's patched logits on each prompt; `done` is told how many variants have been
        finished on how many prompts.

        `progress` (variant by example) holds what is known already, and is given what is found.
        """
        clean = metric(self.clean_logits, self.pairs.answers, self.pairs.distractors)
        progress = Progress.of((len(variants),), len(clean)) if progress is None else progress
        values = progress.values.copy_(torch.where(progress.present, progress.values, clean.to(progress.values)))
        done(int(progress.present.sum()))
        for variant, rows, logits in self.patched(variants, route, progress=progress):
            values[variant, rows.cpu()] = metric(logits, self.pairs.answers[rows], self.pairs.distractors[rows]).to(
                values
            )
            done(len(rows))
        return values.to(clean)

    @torch.no_grad()
    def patched(
        self, variants: Sequence[Variant], route: Route, *, progress: Progress | None = None
    ) -> Iterator[tuple[int, Int[Tensor, " rows"], Float[Tensor, "rows d_vocab"]]]:
        """(number of the variant, prompts, their patched logits) for every variant; a pair that is left out has no path
        and stays clean.

        `progress`: chunks that are found there are left out, and each chunk is marked when the consumer has had all of
        it. Errors: `InputError` for a head, MLP or position that there is not, and in training mode.
        """
        self.model.require_eval()
        _refuse_unknown(self.model, {place for variant in variants for place in variant} | set(route.receivers))
        sending, receiving = self.pairs.position(route.position), self.pairs.position(route.receiver_position)
        self.pairs.require_counterparts(sending)
        progress = Progress.of((len(variants),), len(self.pairs)) if progress is None else progress
        if self.replay is None:
            yield from self._through_hooks(variants, route, progress)
            return
        order = [
            number
            for number in sorted(range(len(variants)), key=lambda number: entry(variants[number]))
            if variants[number]
        ]
        corrupt = self._sent_by(variants)
        if not route.receivers:
            yield from self._to_logits(variants, order, route, sending, progress)
            return
        for rows in group_by_stretch(self.pairs.mask, sending & receiving):
            passage = Passage(self.replay.rows(rows), rows_of(corrupt, rows), sending[rows], receiving[rows], route)
            size = max(1, self.memory // passage.variant_bytes({level_of(receiver)[0] for receiver in route.receivers}))
            parallel = self.replay.parts.blocks[0].parallel
            for first, group in by_first_receiver(variants, order, route.receivers, parallel=parallel):

                def work(chunk: list[int], first: Level = first, passage: Passage = passage) -> Tensor:
                    return passage.through(first, [variants[n] for n in chunk])

                for chunk, results in in_chunks(
                    group, size, work, skip=lambda chunk, rows=rows: progress.has(chunk, rows)
                ):
                    yield from ((number, rows, logits) for number, logits in zip(chunk, results, strict=True))
                    progress.mark(chunk, rows)

    @torch.no_grad()
    def effects_on_each(
        self,
        variants: Sequence[Variant],
        layers: Sequence[int],
        composition: Composition,
        route: Route,
        metric: MetricFunction,
        *,
        done: Callable[[int], object] = bool,
        progress: Progress | None = None,
    ) -> Float[Tensor, "variant layer receiver batch"]:
        """The metric when each variant is patched into each head's q (or each group's k or v) of each of some layers,
        alone.

        A variant that does not lie below a layer has no path to it: its values are the clean ones. `route.receivers` is
        not used. `progress` (variant by layer, receivers beside them) holds what is known already, and is given what is
        found.
        """
        self.model.require_eval()
        _refuse_unknown(self.model, {place for variant in variants for place in variant})
        self.pairs.require_counterparts(self.pairs.position(route.position))
        count = self.model.n_heads if composition == "q" else self.model.n_kv_heads
        clean = metric(self.clean_logits, self.pairs.answers, self.pairs.distractors)
        if progress is None:
            progress = Progress.of((len(variants), len(layers)), len(clean), extra=(count,))
        values = progress.values.copy_(
            torch.where(progress.present[:, :, None], progress.values, clean.to(progress.values))
        )
        order = sorted(range(len(variants)), key=lambda number: entry(variants[number]))
        if not order or not len(layers):
            return values.to(clean)
        if self.replay is None:
            return self._each_through_hooks(progress, order, variants, layers, composition, route, metric).to(clean)
        corrupt = self._sent_by(variants)
        sending, receiving = self.pairs.position(route.position), self.pairs.position(route.receiver_position)
        for rows in group_by_stretch(self.pairs.mask, sending & receiving):
            passage = Passage(self.replay.rows(rows), rows_of(corrupt, rows), sending[rows], receiving[rows], route)
            fit = max(1, self.memory // (count * passage.variant_bytes(layers[:1])))
            for group in _batched(sorted(layers), max(1, fit // len(order))):

                def work(
                    chunk: list[int], passage: Passage = passage, group: Sequence[int] = group
                ) -> list[tuple[int, int, Tensor]]:
                    return passage.into_each(group, composition, [variants[n] for n in chunk])

                columns = [list(layers).index(layer) for layer in group]

                def known(chunk: list[int], rows: Tensor = rows, columns: Sequence[int] = columns) -> bool:
                    return progress.has(chunk, columns, rows)

                for chunk, results in in_chunks(order, max(1, fit // len(group)), work, skip=known):
                    for layer, place, logits in results:
                        for receiver in range(count):
                            patched = metric(logits[receiver], self.pairs.answers[rows], self.pairs.distractors[rows])
                            values[chunk[place], list(layers).index(layer), receiver, rows.cpu()] = patched.to(values)
                        done(count * len(rows))
                    progress.mark(chunk, columns, rows)
        return values.to(clean)

    def _each_through_hooks(
        self,
        progress: Progress,
        order: Sequence[int],
        variants: Sequence[Variant],
        layers: Sequence[int],
        composition: Composition,
        route: Route,
        metric: MetricFunction,
    ) -> Tensor:
        group = 1 if composition == "q" else self.model.n_heads // self.model.n_kv_heads
        for place, layer in enumerate(layers):
            below = [
                number
                for number in order
                if entry(variants[number])[0] < layer and not progress.has([number], [place], range(len(self.pairs)))
            ]
            for receiver in range(progress.values.shape[2]):
                into = replace(route, receivers=(Receiver(Head(layer, receiver * group), composition),))
                for number, _, logits in self._through_hooks([variants[n] for n in below], into):
                    values = metric(logits, self.pairs.answers, self.pairs.distractors)
                    progress.values[below[number], place, receiver] = values.to(progress.values)
            progress.mark(below, [place], range(len(self.pairs)))
        return progress.values

    def _through_hooks(
        self, variants: Sequence[Variant], route: Route, progress: Progress | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        if route.by_query_head:
            raise InputError(
                "`by_query_head` needs the replay engine, which this model has not; take receivers by key-value group."
            )
        rows = torch.arange(len(self.pairs), device=self.pairs.clean.device)
        for number, variant in enumerate(variants):
            if progress is not None and progress.has([number], rows):
                continue
            yield (
                number,
                rows,
                self.hooked.logits(
                    variant,
                    route.position,
                    receivers=route.receivers,
                    receiver_position=route.receiver_position,
                    freeze_mlps=route.freeze_mlps,
                ),
            )
            if progress is not None:
                progress.mark([number], rows)

    def _to_logits(
        self, variants: Sequence[Variant], order: list[int], route: Route, sending: Tensor, progress: Progress
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Direct effects: only the last token's residual stream matters."""
        assert self.replay is not None
        replay, rows = self.replay, torch.arange(len(self.pairs), device=self.pairs.clean.device)
        last = last_position(self.pairs.mask)[:, None]
        spots = Spots(index=last, real=torch.ones_like(last, dtype=torch.bool))
        runs, at_last = FrozenRuns(replay, self._corrupt), sending.gather(1, last)

        def work(chunk: list[int]) -> Tensor:
            run = runs.run(
                [variants[n] for n in chunk],
                spots,
                at_last,
                freeze_mlps=route.freeze_mlps,
                layers=[self.model.n_layers],
            )
            return replay.logits(run.pre[self.model.n_layers][:, :, 0])

        unembedding = len(rows) * replay.unembedding * self.clean_logits.element_size()
        size = max(1, self.memory // max(unembedding, runs.variant_bytes(spots, [self.model.n_layers])))
        for chunk, logits in in_chunks(order, size, work, skip=lambda chunk: progress.has(chunk, rows)):
            yield from ((number, rows, part) for number, part in zip(chunk, logits, strict=True))
            progress.mark(chunk, rows)


def _written_below(layers: int) -> list[str]:
    """What every sender below a layer writes, in the order of the forward."""
    return [hooks.residual_pre(0), *(kind(layer) for layer in range(layers) for kind in (hooks.z, hooks.mlp_output))]


def _batched(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _refuse_unknown(model: HookedModel, places: Iterable[Sender | PathEnd]) -> None:
    for place in places:
        if isinstance(place, Head | Receiver):
            model.checked(place if isinstance(place, Head) else place.head)
        elif isinstance(place, Mlp) and not 0 <= place.layer < model.n_layers:
            raise InputError(f"{model.name} has no MLP {place}: its layers are 0 to {model.n_layers - 1}.")


def path_patch(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    metric: str | Metric = "log_probability",
    position: Position = "last",
    receivers: Sequence[PathEnd | str] = (),
    receiver_position: Position = "all",
    senders: Iterable[Head | str] | None = None,
    execution: Execution = Execution(),
) -> Scores:
    """Path effect of every head on its own, from `position`, on the receivers (the logits when there are none).

    Returns [layer head example], clean minus patched. A head at or above every receiver has no path to it and is NaN,
    as are heads that are not among `senders` (None: all). Relative effects and frozen MLPs: `sweep_heads`. Errors:
    `InputError` when corrupt and clean metrics are equal on every prompt (nothing to patch), for an unknown metric,
    head or position, and when the file is another sweep's. Source: Wang et al. 2022, section 3.1; Prakash et al. 2024,
    appendix D.
    """
    require_model(model)
    require_pairs(pairs)
    pairs, ends = reading(model, pairs), _several(receivers)
    _refuse_unknown(model, ends)
    route = Route(position=position, receivers=ends, receiver_position=receiver_position)
    measured = metric_named(metric)
    patchers = prepared(model, pairs, execution=execution)
    return sweep_heads(patchers, route, metric=measured, senders=senders, execution=execution)


def _several(receivers: Sequence[PathEnd | str]) -> tuple[PathEnd, ...]:
    if isinstance(receivers, str):
        raise InputError(f"`receivers` are several: write [{receivers!r}].")
    return tuple(path_end_named(receiver) for receiver in receivers)


def prepared(model: HookedModel, pairs: PromptPairs, *, execution: Execution = Execution()) -> list[PathPatcher]:
    """The clean and corrupt runs of all prompts, batch by batch, for several sweeps (they are kept in memory)."""
    return [PathPatcher(model, part, execution=execution) for part in pairs.batches(execution.batch_of(BATCH))]


def sweep_heads(
    patchers: Sequence[PathPatcher],
    route: Route,
    *,
    metric: str | Metric,
    effect: Effect = "difference",
    senders: Iterable[Head | str] | None = None,
    execution: Execution = Execution(),
) -> Scores:
    """`path_patch` over a route on prompts that are prepared already (whose engine, memory and batch count).

    `effect="relative"`: divided by clean, NaN where that is 0.
    """
    model, measured = patchers[0].model, metric_named(metric)
    chosen = model.heads if senders is None else sorted({model.checked(head) for head in heads_named(senders)})
    settings = {"route": route, "effect": effect, "senders": chosen}
    return load_or_sweep(
        execution.path,
        lambda: identity("path patching", model, [p.pairs for p in patchers], metrics=[measured], settings=settings),
        lambda partial: _swept(patchers, route, measured, effect, chosen, partial, shown=execution.progress),
    )


def _swept(
    patchers: Sequence[PathPatcher],
    route: Route,
    metric: Metric,
    effect: Effect,
    chosen: Sequence[Head],
    partial: PartialFile | None,
    *,
    shown: bool,
) -> Scores:
    model = patchers[0].model
    clean, corrupt = _ends(patchers, metric)
    if bool((clean == corrupt).all()):
        raise InputError(
            "clean and corrupt prompts give the same metric on every pair, so there is nothing to patch; make the "
            "corrupt prompts differ in what the answer depends on."
        )
    top = max((level_of(receiver) for receiver in route.receivers), default=(model.n_layers, 0))
    senders = [head for head in chosen if (head.layer, 0) < top]
    variants = [frozenset([head]) for head in senders]
    with progress_bar(
        total=len(senders) * len(clean), desc=f"path patching {model.name}", unit="path", shown=shown
    ) as bar:
        progress, start, parts = Progress.of((len(senders),), len(clean), file=partial), 0, []
        for patcher in patchers:
            part, start = progress.examples(start, start + len(patcher.pairs)), start + len(patcher.pairs)
            parts.append(patcher.effects(variants, route, metric, done=bar.update, progress=part))
        patched = torch.cat(parts, 1)
    values = torch.full((model.n_layers, model.n_heads, len(clean)), torch.nan)
    falls = relative_fall(patched, clean) if effect == "relative" else clean - patched
    for head, fall in zip(senders, falls, strict=True):
        values[head.layer, head.index] = fall.float().cpu()
    target = f"{', '.join(map(str, route.receivers))} at {route.receiver_position}" if route.receivers else "the logits"
    described = (
        f"{'relative ' if effect == 'relative' else ''}fall of {metric.unit}, path from {route.position} to {target}"
    )
    return Scores.of_heads(values, unit=described, baseline=float(clean.mean()))


def _ends(
    patchers: Sequence[PathPatcher], metric: MetricFunction
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    parts = [
        (
            metric(p.clean_logits, p.pairs.answers, p.pairs.distractors),
            metric(p.corrupt_logits, p.pairs.answers, p.pairs.distractors),
        )
        for p in patchers
    ]
    return torch.cat([clean for clean, _ in parts]), torch.cat([corrupt for _, corrupt in parts])


def activation_baselines(patchers: Sequence[PathPatcher], metric: str | Metric) -> tuple[float, float]:
    """Mean metric of the clean and of the corrupt run: the two ends that any patching effect lies between."""
    clean, corrupt = _ends(patchers, metric_named(metric))
    return float(clean.mean()), float(corrupt.mean())
