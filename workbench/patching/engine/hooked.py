"""Path patching by hooked forwards: slow, obvious, and right for any model that has the hooks.

It is what `path.PathPatcher` falls back to where a model's arithmetic is not known (`parts.py`), and the reference that
its fast way is tested against. Each path costs one or two forwards of the whole model.
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.counterfactual import corrupt_activations
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Embedding, Head, Mlp, PathEnd, Position, Receiver, Sender

Cache = dict[str, Tensor]
INPUTS = {"q": hooks.q, "k": hooks.k, "v": hooks.v}


class HookedPatcher:
    """Path patching on one batch of pairs through hooks."""

    def __init__(self, model: HookedModel, pairs: PromptPairs) -> None:
        model.require_eval()
        self.model, self.pairs = model, pairs
        names = [
            hooks.embedding(),
            *(name(layer) for layer in range(model.n_layers) for name in (hooks.z, hooks.mlp_output)),
        ]
        self.clean_logits, self.clean = model.activations(pairs.clean, pairs.mask, names)
        self.corrupt_logits, self.corrupt = corrupt_activations(model, pairs, names)

    @torch.no_grad()
    def logits(
        self,
        senders: Collection[Sender],
        position: Position = "all",
        *,
        receivers: Sequence[PathEnd] = (),
        receiver_position: Position = "all",
        freeze_mlps: bool = False,
    ) -> Float[Tensor, "batch d_vocab"]:
        """Patched final logits when the senders jointly take their corrupt outputs at a position, along paths to the
        receivers."""
        where = self.pairs.position(position)
        self.pairs.require_counterparts(where)
        frozen = self._frozen_run_edits(senders, where, freeze_mlps)
        if not receivers:
            with hooks.edit(self.model.model, frozen):
                return self.model.final_logits(self.pairs.clean, self.pairs.mask)
        names = sorted({input_name(receiver) for receiver in receivers})
        with hooks.edit(self.model.model, frozen):
            _, recorded = self.model.activations(self.pairs.clean, self.pairs.mask, names)
        with hooks.edit(
            self.model.model, self._receiver_edits(receivers, recorded, self.pairs.position(receiver_position))
        ):
            return self.model.final_logits(self.pairs.clean, self.pairs.mask)

    def _frozen_run_edits(
        self, senders: Collection[Sender], where: Bool[Tensor, "batch pos"], freeze_mlps: bool
    ) -> dict[str, hooks.Edit]:
        """Every head fixed: senders to their corrupt output at the position, all else to clean. MLPs and embedding only
        as asked."""
        edits = {
            hooks.z(layer): _constant(self._mixed_heads(layer, senders, where)) for layer in range(self.model.n_layers)
        }
        for layer in range(self.model.n_layers):
            if Mlp(layer) in senders:
                edits[hooks.mlp_output(layer)] = self._corrupt_at(
                    hooks.mlp_output(layer), where, base=self.clean if freeze_mlps else None
                )
            elif freeze_mlps:
                edits[hooks.mlp_output(layer)] = _constant(self.clean[hooks.mlp_output(layer)])
        if Embedding() in senders:
            edits[hooks.embedding()] = self._corrupt_at(hooks.embedding(), where, base=self.clean)
        return edits

    def _mixed_heads(
        self, layer: int, senders: Collection[Sender], where: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        z = self.clean[hooks.z(layer)].clone()
        for head in (sender for sender in senders if isinstance(sender, Head) and sender.layer == layer):
            z[:, :, head.index] = torch.where(
                where[..., None], self.corrupt[hooks.z(layer)][:, :, head.index], z[:, :, head.index]
            )
        return z

    def _corrupt_at(self, name: str, where: Bool[Tensor, "batch pos"], *, base: Cache | None) -> hooks.Edit:
        corrupt, clean = self.corrupt[name], base[name] if base is not None else None
        return lambda activation: torch.where(where[..., None], corrupt, activation if clean is None else clean)

    def _receiver_edits(
        self, receivers: Sequence[PathEnd], recorded: Cache, where: Bool[Tensor, "batch pos"]
    ) -> dict[str, hooks.Edit]:
        edits = {}
        for name, value in recorded.items():
            if value.ndim == 3:
                edits[name] = _mixed(value, where[..., None])
                continue
            chosen = torch.zeros(value.shape[:3], dtype=torch.bool, device=value.device)
            for receiver in receivers:
                if isinstance(receiver, Receiver) and input_name(receiver) == name:
                    index = receiver.head.index if receiver.composition == "q" else self.model.kv_head(receiver.head)
                    chosen[:, :, index] |= where
            edits[name] = _mixed(value, chosen[..., None])
        return edits


def input_name(receiver: PathEnd) -> str:
    """The hook at which a receiver reads."""
    return (
        hooks.mlp_input(receiver.layer)
        if isinstance(receiver, Mlp)
        else INPUTS[receiver.composition](receiver.head.layer)
    )


def _constant(value: Tensor) -> hooks.Edit:
    return lambda activation: value


def _mixed(value: Tensor, chosen: Bool[Tensor, "batch pos *rest"]) -> hooks.Edit:
    return lambda activation: torch.where(chosen, value, activation)
