"""The weights and modules of a decoder's blocks as plain tensors and functions, for arithmetic that needs no hooks.

`decoder_parts` reads them off a `TransformerBridge`, or says that it can't (None): a block with more than pre-norm
attention and an MLP, or a `HookedTransformer`. What is read is only a claim about the model; whoever computes with it
compares with the hooked forward (`patching/replay.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.models.hooked_model import HookedModel

Map = Callable[[Tensor], Tensor]
KNOWN_PARTS = {"_original_component", "ln1", "ln2", "attn", "mlp"}
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


def decoder_parts(model: HookedModel) -> DecoderParts | None:
    """The parts of a model, or None where its blocks hold something that this file does not know."""
    hooked: Any = model.model
    if not hasattr(hooked, "original_model") or not all(_known(block) for block in hooked.blocks):
        return None
    return DecoderParts(
        blocks=tuple(_block_parts(model, layer) for layer in range(model.n_layers)),
        norm_final=_norm(hooked.ln_final),
        unembed=hooked.unembed.original_component,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        d_head=model.d_head,
        d_mlp=getattr(hooked.cfg, "d_mlp", None) or 4 * int(hooked.cfg.d_model),
    )


def _known(block: Any) -> bool:
    attention = getattr(block, "attn", None)
    if attention is None or not _modules(block) <= KNOWN_PARTS or not _modules(attention) <= KNOWN_ATTENTION:
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
        mlp=block.mlp.original_component,
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
    )


def _columns(projection: nn.Module) -> Float[Tensor, "d_model columns"]:
    """A projection's weight with the inputs first (a Linear stores the outputs first, a Conv1D the inputs)."""
    weight: Any = projection.weight
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
        nn.functional.layer_norm, normalized_shape=tuple(weight.shape), weight=weight, bias=plain.bias, eps=epsilon
    )
