"""The corrupt run, token by token beside the clean one: what every method that puts corrupt values into the clean run
reads.

Where clean and corrupt prompts differ in length, a token's corrupt value is the one at its counterpart, the token of
the same name (`tasks.counterparts`); other tokens have none, and what acts on them refuses (`require_counterparts`).
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs


def corrupt_activations(
    model: HookedModel, pairs: PromptPairs, names: Sequence[str], *, gradients: bool = False
) -> tuple[Float[Tensor, "batch d_vocab"], dict[str, Tensor]]:
    """Final logits of the corrupt prompts, and their activations by hook name at the clean tokens' counterparts: [batch
    pos ...], as `PromptPairs.aligned`. With `gradients=True` both stay in the autograd graph."""
    logits, values = model.activations(pairs.corrupt, pairs.corrupt_mask, names, gradients=gradients)
    return logits, {name: pairs.aligned(value) for name, value in values.items()}


def early_corrupt_activations(model: HookedModel, pairs: PromptPairs, names: Sequence[str]) -> dict[str, Tensor]:
    """The same activations from a forward that ends where the last of them is computed."""
    values = model.early_activations(pairs.corrupt, pairs.corrupt_mask, names)
    return {name: pairs.aligned(value) for name, value in values.items()}
