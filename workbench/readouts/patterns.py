"""Where heads look: attention probabilities on one prompt, plain or weighted by how much each looked-at token has to
give.

    plain: a[query, key]            value-weighted: a[query, key] * |v[key] W_O|

A head often parks its attention on a token with a small value (the first token, full stops): the weighted pattern is
the norm of what really moves, in units of the residual stream. Source: Kobayashi et al. 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.readouts.text import token_texts
from workbench.values.refs import Head

PLAIN, WEIGHTED = "attention probability", "attention probability x norm of the value after W_O"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPatterns:
    """Attention of some heads on one prompt."""

    tokens: tuple[str, ...]
    heads: tuple[Head, ...]
    weights: Float[Tensor, "head query key"]
    """0 where the key comes after the query."""
    unit: str

    @property
    def value_weighted(self) -> bool:
        """Whether the weights are norms of what is moved rather than probabilities."""
        return self.unit == WEIGHTED

    def to_frame(self) -> pd.DataFrame:
        """A row per head, query and key that is not after it: positions, tokens, weight."""
        rows = [
            (str(head), query, self.tokens[query], key, self.tokens[key], self.weights[place, query, key].item())
            for place, head in enumerate(self.heads)
            for query in range(len(self.tokens))
            for key in range(query + 1)
        ]
        return pd.DataFrame(rows, columns=["head", "query", "query_token", "key", "key_token", "weight"])


@torch.no_grad()
def attention_patterns(
    model: HookedModel, tokens: Int[Tensor, " pos"], heads: Sequence[Head], *, value_weighted: bool = False
) -> AttentionPatterns:
    """Attention of heads on one prompt without padding. With grouped-query attention a head's values are its group's,
    through its own W_O.

    Errors: `InputError` in training mode, for no heads, and for a head that the model does not have.
    """
    model.require_eval()
    chosen = tuple(model.checked(head) for head in heads)
    if not chosen:
        raise InputError("attention patterns need at least one head, e.g. `circuit.heads`.")
    layers = sorted({head.layer for head in chosen})
    names = [
        kind(layer) for layer in layers for kind in ((hooks.pattern, hooks.v) if value_weighted else (hooks.pattern,))
    ]
    batch, mask = tokens[None].to(model.device), torch.ones(1, len(tokens), dtype=torch.bool, device=model.device)
    activations = model.early_activations(batch, mask, names)
    weights = torch.stack([_weights(model, activations, head, value_weighted) for head in chosen])
    return AttentionPatterns(
        tokens=token_texts(model, tokens),
        heads=chosen,
        weights=weights.cpu(),
        unit=WEIGHTED if value_weighted else PLAIN,
    )


def _weights(
    model: HookedModel, activations: dict[str, Tensor], head: Head, value_weighted: bool
) -> Float[Tensor, "query key"]:
    pattern = model.of_head(head, hooks.pattern(head.layer), activations[hooks.pattern(head.layer)])[0].float()
    if not value_weighted:
        return pattern
    values = model.of_head(head, hooks.v(head.layer), activations[hooks.v(head.layer)])[0]
    return pattern * (values @ model.output_weights(head.layer)[head.index]).float().norm(dim=-1)
