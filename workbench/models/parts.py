"""The weights and modules of a decoder's blocks as plain tensors and functions, for arithmetic that needs no hooks.

`decoder_parts` reads them off a `TransformerBridge`, or says that it can't (None): a block with more than attention
and an MLP between norms, or a `HookedTransformer`. What is read is only a claim about the model; whoever computes with
it compares with the hooked forward (`patching/engine/replay.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.models import quantisation
from workbench.models.hooked_model import HookedModel

Map = Callable[[Tensor], Tensor]
KNOWN_PARTS = {"_original_component", "ln1", "ln2", "attn", "mlp"}
POST_NORMS = {"ln1_post", "ln2_post"}
"""Norms of what attention and the MLP put out, before it is added to the residual stream (Gemma 2 and 3)."""
KNOWN_ATTENTION = {"_original_component", "q", "k", "v", "o", "qkv", "q_norm", "k_norm"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockParts:
    """One block: residual -> norm -> q, k, v -> attention -> W_O -> residual -> norm -> MLP -> residual."""

    norm_attention: Map
    norm_mlp: Map
    mlp: Map
    weight_qkv: Float[Tensor, "d_model columns"]
    """W_Q, W_K and W_V side by side: n_heads + 2 n_kv_heads times d_head columns."""
    bias_qkv: Float[Tensor, " columns"] | None
    q_norm: Map | None
    """Normalisation of every query head on its own, before the rotation (Qwen 3)."""
    k_norm: Map | None
    weight_o: Float[Tensor, "head d_head d_model"]
    bias_o: Float[Tensor, " d_model"] | None
    scale: float
    """Factor of the attention scores."""
    softmax_in_float32: bool
    """Whatever the model's dtype (Llama in TransformerLens as in `transformers`)."""
    parallel: bool
    """The MLP reads the residual stream that enters the block, beside attention (NeoX), not the one after attention."""
    post_attention: Map | None = None
    """The norm of the sum of the heads' outputs, in front of the residual stream; with it heads do not add up there."""
    soft_cap: float | None = None
    """Scores s become cap tanh(s / cap) (Gemma 2)."""

    def added(self, together: Tensor) -> Tensor:
        """What attention adds to the residual stream, of the sum of its heads' outputs and the output bias."""
        return together if self.post_attention is None else self.post_attention(together)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderParts:
    """The blocks, the last normalisation and the unembedding."""

    blocks: tuple[BlockParts, ...]
    norm_final: Map
    unembed: Map
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int


def decoder_parts(model: HookedModel, *, post_norms: bool = False) -> DecoderParts | None:
    """The parts of a model, or None where its blocks hold something that this file does not know.

    With `post_norms` also where a norm stands between attention and the residual stream: for whoever computes with
    `BlockParts.added`, because heads' outputs do not add up there.
    """
    hooked: Any = model.model
    known = KNOWN_PARTS | (POST_NORMS if post_norms else set())
    if (
        not hasattr(hooked, "original_model")
        or model.is_spread
        or not all(_known(block, known) for block in hooked.blocks)
    ):
        return None
    return DecoderParts(
        blocks=tuple(_block_parts(model, layer) for layer in range(model.n_layers)),
        norm_final=_norm(hooked.ln_final),
        unembed=_unembed(hooked),
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        d_head=model.d_head,
        d_mlp=getattr(hooked.cfg, "d_mlp", None) or 4 * int(hooked.cfg.d_model),
    )


def _known(block: Any, known: set[str]) -> bool:
    attention = getattr(block, "attn", None)
    if attention is None or not _modules(block) <= known or not _modules(attention) <= KNOWN_ATTENTION:
        return False
    if getattr(block, "residual_contribution_scale", 1.0) != 1.0:  # Granite: what is added is a share of the output
        return False
    return (
        all(hasattr(attention, name) for name in ("q", "k", "v", "o"))
        and hasattr(block, "ln1")
        and hasattr(block, "mlp")
    )


def _modules(component: Any) -> set[str]:
    return {name for name, child in component.named_children() if type(child).__name__ != "HookPoint"}


def _block_parts(model: HookedModel, layer: int) -> BlockParts:
    hooked: Any = model.model
    block, attention = hooked.blocks[layer], hooked.blocks[layer].attn
    plain = attention.original_component
    norms = {
        name: getattr(attention, name).original_component if name in _modules(attention) else None
        for name in ("q_norm", "k_norm")
    }
    projections = [getattr(attention, name).original_component for name in ("q", "k", "v")]
    biases = [projection.bias for projection in projections]
    bias = model.output_bias(layer)
    return BlockParts(
        norm_attention=_norm(block.ln1),
        norm_mlp=_norm(block.ln2 if "ln2" in _modules(block) else block.ln1),
        mlp=_mlp(block),
        weight_qkv=torch.cat([_columns(projection) for projection in projections], 1),
        bias_qkv=None if biases[0] is None else torch.cat([part.detach() for part in biases]),
        **norms,
        weight_o=model.output_weights(layer).detach(),
        bias_o=None if bias is None else bias.detach(),
        scale=float(getattr(plain, "scaling", model.d_head**-0.5)),
        softmax_in_float32=any(
            kind.__name__ == "PositionEmbeddingsAttentionBridge" for kind in type(attention).__mro__
        ),
        parallel=model.has_parallel_blocks,
        post_attention=_norm(block.ln1_post) if "ln1_post" in _modules(block) else None,
        soft_cap=getattr(plain, "attn_logit_softcapping", None),
    )


def _mlp(block: Any) -> Map:
    """The MLP with the norm of what it puts out, where there is one."""
    plain: Map = block.mlp.original_component
    if type(block.mlp).__name__ == "MoEBridge":
        plain = partial(_by_token, plain)
    return partial(_then, plain, _norm(block.ln2_post)) if "ln2_post" in _modules(block) else plain


def _by_token(experts: Map, x: Tensor) -> Tensor:
    """A mixture of experts, which takes three axes, on any number of them; it may give its router's logits too."""
    put_out = experts(x.reshape(1, -1, x.shape[-1]))
    return (put_out[0] if isinstance(put_out, tuple) else put_out).reshape(x.shape)


def _then(first: Map, second: Map, x: Tensor) -> Tensor:
    return second(first(x))


def _unembed(hooked: Any) -> Map:
    """The unembedding, with Gemma's soft cap on the logits."""
    plain = hooked.unembed.original_component
    cap = getattr(hooked.original_model.config.get_text_config(), "final_logit_softcapping", None)
    return plain if cap is None else partial(_then, plain, partial(_capped, cap))


def _capped(cap: float, logits: Tensor) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _columns(projection: nn.Module) -> Float[Tensor, "d_model columns"]:
    """A projection's weight with the inputs first (a Linear stores the outputs first, a Conv1D the inputs)."""
    weight: Any = quantisation.full(projection.weight)  # pyright: ignore[reportArgumentType]
    return weight.detach() if type(projection).__name__ == "Conv1D" else weight.detach().T


def _norm(component: Any) -> Map:
    """LayerNorm or RMSNorm of a bridge's component, in one fused call and the model's own precision."""
    plain, epsilon = component.original_component, getattr(component.config, "eps", None)
    if epsilon is None or not isinstance(getattr(plain, "weight", None), Tensor):
        return plain
    weight = plain.weight.detach() + 1.0 if getattr(component, "uses_weight_offset", False) else plain.weight.detach()
    if component.uses_rms_norm:
        return partial(nn.functional.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=epsilon)
    return partial(
        nn.functional.layer_norm,
        normalized_shape=tuple(weight.shape),
        weight=weight,
        bias=getattr(plain, "bias", None),
        eps=epsilon,
    )
