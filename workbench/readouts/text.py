"""Tokens as text for people."""

from jaxtyping import Int
from torch import Tensor

from workbench.models.hooked_model import HookedModel


def token_texts(model: HookedModel, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Each token on its own as text (a leading space is kept); its number where the model has no tokenizer."""
    ids = tokens.tolist()
    return tuple(map(str, ids)) if model.tokenizer is None else tuple(model.tokenizer.decode([token]) for token in ids)
