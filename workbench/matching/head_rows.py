"""The rows that a head is compared by: `hook_z`, what it writes to the residual stream, or its attention pattern, at
chosen tokens.

m, the number of rows, is the number of prompts times the tokens of the position.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.matching.config import Activation, Compared
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.similarity.measures import Measure
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head, Position


def require_fitting(
    measure: Measure, activation: Activation, prompts: PromptPairs, compared: Compared = "activations"
) -> None:
    """Refuse attention KL on anything but attention patterns, and these where the models read different tokens."""
    if measure == "attention_kl" and compared == "differences":
        raise InputError(
            "measure attention_kl compares attention patterns, and a difference of two is none; set `compared: "
            "activations`, or another measure."
        )
    if activation == "pattern" and prompts.teacher is not None:
        raise InputError(
            "attention patterns are over the tokens of a prompt, which differ with the tokenizer; align z or result."
        )
    if measure == "attention_kl" and activation != "pattern":
        raise InputError(
            f"measure attention_kl compares attention patterns, not activation {activation}; set `activation: pattern`."
        )


@runtime_checkable
class HasPositions(Protocol):
    """Prompts whose tokens are known by named positions: `PromptPairs`, or a trainer's batch."""

    def position(self, name: str) -> Tensor: ...


def place(prompts: HasPositions, positions: Sequence[Position]) -> Tensor:
    """The mask of several named positions together: [batch pos]."""
    masks = [prompts.position(position) for position in positions]
    return torch.stack(masks).any(0)


def hook_names(heads: Sequence[Head], activation: Activation = "z") -> list[str]:
    """The hooks that heads are read from, in layer order."""
    name = hooks.pattern if activation == "pattern" else hooks.z
    return [name(layer) for layer in sorted({head.layer for head in heads})]


def difference(clean: Mapping[str, Tensor], corrupt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """h(clean) - h(corrupt) by hook name: whatever both runs hold alike drops out."""
    return {name: value - corrupt[name] for name, value in clean.items()}


def head_rows(
    model_weights: Mapping[int, Float[Tensor, "head d_head d_model"]] | None,
    activations: Mapping[str, Tensor],
    head: Head,
    where: Tensor,
) -> Float[Tensor, "m features"]:
    """A head's rows at the chosen tokens, prompt by prompt; with `model_weights` (layer -> W_O) as written to the
    residual stream. Where attention patterns were captured, the rows are those of the chosen query tokens, over all
    keys."""
    pattern = activations.get(hooks.pattern(head.layer))
    rows = (
        activations[hooks.z(head.layer)][:, :, head.index][where] if pattern is None else pattern[:, head.index][where]
    )
    return rows if model_weights is None else rows @ model_weights[head.layer][head.index]


def rows_at(
    model_weights: Mapping[int, Float[Tensor, "head d_head d_model"]] | None,
    activations: Mapping[str, Tensor],
    sites: Iterable[tuple[Head, Sequence[Position]]],
    prompts: HasPositions,
) -> list[Float[Tensor, "_ _"]]:
    """The rows of several heads, each at its own positions of the same prompts."""
    return [head_rows(model_weights, activations, head, place(prompts, positions)) for head, positions in sites]


def output_weights(model: HookedModel, heads: Sequence[Head], activation: Activation) -> dict[int, Tensor] | None:
    """W_O of the layers of some heads for activation `result`; None for the others, which need none."""
    return (
        None
        if activation != "result"
        else {layer: model.output_weights(layer) for layer in {head.layer for head in heads}}
    )
