"""Ablation of attention heads: a head's output (`hook_z`) is replaced by what stands in for it (`replacement.py`).

Mean ablation takes its means over a reference set that never holds the evaluated prompts (else the calibration would
have seen the test). Impact of a head (eq 3, 4): metric of the model as it is, minus metric with the head ablated;
positive = the head helps.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.engine.replay import Replay
from workbench.patching.engine.sites import replaced
from workbench.patching.execution import Execution
from workbench.patching.progress import PartialFile, Progress, identity, load_or_sweep_all, progress_bar
from workbench.patching.reference import Reference, reading, replacement_of, require_model, require_pairs
from workbench.patching.replacement import (
    BATCH,
    CounterfactualOutputs,
    Kind,
    ReferenceMeans,
    Replacement,
    ResampledOutputs,
    StandIn,
    counterfactual_outputs,
    reference_means,
    replacement_named,
    require_fitting_at,
    resampled_outputs,
)
from workbench.patching.shared import shared_logits
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric, metric_named, metrics_named
from workbench.values.refs import Head, Position, head_named, heads_named
from workbench.values.scores import Scores

__all__ = [  # what is ablated with stands in `replacement.py`; both are had from here
    "CounterfactualOutputs",
    "Kind",
    "ReferenceMeans",
    "Replacement",
    "ResampledOutputs",
    "Scope",
    "ablate",
    "ablated_logits",
    "ablation_edits",
    "ablation_profiles",
    "counterfactual_outputs",
    "head_masks",
    "plain_logits",
    "reference_means",
    "resampled_outputs",
]

Scope = Mapping[Head, Sequence[Position]] | Mapping[str, Sequence[Position]]
"""Heads (or their names) and the named positions at which each is meant."""


def head_masks(model: HookedModel, pairs: PromptPairs, scope: Scope) -> dict[int, Bool[Tensor, "batch pos head"]]:
    """Where the heads of a scope stand: layer -> True at their positions."""
    masks: dict[int, Tensor] = {}
    for name, positions in scope.items():
        head = model.checked(head_named(name))
        mask = masks.setdefault(
            head.layer, torch.zeros(*pairs.clean.shape, model.n_heads, dtype=torch.bool, device=pairs.clean.device)
        )
        for position in positions:
            mask[:, :, head.index] |= pairs.position(position)
    return masks


def ablation_edits(
    model: HookedModel,
    pairs: PromptPairs,
    scope: Scope,
    replacement: Replacement | Literal["zero"],
    *,
    complement: bool = False,
) -> dict[str, hooks.Edit]:
    """Edits that ablate the heads of a scope at their positions; with `complement=True`, everything *except* them."""
    stand_ins = _stand_ins(model, pairs, scope, replacement, complement=complement)
    return {hooks.z(layer): _replace(mask[..., None], value) for layer, (mask, value) in stand_ins.items()}


def _stand_ins(
    model: HookedModel,
    pairs: PromptPairs,
    scope: Scope,
    replacement: Replacement | Literal["zero"],
    *,
    complement: bool,
) -> dict[int, tuple[Bool[Tensor, "batch pos head"], StandIn]]:
    """Layer -> where heads are ablated, and what stands in for them."""
    masks = head_masks(model, pairs, scope)
    if complement:
        nothing = torch.zeros(*pairs.clean.shape, model.n_heads, dtype=torch.bool, device=pairs.clean.device)
        masks = {layer: ~masks.get(layer, nothing) for layer in range(model.n_layers)}
    stand_in = replacement_named(replacement)
    here = [mask.any(-1) for mask in masks.values()]
    require_fitting_at(stand_in, pairs, torch.stack(here).any(0) if here else torch.zeros_like(pairs.mask))
    return {layer: (mask, stand_in.at(layer, pairs)) for layer, mask in masks.items()}


def _replace(mask: Bool[Tensor, "batch pos head 1"], value: StandIn) -> hooks.Edit:
    def change(activation: Tensor) -> Tensor:
        return torch.where(mask, value.to(dtype=activation.dtype, device=activation.device), activation)

    return change


@torch.no_grad()
def ablated_logits(
    model: HookedModel,
    pairs: PromptPairs,
    scope: Scope,
    replacement: Replacement | Literal["zero"],
    *,
    complement: bool = False,
    batch: int = BATCH,
) -> Float[Tensor, "batch d_vocab"]:
    """Final logits on the clean prompts with the heads of a scope (or all others) ablated."""
    model.require_eval()
    logits = []
    for part in pairs.batches(batch):
        stand_ins = _stand_ins(model, part, scope, replacement, complement=complement)
        shared = shared_logits(model, part, stand_ins)
        if shared is None:
            edits = {hooks.z(layer): _replace(mask[..., None], value) for layer, (mask, value) in stand_ins.items()}
            with hooks.edit(model.model, edits):
                shared = model.final_logits(part.clean, part.mask)
        logits.append(shared)
    return torch.cat(logits)


@torch.no_grad()
def plain_logits(model: HookedModel, pairs: PromptPairs, *, batch: int = BATCH) -> Float[Tensor, "batch d_vocab"]:
    """Final logits on the clean prompts."""
    model.require_eval()
    logits = []
    for part in pairs.batches(batch):
        shared = shared_logits(model, part)
        logits.append(model.final_logits(part.clean, part.mask) if shared is None else shared)
    return torch.cat(logits)


def ablate(
    model: HookedModel,
    pairs: PromptPairs,
    reference: Reference = None,
    *,
    metric: str | Metric = "log_probability",
    heads: Iterable[Head | str] | None = None,
    position: Position = "all",
    execution: Execution = Execution(),
) -> Scores:
    """Impact of ablating each head on its own: metric of the whole model minus metric without the head (eq 3, 4).

    Returns [layer head example], positive = the head helps; NaN for heads that were not asked for. An ablated head's
    output becomes its mean over the pairs' corrupt prompts (never the evaluated clean ones), or what `reference` says:
    pairs whose clean prompts are averaged, `"counterfactual"` (its output on the prompt's own corrupt counterpart),
    `"zero"`, or a replacement made beforehand. Errors: `InputError` for an unknown metric, head or position, a
    reference that does not fit the prompts, and a file of another sweep. Several metrics at once: `ablation_profiles`.
    """
    measured = metric_named(metric)
    require_model(model)
    require_pairs(pairs)
    pairs = reading(model, pairs)
    replacement, _ = replacement_of(model, pairs, reference)
    files = None if execution.path is None else {measured.name: execution.path}
    profiles = ablation_profiles(
        model,
        pairs,
        replacement,
        metrics=[measured],
        heads=heads,
        position=position,
        execution=replace(execution, file=None),
        files=files,
    )
    return profiles[measured.name]


def ablation_profiles(
    model: HookedModel,
    pairs: PromptPairs,
    replacement: Replacement | Literal["zero"],
    *,
    metrics: str | Metric | Iterable[str | Metric],
    heads: Iterable[Head | str] | None = None,
    position: Position = "all",
    execution: Execution = Execution(),
    files: Mapping[str, str | Path] | None = None,
) -> dict[str, Scores]:
    """Impact of ablating each head on its own at a position, in several metrics at once (eq 3, 4 before the choice of
    baseline).

    Returns metric name -> [layer head example]: metric of the whole model minus metric without the head, per example;
    positive = the head helps. `baseline` is the whole model's mean metric. Heads that were not asked for are NaN.
    `files` (metric name -> file): where each metric's profile is kept, in place of `execution.file`; an interrupted
    sweep resumes from what is beside the first. Errors: `InputError` for an unknown metric, head or position, a
    replacement that does not fit the prompts, and files of another sweep.
    """
    model.require_eval()
    measured = metrics_named(metrics)
    asked = model.heads if heads is None else sorted(model.checked(head) for head in heads_named(heads))
    stand_in = replacement_named(replacement)
    require_fitting_at(stand_in, pairs, pairs.position(position))
    sweep = _Ablation(model, asked, stand_in, measured, position, execution)
    paths = _paths(files, measured, execution)
    settings = {"heads": asked, "position": position}

    def identify() -> str:
        return identity(
            "ablation", model, [pairs], metrics=measured, replacement=stand_in.identity(), settings=settings
        )

    return load_or_sweep_all(paths, identify, lambda partial: sweep.profiles(pairs, partial))


def _paths(
    files: Mapping[str, str | Path] | None, metrics: Sequence[Metric], execution: Execution
) -> dict[str, Path] | None:
    names = [metric.name for metric in metrics]
    if execution.file is not None:
        raise InputError("several metrics have a file each: give `files` (metric name -> file) in place of one file.")
    if files is not None and sorted(files) != sorted(names):
        raise InputError(f"`files` names {', '.join(sorted(files))}, measured are {', '.join(names)}; name each once.")
    return None if files is None else {name: Path(files[name]) for name in names}


Ablated = Iterator[tuple[Head, Int[Tensor, " rows"], Float[Tensor, "rows d_vocab"]]]
"""(head, prompts, their logits with the head alone ablated)."""


@dataclass(frozen=True, slots=True)
class _Ablation:
    """A sweep of single ablations."""

    model: HookedModel
    heads: Sequence[Head]
    replacement: Replacement
    metrics: Sequence[Metric]
    position: Position
    execution: Execution

    def profiles(self, pairs: PromptPairs, partial: PartialFile | None) -> dict[str, Scores]:
        """The impacts in each metric."""
        model, batch = self.model, self.execution.batch_of(BATCH)
        progress = Progress.of((model.n_layers,), len(pairs), extra=(model.n_heads, len(self.metrics)), file=partial)
        whole: list[Tensor] = []
        with progress_bar(
            total=len(self.heads) * len(pairs),
            desc=f"ablating heads of {model.name}",
            unit="run",
            shown=self.execution.progress,
        ) as bar:
            for start in range(0, len(pairs), batch):
                part = pairs.rows(slice(start, start + batch))
                whole.append(self._impacts(part, bar, progress.examples(start, start + batch)))
        baselines = torch.cat(whole, -1).mean(-1)
        where = "" if self.position == "all" else f" at {self.position}"
        return {
            metric.name: Scores.of_heads(
                progress.values[:, :, number].float(),
                unit=f"fall of {metric.unit} when the head is ablated{where}",
                baseline=float(baselines[number]),
            )
            for number, metric in enumerate(self.metrics)
        }

    def _impacts(self, pairs: PromptPairs, bar: "tqdm[Any]", progress: Progress) -> Float[Tensor, "metric batch"]:
        """The impacts on some prompts go into `progress` (layer by example; heads and metrics beside); returns the
        whole model's metrics."""
        replay, where = self.execution.replay(self.model, pairs), pairs.position(self.position)
        logits = plain_logits(self.model, pairs) if replay is None else replay.clean_logits
        whole = self._measured(logits, pairs)
        everyone = torch.arange(len(pairs))
        for layer in range(self.model.n_layers):
            wanted = [head for head in self.heads if head.layer == layer]
            if progress.has([layer], everyone):
                bar.update(len(wanted) * len(pairs))
                continue
            values = torch.full((self.model.n_heads, *whole.shape), torch.nan)
            values[[head.index for head in wanted]] = 0.0  # a prompt without the position keeps this: none was ablated
            runs = (
                self._through_hooks(pairs, wanted, where)
                if replay is None
                else self._replayed(replay, pairs, layer, wanted, where)
            )
            for head, rows, ablated in runs:
                without = self._measured(ablated, pairs.rows(rows))
                values[head.index, :, rows.cpu()] = (whole[:, rows] - without).float().cpu()
                bar.update(len(rows))
            progress.values[layer] = values
            progress.mark([layer], everyone)
        return whole.double().cpu()

    def _measured(self, logits: Float[Tensor, "rows d_vocab"], pairs: PromptPairs) -> Float[Tensor, "metric rows"]:
        return torch.stack([metric(logits, pairs.answers, pairs.distractors) for metric in self.metrics])

    def _through_hooks(self, pairs: PromptPairs, heads: Sequence[Head], where: Bool[Tensor, "batch pos"]) -> Ablated:
        model, everyone = self.model, torch.arange(len(pairs), device=where.device)
        for head in heads:
            here = where[..., None, None] & (torch.arange(model.n_heads, device=where.device) == head.index)[:, None]
            edits = {hooks.z(head.layer): _replace(here, self.replacement.at(head.layer, pairs))}
            with torch.no_grad(), hooks.edit(model.model, edits):
                yield head, everyone, model.final_logits(pairs.clean, pairs.mask)

    def _replayed(
        self, replay: Replay, pairs: PromptPairs, layer: int, heads: Sequence[Head], where: Bool[Tensor, "batch pos"]
    ) -> Ablated:
        if not heads:
            return
        value = self.replacement.at(layer, pairs).to(dtype=replay.clean_logits.dtype, device=where.device)
        value = value.expand(*((1, *replay.clean[layer].z.shape[1:]) if value.ndim < 4 else value.shape))
        indices, memory = [head.index for head in heads], self.execution.memory_on(where.device)
        for patched in replaced(replay, "z", layer, value, [where], memory=memory, heads=indices):
            yield Head(layer, patched.head), patched.rows, patched.logits
