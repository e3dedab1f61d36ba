"""Scoring answers of several tokens: the sum of the log-probabilities of all their tokens, each given the prompt and
those before it.

    log p(answer | prompt) = sum_t log p(answer_t | prompt, answer_1 ... answer_t-1)

The answer is appended to the prompt and the whole is read once. `continued` gives those sequences as `PromptPairs` in
which the named positions stay where they were, so that whatever edits a run on the prompts (ablation, a patch at a
named position) edits a scored run just so.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs
from workbench.tasks.forcing import require_continuable
from workbench.values import metrics

Which = Literal["answer", "distractor"]
BATCH = 64


def continued(pairs: PromptPairs, which: Which = "answer") -> PromptPairs:
    """The pairs with the answer (or the distractor) after both prompts; `last`, `all` and every other position stay on
    the prompt.

    The mask covers the answer too. Errors: `InputError` for pairs encoded without `multi_token`, and for prompts of
    unequal length padded on the right (the answer could not follow its prompt).
    """
    answers = require_continuable(pairs)
    ids = answers if which == "answer" or pairs.distractor_tokens is None else pairs.distractor_tokens
    real = ids >= 0
    ids = ids.clamp(min=0)
    nothing = torch.zeros_like(real)
    return replace(
        pairs,
        clean=torch.cat([pairs.clean, ids], 1),
        corrupt=torch.cat([pairs.corrupt, ids], 1),
        mask=torch.cat([pairs.mask, real], 1),
        positions={name: torch.cat([where, nothing], 1) for name, where in pairs.positions.items()},
    )


@torch.no_grad()
def sequence_log_probability(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    which: Which = "answer",
    batch: int = BATCH,
    edits: Callable[[PromptPairs], Mapping[str, hooks.Edit]] = lambda part: {},
) -> Float[Tensor, " batch"]:
    """Log-probability (nats) of each whole answer after its clean prompt. `edits` makes the edits of a run from the
    continued pairs of a batch."""
    model.require_eval()
    scores = []
    for rows in pairs.batches(batch):
        part = continued(rows, which)
        with hooks.edit(model.model, dict(edits(part))):
            logits = model.model(part.clean, attention_mask=part.mask.long())
        width = rows.clean.shape[1]
        scores.append(
            metrics.sequence_log_probability(logits[:, width - 1 : -1], part.clean[:, width:], part.mask[:, width:])
        )
    return torch.cat(scores)


def sequence_preference(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    batch: int = BATCH,
    edits: Callable[[PromptPairs], Mapping[str, hooks.Edit]] = lambda part: {},
) -> Float[Tensor, " batch"]:
    """Log-probability of the whole answer minus that of the whole distractor, in nats; positive = the answer is
    preferred.

    Longer sequences are less probable; nothing is divided by length. Choose answers and distractors of equal length, or
    look at both.
    """
    answer, distractor = (
        sequence_log_probability(model, pairs, which=which, batch=batch, edits=edits)
        for which in ("answer", "distractor")
    )
    return answer - distractor
