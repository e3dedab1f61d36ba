"""A circuit of edges alone: every edge that it leaves out carries the corrupt activation (MIB; Mueller et al. 2025).

    input of a receiver = sum of (the output of the sender, as it is in this very run) over its edges in the circuit
                        + sum of (the output on the corrupt prompt) over its other edges

for the embedding, heads and MLPs as senders; q, k, v of heads, MLPs and the logits as receivers, each with its own copy
of the residual stream and its own norm. Exact: nothing is frozen or to first order. A node that no edge of the circuit
reaches is as it is on the corrupt prompt, so only what lies on a way from the embedding to the logits is computed, all
receivers of a layer at once.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, last_position
from workbench.models.parts import DecoderParts, decoder_parts
from workbench.patching.attribution import Edges
from workbench.patching.engine.attend import Keys, attend, ready
from workbench.patching.engine.replay import PRECISION
from workbench.patching.execution import Execution
from workbench.tasks.base import PromptPairs
from workbench.tasks.counterparts import refuse_unequal

BATCH = 128
"""Default number of prompts at a time (at most)."""
COPIES = 6
"""How many copies of a layer's inputs, with its queries, keys and values, are held at a time."""


class EdgePatcher:
    """Runs circuits of edges on some pairs of prompts.

    Errors: `InputError` in training mode, and for a model that this arithmetic does not reproduce (the whole graph must
    give the clean run's logits on the first prompts).
    """

    def __init__(self, model: HookedModel, pairs: PromptPairs, *, execution: Execution = Execution()) -> None:
        model.require_eval()
        parts = decoder_parts(model)
        if parts is None:
            raise InputError(
                f"{model.name}: circuits of edges need blocks of pre-norm attention and an MLP on TransformerLens 4; "
                "evaluate circuits of heads instead."
            )
        self.model, self.pairs, self.execution, self.parts = model, pairs, execution, parts
        self.edges = Edges.of(model)
        self._whole: _Ends | None = None
        self.there = ~self.edges.connected(parallel=model.has_parallel_blocks).isnan()
        self._require_exact()

    @torch.no_grad()
    def logits(self, present: Bool[Tensor, "sender receiver"]) -> Float[Tensor, "batch d_vocab"]:
        """Final logits of the circuit of these edges (rows and columns as in `Edges`).

        Errors: `InputError` for a mask of another shape, or an edge that the model does not have.
        """
        if present.shape != self.there.shape or bool((present & ~self.there).any()):
            raise InputError(
                f"a circuit of {self.model.name} marks some of its {int(self.there.sum())} edges in an array of "
                f"{tuple(self.there.shape)}; make it from scores of this model."
            )
        present, size = self.edges.pruned(present), len(self.pairs)
        prompts = self._prompts(present)
        if prompts >= size:  # the corrupt and the clean run serve every circuit
            self._whole = self._whole or _Ends.of(self.model, self.pairs)
            return self._run(present, self.pairs, self._whole)
        return torch.cat([self._run(present, part) for part in self.pairs.batches(prompts)])

    def _prompts(self, present: Tensor) -> int:
        """How many prompts fit the memory."""
        layers, width = self.model.n_layers, int(self.model.model.cfg.d_model)
        inputs = int(present.any(0).sum()) // layers + 1
        rows = int(present.any(1).sum()) + COPIES * inputs + 8 * layers
        element = self.parts.blocks[0].weight_o.element_size()
        fitting = self.execution.memory_on(self.model.device) // (rows * self.pairs.clean.shape[1] * width * element)
        return self.execution.batch_of(max(1, min(BATCH, fitting)))

    def _run(self, present: Tensor, pairs: PromptPairs, ends: "_Ends | None" = None) -> Float[Tensor, "batch d_vocab"]:
        ends = ends or _Ends.of(self.model, pairs)
        return _Run(self.model, self.parts, self.edges.group, present.to(pairs.mask.device), ends).logits()

    @torch.no_grad()
    def _require_exact(self) -> None:
        cause = None
        try:
            if self._gives_the_clean_run():
                return
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # arithmetic that a part of the model does not take, such as an MLP of two inputs
            cause = error
        raise InputError(
            f"{self.model.name} can't be patched edge by edge exactly (its blocks do more than this program knows); "
            "evaluate circuits of heads instead."
        ) from cause

    def _gives_the_clean_run(self) -> bool:
        """Whether the whole graph gives the first prompts' logits to rounding."""
        few = self.pairs.rows(slice(0, 2))
        expected = self.model.final_logits(few.clean, few.mask)
        logits = self._run(self.there, few)
        inside = torch.float32 if self.parts.blocks[0].softmax_in_float32 else expected.dtype
        rounding = max(torch.finfo(expected.dtype).eps, torch.finfo(inside).eps)
        allowed = min(PRECISION * rounding, 0.1) * max(1.0, float(expected.abs().max()))
        return logits.shape == expected.shape and float((logits - expected).abs().max()) <= allowed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ends:
    """The corrupt run of some prompts, and the clean embeddings."""

    mask: Tensor
    clean: Float[Tensor, "batch pos d_model"]
    corrupt: dict[str, Tensor]
    """By hook name."""
    rotary: bool

    @classmethod
    def of(cls, model: HookedModel, pairs: PromptPairs) -> "_Ends":
        """A run and the beginning of one."""
        refuse_unequal(pairs.counterparts, "a circuit of edges")
        rotary = hooks.rotary_cos(0) in model.model.hook_dict
        kinds = [hooks.residual_pre, hooks.attention_output, hooks.mlp_output, hooks.z, hooks.q, hooks.k, hooks.v]
        kinds += [hooks.rotary_cos, hooks.rotary_sin] if rotary else []
        names = [kind(layer) for layer in range(model.n_layers) for kind in kinds]
        _, corrupt = model.activations(pairs.corrupt, pairs.mask, [*names, hooks.residual_post(model.n_layers - 1)])
        first = hooks.residual_pre(0)
        clean = model.early_activations(pairs.clean, pairs.mask, [first])[first]
        return cls(mask=pairs.mask, clean=clean, corrupt=corrupt, rotary=rotary)


class _Run:
    """One forward of a circuit, from the embedding up: what each of its senders changes against the corrupt run."""

    def __init__(self, model: HookedModel, parts: DecoderParts, group: int, present: Tensor, ends: _Ends) -> None:
        self.model, self.parts, self.group, self.ends = model, parts, group, ends
        self.corrupt, self.final = ends.corrupt, ends.corrupt[hooks.residual_post(model.n_layers - 1)]
        senders = present.any(1)
        self.rows = {index: row for row, index in enumerate(senders.nonzero().flatten().tolist())}
        """Sender -> its row in `changes`."""
        self.changes = self.final.new_zeros(len(self.rows), *self.final.shape)
        self.into = present[senders].to(self.final.dtype)
        self.span = model.n_heads + 2 * model.n_kv_heads + 1
        """Receivers of a layer."""

    def logits(self) -> Float[Tensor, "batch d_vocab"]:
        """Through all layers to the logits at the last token."""
        if 0 in self.rows:
            self.changes[0] = self.ends.clean - self.corrupt[hooks.residual_pre(0)]
        for layer in range(self.model.n_layers):
            self._attention(layer)
            self._mlp(layer)
        last = last_position(self.ends.mask)
        rows = torch.arange(len(last), device=last.device)
        changes = torch.einsum("sbd,s->bd", self.changes[:, rows, last], self.into[:, -1])
        return self.parts.unembed(self.parts.norm_final(self.final[rows, last] + changes))

    def _inputs(self, base: Tensor, receivers: list[int]) -> Float[Tensor, "receiver batch pos d_model"]:
        """What each of some receivers reads."""
        mixed = self.into[:, receivers].T @ self.changes.flatten(1)
        return mixed.view(len(receivers), *base.shape).add_(base)

    def _attention(self, layer: int) -> None:
        model, part, first = self.model, self.parts.blocks[layer], 1 + layer * (self.model.n_heads + 1)
        heads = [head for head in range(model.n_heads) if first + head in self.rows]
        if not heads:
            return
        counts = {"q": model.n_heads, "k": model.n_kv_heads, "v": model.n_kv_heads}
        own = {"q": heads, "k": sorted({head // self.group for head in heads})}
        own["v"] = own["k"]
        place, column = layer * self.span, 0
        inputs: dict[str, Tensor] = {}
        for (name, count), kind in zip(counts.items(), (hooks.q, hooks.k, hooks.v), strict=True):
            inputs[name] = self.corrupt[kind(layer)][:, :, own[name]].clone()
            read = [head for head in own[name] if bool(self.into[:, place + head].any())]
            if read:
                streams = self._inputs(self.corrupt[hooks.residual_pre(layer)], [place + head for head in read])
                columns = [column + head * self.parts.d_head for head in read]
                value = self._projected(layer, part.norm_attention(streams), columns)
                inputs[name][:, :, [own[name].index(head) for head in read]] = value
            place, column = place + count, column + count * self.parts.d_head
        z = self._attended(layer, inputs, [own["k"].index(head // self.group) for head in heads])
        change = z - self.corrupt[hooks.z(layer)][:, :, heads]
        written = torch.einsum("bphw,hwd->hbpd", change, part.weight_o[heads])
        self.changes[[self.rows[first + head] for head in heads]] = written

    def _projected(
        self, layer: int, normed: Float[Tensor, "receiver batch pos d_model"], columns: list[int]
    ) -> Float[Tensor, "batch pos receiver d_head"]:
        """Each receiver's input through its own columns of W_Q, W_K, W_V."""
        part, width = self.parts.blocks[layer], self.parts.d_head
        weight = torch.stack([part.weight_qkv[:, start : start + width] for start in columns])
        value = (normed.flatten(1, 2) @ weight).unflatten(1, normed.shape[1:3])
        if part.bias_qkv is not None:
            bias = torch.stack([part.bias_qkv[start : start + width] for start in columns])
            value = value + bias[:, None, None]
        return value.permute(1, 2, 0, 3)

    def _attended(self, layer: int, inputs: dict[str, Tensor], kv: list[int]) -> Float[Tensor, "batch pos head d_head"]:
        """z of some heads from their q and the k and v that each reads."""
        part, mask = self.parts.blocks[layer], self.ends.mask
        cos, sin = (
            self.corrupt[kind(layer)].expand(len(mask), -1, -1) if self.ends.rotary else None
            for kind in (hooks.rotary_cos, hooks.rotary_sin)
        )
        q, k = ready(inputs["q"], part.q_norm, cos, sin), ready(inputs["k"], part.k_norm, cos, sin)
        length = mask.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() & mask[:, None]
        visible = visible | torch.eye(length, dtype=torch.bool, device=mask.device)  # no softmax over nothing
        keys = Keys(k=k[None, :, :, kv], v=inputs["v"][None, :, :, kv], visible=visible)
        return attend(q[None], None, keys, part.scale, part.softmax_in_float32)[0]

    def _mlp(self, layer: int) -> None:
        index, part = 1 + layer * (self.model.n_heads + 1) + self.model.n_heads, self.parts.blocks[layer]
        if index not in self.rows:
            return
        base = self.corrupt[hooks.residual_pre(layer)]
        base = base if part.parallel else base + self.corrupt[hooks.attention_output(layer)]
        read = self._inputs(base, [(layer + 1) * self.span - 1])[0]
        self.changes[self.rows[index]] = part.mlp(part.norm_mlp(read)) - self.corrupt[hooks.mlp_output(layer)]
