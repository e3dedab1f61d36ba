"""Logits and answers -> one value per example. Averaging, errors and intervals happen once, in `Scores`.

All take final logits [batch d_vocab] at the answering position; higher is better for each but `kl_divergence`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Metric = Callable[
    [Float[Tensor, "batch d_vocab"], Int[Tensor, " batch"], Int[Tensor, " batch"]], Float[Tensor, " batch"]
]
"""(logits, answers, distractors) -> one value per example."""

Logits = Float[Tensor, "batch d_vocab"]
Ids = Int[Tensor, " batch"]
PerExample = Float[Tensor, " batch"]


def _at(values: Logits, ids: Ids) -> PerExample:
    return values.gather(-1, ids[:, None]).squeeze(-1)


def log_probability(logits: Logits, answers: Ids, distractors: Ids) -> PerExample:
    """Log-probability of the answer, in nats."""
    return _at(logits.log_softmax(-1), answers)


def probability(logits: Logits, answers: Ids, distractors: Ids) -> PerExample:
    """Probability of the answer."""
    return _at(logits.softmax(-1), answers)


def logit_difference(logits: Logits, answers: Ids, distractors: Ids) -> PerExample:
    """Logit of the answer minus logit of the distractor."""
    return _at(logits, answers) - _at(logits, distractors)


def accuracy(logits: Logits, answers: Ids, distractors: Ids) -> PerExample:
    """1 where the answer is the most probable token of the whole vocabulary, else 0."""
    return (logits.argmax(-1) == answers).to(logits.dtype)


def kl_divergence(logits: Logits, reference: Logits) -> PerExample:
    """KL(reference || logits) of the next-token distributions, in nats."""
    target = reference.log_softmax(-1)
    return (target.exp() * (target - logits.log_softmax(-1))).sum(-1)


def sequence_log_probability(
    logits: Float[Tensor, "batch token d_vocab"], tokens: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> PerExample:
    """Log-probability of a whole answer, in nats: the sum over its tokens (True in `mask`) of each one's
    log-probability.

    `logits[:, t]` predict `tokens[:, t]`.
    """
    each = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return torch.where(mask, each, torch.zeros_like(each)).sum(-1)


METRICS: dict[str, Metric] = {
    "log_probability": log_probability,
    "probability": probability,
    "logit_difference": logit_difference,
    "accuracy": accuracy,
}
"""The metrics that a recipe can name."""


def relative_change(patched: Float[Tensor, "*sweep batch"], clean: PerExample) -> Float[Tensor, "*sweep batch"]:
    """(patched - clean) / clean, the score of Prakash et al. for probabilities; NaN where clean is 0."""
    return torch.where(clean == 0, torch.nan, (patched - clean) / clean)
