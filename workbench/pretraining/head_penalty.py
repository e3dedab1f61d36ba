"""A penalty that leaves a task to few heads: the group lasso over heads (Yuan & Lin 2006), with a head's output-value
matrix as its group.

    penalty = weight * sum over heads of |W_V W_O|_F

A norm, not its square: the gradient stays as large while a head shrinks, so heads that others can stand in for go to
nearly nothing. The product, not its factors: no head escapes by a larger W_V behind a smaller W_O.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM

LEAST = 1e-12
"""Under the root, where its slope would be infinite."""


def head_norms(model: LlamaForCausalLM) -> Float[Tensor, "layer head"]:
    """The Frobenius norm of each head's output-value matrix W_V W_O, which query heads of a group share W_V of."""
    return torch.stack([_norms(block.self_attn) for block in model.model.layers])


def _norms(attention: torch.nn.Module) -> Float[Tensor, " head"]:
    size = attention.head_dim
    values = attention.v_proj.weight.unflatten(0, (-1, size))  # kv_head d_head d_model
    outputs = attention.o_proj.weight.unflatten(1, (-1, size))  # d_model head d_head
    group = outputs.shape[1] // values.shape[0]
    into = torch.einsum("gdm,gem->gde", values, values).repeat_interleave(group, dim=0)
    out = torch.einsum("mhd,mhe->hde", outputs, outputs)
    return (into * out).sum((1, 2)).clamp_min(LEAST).sqrt()
