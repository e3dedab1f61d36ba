"""A penalty that leaves a task to few heads: the log-sum penalty (Candes, Wakin & Boyd 2008) over heads, with the norm
of a head's output-value matrix for its size.

    penalty = weight * sum over heads of log(1 + |W_V W_O|_F / SMALL)

Concave: what two heads write alike costs less in one, where a sum of norms (the group lasso) costs the same however it
is split. The product of the matrices, not each: no head escapes by a larger W_V behind a smaller W_O.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM

SMALL = 0.1
"""A norm well below which a head is as good as gone: there the slope is at its steepest and nearly even, 1 / SMALL."""
LEAST = 1e-12
"""Under the root, where its slope would be infinite."""


def head_penalty(model: LlamaForCausalLM) -> Float[Tensor, ""]:
    """The sum over heads of log(1 + norm / SMALL)."""
    return torch.log1p(head_norms(model) / SMALL).sum()


def head_norms(model: LlamaForCausalLM) -> Float[Tensor, "layer head"]:
    """The Frobenius norm of each head's output-value matrix W_V W_O; the query heads of a group share W_V."""
    return torch.stack([_norms(block.self_attn) for block in model.model.layers])


def _norms(attention: Any) -> Float[Tensor, " head"]:
    size = attention.head_dim
    values = attention.v_proj.weight.unflatten(0, (-1, size))  # kv_head d_head d_model
    outputs = attention.o_proj.weight.unflatten(1, (-1, size))  # d_model head d_head
    group = outputs.shape[1] // values.shape[0]
    into = torch.einsum("gdm,gem->gde", values, values).repeat_interleave(group, dim=0)
    out = torch.einsum("mhd,mhe->hde", outputs, outputs)
    return (into * out).sum((1, 2)).clamp_min(LEAST).sqrt()
