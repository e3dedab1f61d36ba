"""Activation patching (Vig et al. 2020; Meng et al. 2022): one activation of the clean run takes its corrupt value, and
everything after it follows.

Unlike path patching, all that is downstream is recomputed, so the effect is the total one. Direction: corrupt into
clean (noising); for clean into corrupt (denoising) pass `pairs.swapped()`. Sign: clean minus patched, so what helps is
positive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from workbench.errors import InputError, nearest
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.counterfactual import corrupt_activations
from workbench.patching.engine.replay import Replay
from workbench.patching.engine.sites import BY_HEAD, SITES, Patched, Site, heads_of, replaced
from workbench.patching.execution import Execution
from workbench.patching.progress import PartialFile, Progress, identity, load_or_sweep, progress_bar
from workbench.patching.reference import reading, require_model, require_pairs
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric, metric_named
from workbench.values.refs import Position
from workbench.values.scores import Scores, joined

BATCH = 128
"""Default number of prompts in one forward."""
HOOKS = {
    "resid_pre": hooks.residual_pre,
    "resid_post": hooks.residual_post,
    "attn_out": hooks.attention_output,
    "mlp_out": hooks.mlp_output,
    "z": hooks.z,
    "q": hooks.q,
    "k": hooks.k,
    "v": hooks.v,
}
"""The hook of each site, for models that are patched through hooks (`resid_mid` is patched through the attention
output)."""


def activation_patch(
    model: HookedModel,
    pairs: PromptPairs,
    site: str,
    *,
    metric: str | Metric = "log_probability",
    positions: Sequence[Position] | Literal["each"] = ("all",),
    execution: Execution = Execution(),
) -> Scores:
    """Effect of patching a site, in every layer (and head), at each of some positions.

    Returns [layer example], [layer head example] for the sites of heads (k, v: key-value heads), with an axis
    `position` before `example` when several are asked for or `each` (every token index on its own); clean minus
    patched, 0 where a prompt has no such position. Errors: `InputError` for an unknown metric, site or position, in
    training mode, and when the file is another sweep's. Source: Heimersheim & Nanda 2024, "How to use and interpret
    activation patching".
    """
    require_model(model)
    require_pairs(pairs)
    model.require_eval()
    pairs, measured = reading(model, pairs), metric_named(metric)
    if site not in SITES:
        raise InputError(f"no site {site!r} to patch; {nearest(site, SITES)}")
    if site == "resid_mid" and model.has_parallel_blocks:
        raise InputError(
            f"{model.name} has parallel blocks, in which no residual stream stands between attention and MLP; patch "
            "attn_out or mlp_out."
        )
    if positions != "each" and isinstance(positions, str):
        raise InputError(f"`positions` are several names, or 'each': write ({positions!r},).")
    names = [str(index) for index in range(pairs.clean.shape[1])] if positions == "each" else list(positions)
    sweep = _Activation(model, SITES[SITES.index(site)], measured, positions, names, execution)
    settings = {"site": site, "positions": positions if positions == "each" else names}
    scores = load_or_sweep(
        execution.path,
        lambda: identity("activation patching", model, [pairs], metrics=[measured], settings=settings),
        lambda partial: sweep.scores(pairs, partial),
    )
    return scores if len(names) > 1 or positions == "each" else scores.select(position=names[0])


@dataclass(frozen=True, slots=True)
class _Activation:
    """A sweep over the layers (and heads) of a site."""

    model: HookedModel
    site: Site
    metric: Metric
    positions: Sequence[Position] | Literal["each"]
    names: list[str]
    execution: Execution

    def scores(self, pairs: PromptPairs, partial: PartialFile | None) -> Scores:
        """Batch by batch."""
        model, batch = self.model, self.execution.batch_of(BATCH)
        parts = list(pairs.batches(batch))
        extra = (heads_of(self.site, model), len(self.names))
        progress, scores = Progress.of((model.n_layers,), len(pairs), extra=extra, file=partial), []
        with progress_bar(
            total=model.n_layers * len(parts),
            desc=f"patching {self.site} of {model.name}",
            unit="layer",
            shown=self.execution.progress,
        ) as bar:
            for number, part in enumerate(parts):
                mine = progress.examples(number * batch, number * batch + len(part))
                scores.append(self._on(part, bar, mine))
        return joined(scores)

    def _on(self, pairs: PromptPairs, bar: "tqdm[Any]", progress: Progress) -> Scores:
        model, site, masks = self.model, self.site, _masks(pairs, self.positions)
        for mask in masks:
            pairs.require_counterparts(mask)
        heads = heads_of(site, model)
        rotated = site in ("q", "k") and pairs.counterparts is not None  # by another angle in the other prompt
        replay = None if rotated else self.execution.replay(model, pairs)
        logits = model.activations(pairs.clean, pairs.mask, [])[0] if replay is None else replay.clean_logits
        clean = self.metric(logits, pairs.answers, pairs.distractors)
        values, everyone = progress.values, torch.arange(len(pairs))
        corrupt = None if replay is None else Replay.of(model, replay.parts, pairs.swapped())
        for layer in range(model.n_layers):
            bar.update()
            if progress.has([layer], everyone):
                continue
            runs = (
                _through_hooks(model, pairs, site, layer, masks, heads)
                if replay is None or corrupt is None
                else _replayed(
                    replay,
                    pairs.aligned(_values(corrupt, site, layer)),
                    site,
                    layer,
                    masks,
                    self.execution.memory_on(model.device),
                )
            )
            for run in runs:
                patched = self.metric(run.logits, pairs.answers[run.rows], pairs.distractors[run.rows])
                values[layer, run.head, run.mask, run.rows.cpu()] = (clean[run.rows] - patched).to(values)
            progress.mark([layer], everyone)
        axes = ("layer", "head", "position", "example") if site in BY_HEAD else ("layer", "position", "example")
        labels = {
            "layer": [f"L{i}" for i in range(model.n_layers)],
            "head": [f"H{i}" for i in range(heads)],
            "position": self.names,
        }
        return Scores(
            values=values.float() if site in BY_HEAD else values[:, 0].float(),
            axes=axes,
            labels={axis: tuple(labels[axis]) for axis in axes if axis != "example"},
            unit=f"fall of {self.metric.unit}, {site} patched",
            baseline=float(clean.mean()),
        )


def _masks(pairs: PromptPairs, positions: Sequence[Position] | Literal["each"]) -> list[Bool[Tensor, "batch pos"]]:
    if positions != "each":
        return [pairs.position(name) for name in positions]
    each = torch.eye(pairs.clean.shape[1], dtype=torch.bool, device=pairs.mask.device)
    return [pairs.mask & here for here in each]


def _replayed(
    replay: Replay, corrupt: Tensor, site: Site, layer: int, masks: Sequence[Tensor], memory: int
) -> Iterator[Patched]:
    return replaced(replay, site, layer, corrupt, masks, memory=memory)


def _values(run: Replay, site: Site, layer: int) -> Tensor:
    """What a run holds at a site."""
    one = run.clean[layer]
    values = {
        "resid_pre": one.pre,
        "resid_mid": one.middle,
        "resid_post": one.post,
        "attn_out": one.attention,
        "mlp_out": one.mlp,
    }
    return values[site] if site in values else getattr(one, site)


def _through_hooks(
    model: HookedModel, pairs: PromptPairs, site: Site, layer: int, masks: Sequence[Tensor], heads: int
) -> Iterator[Patched]:
    name = HOOKS["attn_out" if site == "resid_mid" else site](layer)
    rows = torch.arange(len(pairs), device=pairs.mask.device)
    corrupt = corrupt_activations(model, pairs, [name])[1][name]
    if (
        site == "resid_mid"
    ):  # TransformerBridge's hook of that name reaches the MLP alone, not the residual stream beside it
        entering = hooks.residual_pre(layer)
        before = corrupt_activations(model, pairs, [entering])[1][entering]
        corrupt = corrupt + before - model.activations(pairs.clean, pairs.mask, [entering])[1][entering]
    for number, mask in enumerate(masks):
        for head in range(heads):
            here = mask[..., None]
            if site in BY_HEAD:
                here = here[..., None] & (torch.arange(heads, device=mask.device) == head)[:, None]

            def change(value: Tensor, here: Tensor = here) -> Tensor:
                return torch.where(here, corrupt, value)

            with torch.no_grad(), hooks.edit(model.model, {name: change}):
                yield Patched(mask=number, head=head, rows=rows, logits=model.final_logits(pairs.clean, pairs.mask))
