"""Path patching (Wang et al. 2022; Prakash et al. 2024), exact: what does a sender do to a receiver, directly?

Clean run and corrupt run. A sender at its position takes its corrupt output; every other attention head is frozen to clean; MLPs are
recomputed (so the path runs through MLPs and the residual stream, never through another head). The receivers' q, k or v is recorded, and a
clean run with only that replaced gives the patched logits. With no receivers the frozen run's own logits are the direct effect.

Direction: corrupt into clean; for clean into corrupt pass `pairs.swapped()`. Sign: patched minus clean, so a head that the task needs has
a negative score. LayerNorm is recomputed, rotary positions are the model's own. With grouped-query attention a k or v receiver is the
head's whole key-value group.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench import hooks
from workbench.errors import InputError
from workbench.metrics import Metric, relative_change
from workbench.models import HookedModel
from workbench.patching.ablation import plain_logits
from workbench.refs import Embedding, Head, Mlp, Position, Receiver, Sender
from workbench.scores import Scores, joined
from workbench.tasks.base import PromptPairs

Effect = Literal["difference", "relative"]
"""patched - clean, or (patched - clean) / clean (Prakash's score for probabilities)."""

Cache = dict[str, Tensor]
INPUTS = {"q": hooks.q, "k": hooks.k, "v": hooks.v}
BATCH = 128
"""Default number of prompts in one forward."""


class PathPatcher:
    """Path patching on one batch of pairs: the clean and corrupt runs are done once, each path costs one or two forwards."""

    def __init__(self, model: HookedModel, pairs: PromptPairs) -> None:
        model.require_eval()
        self.model, self.pairs = model, pairs
        names = [hooks.embedding(), *(name(layer) for layer in range(model.n_layers) for name in (hooks.z, hooks.mlp_output))]
        self.clean_logits, self.clean = model.activations(pairs.clean, pairs.mask, names)
        self.corrupt_logits, self.corrupt = model.activations(pairs.corrupt, pairs.mask, names)

    @torch.no_grad()
    def logits(
        self,
        senders: Collection[Sender],
        position: Position = "all",
        *,
        receivers: Sequence[Receiver] = (),
        receiver_position: Position = "all",
        freeze_mlps: bool = False,
    ) -> Float[Tensor, "batch d_vocab"]:
        """Patched final logits when the senders jointly take their corrupt outputs at a position, along paths to the receivers."""
        self.model.require_eval()
        self._refuse_unknown(senders, receivers)
        where = self.pairs.position(position)
        frozen = self._frozen_run_edits(senders, where, freeze_mlps)
        if not receivers:
            with hooks.edit(self.model.model, frozen):
                return self.model.final_logits(self.pairs.clean, self.pairs.mask)
        names = sorted({INPUTS[receiver.composition](receiver.head.layer) for receiver in receivers})
        with hooks.edit(self.model.model, frozen):
            _, recorded = self.model.activations(self.pairs.clean, self.pairs.mask, names)
        with hooks.edit(self.model.model, self._receiver_edits(receivers, recorded, self.pairs.position(receiver_position))):
            return self.model.final_logits(self.pairs.clean, self.pairs.mask)

    def _refuse_unknown(self, senders: Collection[Sender], receivers: Sequence[Receiver]) -> None:
        for head in (*(sender for sender in senders if isinstance(sender, Head)), *(receiver.head for receiver in receivers)):
            self.model.checked(head)
        for mlp in (sender for sender in senders if isinstance(sender, Mlp)):
            if not 0 <= mlp.layer < self.model.n_layers:
                raise InputError(f"{self.model.name} has no MLP {mlp}: its layers are 0 to {self.model.n_layers - 1}.")

    def _frozen_run_edits(self, senders: Collection[Sender], where: Bool[Tensor, "batch pos"], freeze_mlps: bool) -> dict[str, hooks.Edit]:
        """Every head fixed: senders to their corrupt output at the position, all else to clean. MLPs and embedding only as asked."""
        edits = {hooks.z(layer): _constant(self._mixed_heads(layer, senders, where)) for layer in range(self.model.n_layers)}
        for layer in range(self.model.n_layers):
            if Mlp(layer) in senders:
                edits[hooks.mlp_output(layer)] = self._corrupt_at(hooks.mlp_output(layer), where, base=self.clean if freeze_mlps else None)
            elif freeze_mlps:
                edits[hooks.mlp_output(layer)] = _constant(self.clean[hooks.mlp_output(layer)])
        if Embedding() in senders:
            edits[hooks.embedding()] = self._corrupt_at(hooks.embedding(), where, base=self.clean)
        return edits

    def _mixed_heads(self, layer: int, senders: Collection[Sender], where: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch pos head d_head"]:
        z = self.clean[hooks.z(layer)].clone()
        for head in (sender for sender in senders if isinstance(sender, Head) and sender.layer == layer):
            z[:, :, head.index] = torch.where(where[..., None], self.corrupt[hooks.z(layer)][:, :, head.index], z[:, :, head.index])
        return z

    def _corrupt_at(self, name: str, where: Bool[Tensor, "batch pos"], *, base: Cache | None) -> hooks.Edit:
        corrupt, clean = self.corrupt[name], base[name] if base is not None else None
        return lambda activation: torch.where(where[..., None], corrupt, activation if clean is None else clean)

    def _receiver_edits(self, receivers: Sequence[Receiver], recorded: Cache, where: Bool[Tensor, "batch pos"]) -> dict[str, hooks.Edit]:
        edits = {}
        for name, value in recorded.items():
            chosen = torch.zeros(value.shape[:3], dtype=torch.bool, device=value.device)
            for receiver in receivers:
                if INPUTS[receiver.composition](receiver.head.layer) == name:
                    index = receiver.head.index if receiver.composition == "q" else self.model.kv_head(receiver.head)
                    chosen[:, :, index] |= where
            edits[name] = _mixed(value, chosen[..., None])
        return edits


def _constant(value: Tensor) -> hooks.Edit:
    return lambda activation: value


def _mixed(value: Tensor, chosen: Bool[Tensor, "batch pos head 1"]) -> hooks.Edit:
    return lambda activation: torch.where(chosen, value, activation)


def path_patch(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    metric: Metric,
    unit: str,
    position: Position = "last",
    receivers: Sequence[Receiver] = (),
    receiver_position: Position = "all",
    effect: Effect = "difference",
    batch: int = BATCH,
) -> Scores:
    """Path effect of every head on its own, from `position`, on the receivers (the logits when there are none).

    Returns [layer head example], patched minus clean (`effect="relative"`: divided by clean). A head at or above every receiver has no
    path to it and is NaN. Errors: `InputError` when corrupt and clean metrics are equal on every prompt (nothing to patch).
    Source: Wang et al. 2022, section 3.1; Prakash et al. 2024, appendix D.
    """
    for receiver in receivers:
        model.checked(receiver.head)
    _refuse_no_gap(model, pairs, metric, batch)
    top = max((receiver.head.layer for receiver in receivers), default=model.n_layers)
    senders = [head for head in model.heads if head.layer < top]
    target = f"{', '.join(map(str, receivers))} at {receiver_position}" if receivers else "the logits"
    described = f"{'relative ' if effect == 'relative' else ''}change of {unit}, path from {position} to {target}"
    parts = list(pairs.batches(batch))
    with tqdm(total=len(senders) * len(parts), desc=f"path patching {model.name}", unit="path", leave=False) as bar:
        return joined(
            [_sweep(PathPatcher(model, part), senders, position, receivers, receiver_position, metric, effect, described, bar) for part in parts]
        )


def _sweep(
    patcher: PathPatcher,
    senders: Sequence[Head],
    position: Position,
    receivers: Sequence[Receiver],
    receiver_position: Position,
    metric: Metric,
    effect: Effect,
    unit: str,
    bar: "tqdm[Any]",
) -> Scores:
    model, pairs = patcher.model, patcher.pairs
    clean = metric(patcher.clean_logits, pairs.answers, pairs.distractors)
    values = torch.full((model.n_layers, model.n_heads, len(pairs)), torch.nan)
    for head in senders:
        logits = patcher.logits([head], position, receivers=receivers, receiver_position=receiver_position)
        patched = metric(logits, pairs.answers, pairs.distractors)
        values[head.layer, head.index] = (relative_change(patched, clean) if effect == "relative" else patched - clean).float().cpu()
        bar.update()
    return Scores.of_heads(values, unit=unit, baseline=float(clean.mean()))


def _refuse_no_gap(model: HookedModel, pairs: PromptPairs, metric: Metric, batch: int) -> None:
    ends = (plain_logits(model, pairs, batch=batch), plain_logits(model, pairs.swapped(), batch=batch))
    clean, corrupt = (metric(logits, pairs.answers, pairs.distractors) for logits in ends)
    if bool((clean == corrupt).all()):
        raise InputError(
            "clean and corrupt prompts give the same metric on every pair, so there is nothing to patch; make the corrupt prompts differ in what the answer depends on."
        )


def activation_baselines(model: HookedModel, pairs: PromptPairs, metric: Metric) -> tuple[float, float]:
    """Mean metric of the clean and of the corrupt run: the two ends that any patching effect lies between."""
    ends = (plain_logits(model, pairs), plain_logits(model, pairs.swapped()))
    clean, corrupt = (float(metric(logits, pairs.answers, pairs.distractors).mean()) for logits in ends)
    return clean, corrupt
