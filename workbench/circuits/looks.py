"""Where a circuit's heads look, over many prompts: attention from the token at which each head acts to every named
position (but `all`).

    look(h, p) = mean over prompts of  sum over keys k in p of  a_h[q, k],   q: the token of the head's own position

A role is a claim about attention ("name movers look at the indirect object"): this measures it, where one prompt's
pattern only illustrates it. What a row lacks to 1 goes to tokens without a name; the first token, where heads park what
they have no use for, has a column of its own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.circuits.circuit import Member
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs
from workbench.values.scores import Scores

FIRST, BATCH = "first token", 128


@torch.no_grad()
def attention_to_positions(
    model: HookedModel, pairs: PromptPairs, members: Sequence[Member], *, batch: int = BATCH
) -> Scores:
    """Attention probability [member position example], on the clean prompts, of circuit members (`circuit.members`).

    A position of several tokens gives their sum; a member whose own position has several averages over them. NaN where
    a prompt has no token at a member's position or at the one looked at. Positions count in full, also where they share
    the first token.

    Errors: `InputError` in training mode, for no members, and for a head or position that model or prompts don't have.
    """
    model.require_eval()
    if not members:
        raise InputError("there is no head to look at; give the members of a circuit that is not empty.")
    for member in members:
        model.checked(member.head)
        pairs.position(member.position)
    named = tuple(name for name in pairs.positions if name != "all")
    names = [hooks.pattern(layer) for layer in sorted({member.head.layer for member in members})]
    looks = [_looks(model, part.to(model.device), members, named, names) for part in pairs.batches(batch)]
    labels = {
        "member": tuple(f"{member.head} ({member.role}) at {member.position}" for member in members),
        "position": (*named, FIRST),
    }
    return Scores(
        values=torch.cat(looks, -1).cpu(),
        axes=("member", "position", "example"),
        labels=labels,
        unit="attention probability",
    )


def _looks(
    model: HookedModel, part: PromptPairs, members: Sequence[Member], named: Sequence[str], names: Sequence[str]
) -> Float[Tensor, "member position batch"]:
    patterns = model.early_activations(part.clean, part.mask, names)
    keys = [*(part.position(name) for name in named), _first(part.mask)]
    rows = []
    for member in members:
        pattern = model.of_head(
            member.head, hooks.pattern(member.head.layer), patterns[hooks.pattern(member.head.layer)]
        ).float()
        asks = part.position(member.position).float()
        row = torch.einsum("bqk,bq->bk", pattern, asks / asks.sum(1, keepdim=True))  # 0 / 0: nothing there to look from
        rows.append(torch.stack([torch.where(key.any(1), (row * key).sum(1), torch.nan) for key in keys]))
    return torch.stack(rows)


def _first(mask: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The first token that is no padding."""
    return mask & (mask.cumsum(1) == 1)
