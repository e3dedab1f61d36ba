"""Ablation of attention heads: replace a head's output (`hook_z`) by zero, by its mean over reference prompts, or by
that of another prompt: one drawn from a reference set (resample ablation), or the prompt's own corrupt counterpart.

Mean ablation takes per-position means over a reference set that never holds the evaluated prompts (METHOD: calibration
against test). Impact of a head (eq 3, 4): metric of the model as it is, minus metric with the head ablated; positive =
the head helps.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from workbench import seeds
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.engine.chunks import MEMORY
from workbench.patching.engine.replay import Replay, replay_of
from workbench.patching.engine.sites import replaced
from workbench.patching.progress import PartialFile, Progress, identity, kept_together, progress_bar
from workbench.tasks.base import PromptPairs, refuse_overlap
from workbench.values.metrics import Metric
from workbench.values.refs import Head, Position
from workbench.values.scores import Scores

BATCH = 256
"""Default number of prompts in one forward."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferenceMeans:
    """Mean `hook_z` of every head over reference prompts: layer -> [pos head d_head] (pos = 1 when averaged over
    positions too)."""

    values: Mapping[int, Float[Tensor, "pos head d_head"]]
    prompts: PromptPairs
    per_position: bool

    def at(self, layer: int, evaluated: PromptPairs) -> Float[Tensor, "pos head d_head"]:
        """The means of a layer for these prompts. Errors: `InputError` when per-position means were taken at another
        prompt length."""
        means = self.values[layer]
        if self.per_position and means.shape[0] != evaluated.clean.shape[1]:
            raise InputError(
                f"per-position means were taken over prompts of {means.shape[0]} tokens, the evaluated ones have "
                f"{evaluated.clean.shape[1]}; "
                "use prompts of one length, or `per_position=False`."
            )
        return means


def reference_means(
    model: HookedModel, prompts: PromptPairs, *, per_position: bool = True, batch: int = BATCH
) -> ReferenceMeans:
    """Mean of every head's output over the clean reference prompts, position by position (or over all real tokens)."""
    model.require_eval()
    names = [hooks.z(layer) for layer in range(model.n_layers)]
    axes = (0,) if per_position else (0, 1)
    sums: dict[int, Tensor] = {}
    for part in prompts.batches(batch):
        _, found = model.activations(part.clean, part.mask, names)
        for layer, name in enumerate(names):
            total = (found[name] * part.mask[:, :, None, None]).sum(axes, keepdim=not per_position)
            sums[layer] = sums.get(layer, 0) + total.reshape(-1, *total.shape[-2:])
    count = prompts.mask.sum(0).clamp(min=1)[:, None, None] if per_position else prompts.mask.sum()
    return ReferenceMeans(
        values={layer: total / count for layer, total in sums.items()}, prompts=prompts, per_position=per_position
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResampledOutputs:
    """`hook_z` of every head on reference prompts, one of which (drawn with the seed) stands in for each evaluated
    prompt."""

    values: Mapping[int, Float[Tensor, "prompt pos head d_head"]]
    prompts: PromptPairs
    seed: int

    def at(self, layer: int, evaluated: PromptPairs) -> Float[Tensor, "batch pos head d_head"]:
        """The stand-ins of a layer for these prompts, the same for a prompt in whatever batch it comes. Errors: as
        `ReferenceMeans.at`."""
        values = self.values[layer]
        if values.shape[1] != evaluated.clean.shape[1]:
            raise InputError(
                f"the reference prompts have {values.shape[1]} tokens, the evaluated ones {evaluated.clean.shape[1]}; "
                "use prompts of one length."
            )
        rows = [seeds.derive(self.seed, "resample", row.tolist().__repr__()) % len(values) for row in evaluated.clean]
        return values[torch.tensor(rows, device=values.device)]


def resampled_outputs(model: HookedModel, prompts: PromptPairs, *, seed: int, batch: int = BATCH) -> ResampledOutputs:
    """Every head's output on the clean reference prompts, to draw from (resample ablation, Chan et al. 2022)."""
    model.require_eval()
    names = [hooks.z(layer) for layer in range(model.n_layers)]
    parts = [model.activations(part.clean, part.mask, names)[1] for part in prompts.batches(batch)]
    return ResampledOutputs(
        values={layer: torch.cat([part[name] for part in parts]) for layer, name in enumerate(names)},
        prompts=prompts,
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CounterfactualOutputs:
    """`hook_z` of every head on each prompt's own corrupt counterpart: what an ablated head says when the prompt says
    something else.

    The only ablation that leaves everything in place that clean and corrupt have in common, as MIB evaluates circuits
    (Mueller et al. 2025).
    """

    values: Mapping[int, Float[Tensor, "prompt pos head d_head"]]
    row_of: Mapping[tuple[bytes, bytes], int]
    """Tokens of a clean prompt and its corrupt one -> their row in `values`."""

    def at(self, layer: int, evaluated: PromptPairs) -> Float[Tensor, "batch pos head d_head"]:
        """The corrupt outputs of a layer for these prompts. Errors: `InputError` for pairs that were not run."""
        values = self.values[layer]
        rows = [self.row_of.get(tokens, -1) for tokens in _tokens(evaluated)]
        if -1 in rows or values.shape[1] != evaluated.clean.shape[1]:
            raise InputError(
                "the counterfactual outputs are of other pairs; make them with `counterfactual_outputs` on the prompts "
                "to be evaluated."
            )
        return values[torch.tensor(rows, device=values.device)]


def counterfactual_outputs(model: HookedModel, pairs: PromptPairs, *, batch: int = BATCH) -> CounterfactualOutputs:
    """Every head's output on the corrupt prompts of these pairs."""
    model.require_eval()
    names = [hooks.z(layer) for layer in range(model.n_layers)]
    parts = [model.activations(part.corrupt, part.mask, names)[1] for part in pairs.batches(batch)]
    values = {layer: torch.cat([part[name] for part in parts]) for layer, name in enumerate(names)}
    return CounterfactualOutputs(values=values, row_of={tokens: row for row, tokens in enumerate(_tokens(pairs))})


def _tokens(pairs: PromptPairs) -> Iterator[tuple[bytes, bytes]]:
    return (
        (clean.cpu().numpy().tobytes(), corrupt.cpu().numpy().tobytes())
        for clean, corrupt in zip(pairs.clean, pairs.corrupt, strict=True)
    )


Replacement = ReferenceMeans | ResampledOutputs | CounterfactualOutputs | Literal["zero"]
"""What an ablated head's output becomes."""
Scope = Mapping[Head, Sequence[Position]]
"""Heads and the named positions at which each is meant."""


def head_masks(model: HookedModel, pairs: PromptPairs, scope: Scope) -> dict[int, Bool[Tensor, "batch pos head"]]:
    """Where the heads of a scope stand: layer -> True at their positions."""
    masks: dict[int, Tensor] = {}
    for head, positions in scope.items():
        model.checked(head)
        mask = masks.setdefault(
            head.layer, torch.zeros(*pairs.clean.shape, model.n_heads, dtype=torch.bool, device=pairs.clean.device)
        )
        for position in positions:
            mask[:, :, head.index] |= pairs.position(position)
    return masks


def ablation_edits(
    model: HookedModel, pairs: PromptPairs, scope: Scope, means: Replacement, *, complement: bool = False
) -> dict[str, hooks.Edit]:
    """Edits that ablate the heads of a scope at their positions; with `complement=True`, everything *except* them."""
    masks = head_masks(model, pairs, scope)
    if complement:
        nothing = torch.zeros(*pairs.clean.shape, model.n_heads, dtype=torch.bool, device=pairs.clean.device)
        masks = {layer: ~masks.get(layer, nothing) for layer in range(model.n_layers)}
    _refuse_overlap(means, pairs)
    return {hooks.z(layer): _replace(mask[..., None], _value(means, layer, pairs)) for layer, mask in masks.items()}


def _refuse_overlap(means: Replacement, pairs: PromptPairs) -> None:
    if isinstance(means, ReferenceMeans | ResampledOutputs):
        refuse_overlap(means.prompts, pairs)


Kind = Literal["mean", "resampled", "counterfactual", "zero"]


def kind_of(means: Replacement) -> Kind:
    """What stands in for an ablated head, in a word."""
    match means:
        case ReferenceMeans():
            return "mean"
        case ResampledOutputs():
            return "resampled"
        case CounterfactualOutputs():
            return "counterfactual"
        case _:
            return means


def described(means: Replacement) -> str:
    """What a replacement is made of, for the identity of what is computed with it (a counterfactual one is made of the
    prompts themselves)."""
    if isinstance(means, ReferenceMeans | ResampledOutputs):
        return (
            f"{kind_of(means)} {means.prompts.fingerprint()} "
            f"{means.per_position if isinstance(means, ReferenceMeans) else means.seed}"
        )
    return kind_of(means)


def _value(means: Replacement, layer: int, pairs: PromptPairs) -> Tensor | float:
    return 0.0 if isinstance(means, str) else means.at(layer, pairs)


def _replace(mask: Bool[Tensor, "batch pos head 1"], value: Tensor | float) -> hooks.Edit:
    def change(activation: Tensor) -> Tensor:
        return torch.where(mask, torch.as_tensor(value, dtype=activation.dtype, device=activation.device), activation)

    return change


@torch.no_grad()
def ablated_logits(
    model: HookedModel,
    pairs: PromptPairs,
    scope: Scope,
    means: Replacement,
    *,
    complement: bool = False,
    batch: int = BATCH,
) -> Float[Tensor, "batch d_vocab"]:
    """Final logits on the clean prompts with the heads of a scope (or all others) ablated."""
    model.require_eval()
    logits = []
    for part in pairs.batches(batch):
        with hooks.edit(model.model, ablation_edits(model, part, scope, means, complement=complement)):
            logits.append(model.final_logits(part.clean, part.mask))
    return torch.cat(logits)


@torch.no_grad()
def plain_logits(model: HookedModel, pairs: PromptPairs, *, batch: int = BATCH) -> Float[Tensor, "batch d_vocab"]:
    """Final logits on the clean prompts."""
    model.require_eval()
    return torch.cat([model.final_logits(part.clean, part.mask) for part in pairs.batches(batch)])


def ablation_profiles(
    model: HookedModel,
    pairs: PromptPairs,
    means: Replacement,
    *,
    metrics: Mapping[str, Metric],
    heads: Iterable[Head] | None = None,
    position: Position = "all",
    batch: int = BATCH,
    memory: int = MEMORY,
    files: Mapping[str, Path] | None = None,
) -> dict[str, Scores]:
    """Impact of ablating each head on its own at a position, in several metrics at once (eq 3, 4 before the choice of
    baseline).

    Returns metric name -> [layer head example]: metric of the whole model minus metric without the head, per example;
    positive = the head helps. `baseline` is the whole model's mean metric. Heads that were not asked for are NaN.
    `memory`: bytes of one chunk of heads. `files`: where each metric's profile is kept, and what is found so far while
    the sweep runs; an interrupted sweep resumes from it.
    """
    model.require_eval()
    asked = model.heads if heads is None else sorted(model.checked(head) for head in heads)
    _refuse_overlap(means, pairs)

    unit = "fall of {} when the head is ablated" + ("" if position == "all" else f" at {position}")

    def sweep(partial: PartialFile | None) -> dict[str, Scores]:
        progress = Progress.of((model.n_layers,), len(pairs), extra=(model.n_heads, len(metrics)), file=partial)
        whole: list[Tensor] = []
        with progress_bar(total=len(asked) * len(pairs), desc=f"ablating heads of {model.name}", unit="run") as bar:
            for start in range(0, len(pairs), batch):
                part = pairs.rows(slice(start, start + batch))
                whole.append(
                    _ablate(
                        model,
                        part,
                        asked,
                        means,
                        list(metrics.values()),
                        position,
                        memory,
                        bar,
                        progress.examples(start, start + batch),
                    )
                )
        baselines = torch.cat(whole, -1).mean(-1)
        return {
            name: Scores.of_heads(
                progress.values[:, :, number].float(),
                unit=unit.format(name.replace("_", " ")),
                baseline=float(baselines[number]),
            )
            for number, name in enumerate(metrics)
        }

    return kept_together(
        files, lambda: identity(model, [pairs], asked, list(metrics), position, described(means)), sweep
    )


def _ablate(
    model: HookedModel,
    pairs: PromptPairs,
    heads: Sequence[Head],
    means: Replacement,
    metrics: Sequence[Metric],
    position: Position,
    memory: int,
    bar: "tqdm[Any]",
    progress: Progress,
) -> Float[Tensor, "metric batch"]:
    """The impacts on some prompts go into `progress` (layer by example; heads and metrics beside); returns the whole
    model's metrics."""
    replay, where = replay_of(model, pairs), pairs.position(position)
    logits = plain_logits(model, pairs) if replay is None else replay.clean_logits
    whole = torch.stack([metric(logits, pairs.answers, pairs.distractors) for metric in metrics])
    everyone = torch.arange(len(pairs))
    for layer in range(model.n_layers):
        wanted = [head for head in heads if head.layer == layer]
        if progress.has([layer], everyone):
            bar.update(len(wanted) * len(pairs))
            continue
        values = torch.full((model.n_heads, *whole.shape), torch.nan)
        values[[head.index for head in wanted]] = 0.0  # a prompt without the position keeps this: nothing was ablated
        runs = (
            _through_hooks(model, pairs, wanted, means, where)
            if replay is None
            else _replayed(replay, pairs, layer, wanted, means, where, memory)
        )
        for head, rows, ablated in runs:
            without = torch.stack([metric(ablated, pairs.answers[rows], pairs.distractors[rows]) for metric in metrics])
            values[head.index, :, rows.cpu()] = (whole[:, rows] - without).float().cpu()
            bar.update(len(rows))
        progress.values[layer] = values
        progress.mark([layer], everyone)
    return whole.double().cpu()


Ablated = Iterator[tuple[Head, Int[Tensor, " rows"], Float[Tensor, "rows d_vocab"]]]
"""(head, prompts, their logits with the head alone ablated)."""


def _through_hooks(
    model: HookedModel, pairs: PromptPairs, heads: Sequence[Head], means: Replacement, where: Bool[Tensor, "batch pos"]
) -> Ablated:
    everyone = torch.arange(len(pairs), device=where.device)
    for head in heads:
        here = where[..., None, None] & (torch.arange(model.n_heads, device=where.device) == head.index)[:, None]
        with (
            torch.no_grad(),
            hooks.edit(model.model, {hooks.z(head.layer): _replace(here, _value(means, head.layer, pairs))}),
        ):
            yield head, everyone, model.final_logits(pairs.clean, pairs.mask)


def _replayed(
    replay: Replay,
    pairs: PromptPairs,
    layer: int,
    heads: Sequence[Head],
    means: Replacement,
    where: Bool[Tensor, "batch pos"],
    memory: int,
) -> Ablated:
    if not heads:
        return
    value = torch.as_tensor(_value(means, layer, pairs), dtype=replay.clean_logits.dtype, device=where.device)
    value = value.expand(*((1, *replay.clean[layer].z.shape[1:]) if value.ndim < 4 else value.shape))
    for patched in replaced(replay, "z", layer, value, [where], memory=memory, heads=[head.index for head in heads]):
        yield Head(layer, patched.head), patched.rows, patched.logits
