"""Teacher forcing over answers of several tokens: prompts with their answers appended, read once.

    prompt p_1 ... p_n, answer a_1 ... a_T   ->   p_1 ... p_n a_1 ... a_T-1,  whose logits at p_n, a_1 ... a_T-1 predict
                                                                              a_1, a_2 ... a_T

The last token of an answer is predicted and never read. In `forced` prompts `last` and every other named position stay
on the prompt (`last` predicts the first token alone); the position `answering` is all tokens that predict one of the
answer's. On prompts by themselves `answering` is `last`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs
from workbench.tasks.counterparts import refuse_unequal
from workbench.tasks.positions import ANSWERING
from workbench.values import metrics

BATCH = 64
Edits = Callable[[PromptPairs], Mapping[str, hooks.Edit]]
"""The edits of a run, from the prompts with their answers."""


def require_continuable(pairs: PromptPairs) -> Int[Tensor, "batch token"]:
    """All answer tokens of prompts that can be continued. Errors: `InputError` for pairs encoded without `multi_token`,
    and for prompts of unequal length padded on the right (an answer could not follow its prompt)."""
    if pairs.answer_tokens is None:
        raise InputError(
            "these pairs hold first tokens only; encode them with `multi_token=True` to read whole answers."
        )
    refuse_unequal(pairs.counterparts, "an answer after both prompts")
    if not pairs.mask[:, -1].all():
        raise InputError(
            "prompts of unequal length must be padded on the left to be continued; set `padding_side` to left."
        )
    return pairs.answer_tokens


def forced(pairs: PromptPairs, tokens: Int[Tensor, "batch token"] | None = None) -> PromptPairs:
    """Both prompts with all but the last of the answer's tokens after them; `tokens`: another answer (a model's own) of
    as many tokens, padded with -1.

    `answer_tokens` are then what the position `answering` predicts. Errors: as `require_continuable`, and for pairs
    that are forced already or have a position `answering` of their own.
    """
    if ANSWERING in pairs.positions:
        raise InputError(
            f"these prompts have a position {ANSWERING!r}, the name of the tokens that an answer is read from; give "
            "yours another name, and append answers once."
        )
    right = require_continuable(pairs)
    ids = right if tokens is None else tokens.to(right.device)
    real, before = ids >= 0, pairs.clean.shape[1] - 1
    read, inside = ids[:, :-1].clamp(min=0), real[:, :-1]
    nothing = torch.zeros_like(inside)
    answering = torch.cat([torch.zeros_like(pairs.mask[:, :before]), real], 1)
    return replace(
        pairs,
        clean=torch.cat([pairs.clean, read], 1),
        corrupt=torch.cat([pairs.corrupt, read], 1),
        mask=torch.cat([pairs.mask, inside], 1),
        answers=ids[:, 0],
        answer_tokens=ids,
        positions={
            **{name: torch.cat([where, nothing], 1) for name, where in pairs.positions.items()},
            ANSWERING: answering,
        },
        teacher=None if pairs.teacher is None else forced(pairs.teacher),
    )


def answer_columns(pairs: PromptPairs) -> int | None:
    """How many of the last columns predict answer tokens in forced prompts; None for prompts by themselves."""
    return None if pairs.answer_tokens is None or ANSWERING not in pairs.positions else pairs.answer_tokens.shape[1]


def per_token(pairs: PromptPairs) -> tuple[Bool[Tensor, "batch token"], Float[Tensor, " tokens"]]:
    """(which of forced prompts' last columns predict a token, the weight of each such token in a mean over prompts).

    A prompt's tokens share its weight, so that every prompt counts alike however long its answer is, and means of equal
    pieces of a batch are the batch's.
    """
    assert pairs.answer_tokens is not None
    real = pairs.answer_tokens >= 0
    share = (1 / (real.sum(1, keepdim=True) * len(real))).expand(real.shape)
    return real, share[real]


@torch.no_grad()
def answer_logits(
    model: HookedModel, pairs: PromptPairs, *, batch: int = BATCH, edits: Edits = lambda part: {}
) -> Float[Tensor, "batch token d_vocab"]:
    """Logits that predict each token of the right answers, given the prompt and the tokens before it."""
    model.require_eval()
    logits = []
    for rows in pairs.batches(batch):
        part = forced(rows)
        with hooks.edit(model.model, dict(edits(part))):
            logits.append(model.last_logits(part.clean, part.mask, answer_columns(part) or 1))
    return torch.cat(logits)


def whole_answers_right(
    model: HookedModel, pairs: PromptPairs, *, batch: int = BATCH, edits: Edits = lambda part: {}
) -> Bool[Tensor, " batch"]:
    """Which answers are right in all their tokens, each the likeliest of the vocabulary given the prompt and the right
    tokens before it.

    That is the case just where greedy decoding gives the answer (by induction over its tokens), so this is the accuracy
    of generation, from one forward. Errors: as `require_continuable`.
    """
    tokens = require_continuable(pairs)
    logits = answer_logits(model, pairs, batch=batch, edits=edits)
    return metrics.sequence_accuracy(logits, tokens, tokens >= 0).bool()


@torch.no_grad()
def greedy_answers(model: HookedModel, pairs: PromptPairs, *, batch: int = BATCH) -> Int[Tensor, "batch token"]:
    """The model's own answers by greedy decoding, of as many tokens as the right ones (padded with -1).

    A model's answer is not known to end; it is cut where the right one ends. Errors: as `require_continuable`.
    """
    require_continuable(pairs)
    model.require_eval()
    return torch.cat([_decoded(model, part) for part in pairs.batches(batch)])


def _decoded(model: HookedModel, pairs: PromptPairs) -> Int[Tensor, "batch token"]:
    wanted = require_continuable(pairs) >= 0
    tokens = torch.full(wanted.shape, -1, dtype=pairs.clean.dtype, device=pairs.clean.device)
    for step in range(wanted.shape[1]):
        clean = torch.cat([pairs.clean, tokens[:, :step].clamp(min=0)], 1)
        best = model.final_logits(clean, torch.cat([pairs.mask, wanted[:, :step]], 1)).argmax(-1)
        tokens[:, step] = torch.where(wanted[:, step], best, -1)
    return tokens
