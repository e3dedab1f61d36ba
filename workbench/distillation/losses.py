"""The losses of circuit distillation, pure functions (eq 6, 7 of the paper):

    L = L_task(y, y_hat) + lambda * SUM over matched pairs (1 - CKA(K_s, K_t))

A sum over pairs, not a mean (which is a setting), of CKA or any other measure of `workbench.similarity`. L_task is
cross-entropy on the teacher's labels; beside it stand cross-entropy on the ground truth, KL on the teacher's
distribution (the classical distillation loss), its reverse, and the Jensen-Shannon divergence.

With answers of one token all are read at the prompt's last token; with longer ones (`TrainingConfig.answers`) at every
token that predicts one of the answer's, as a mean over prompts of each one's mean over its answer.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from workbench.distillation.config import Pairs
from workbench.distillation.top_logits import TopLogits, over_outcomes
from workbench.similarity.cka import Estimator
from workbench.similarity.measures import NONE, Measure, Options, similarity
from workbench.values.metrics import log_probability

Scalar = Float[Tensor, ""]


Weights = Float[Tensor, " batch"] | None
"""Of each row in a loss; None: a mean over rows. With answers of several tokens a row is a token, and the weights
(`workbench.tasks.forcing.per_token`) make the loss a mean over prompts of each one's mean over its answer."""


def cross_entropy(
    logits: Float[Tensor, "batch d_vocab"], labels: Int[Tensor, " batch"], weights: Weights = None
) -> Scalar:
    """Mean cross-entropy in nats, in float32."""
    if weights is None:
        return functional.cross_entropy(logits.float(), labels)
    return (functional.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()


def _divergence(first: Tensor, second: Tensor, weights: Weights) -> Scalar:
    """Mean KL(second || first) of log-probabilities."""
    if weights is None:
        return functional.kl_div(first, second, reduction="batchmean", log_target=True)
    return (functional.kl_div(first, second, reduction="none", log_target=True).sum(-1) * weights).sum()


def cross_entropy_of_sets(logits: Float[Tensor, "batch d_vocab"], answers: Int[Tensor, "batch *member"]) -> Scalar:
    """Mean over prompts of -log of the mass of a set of answers, in nats, in float32: whichever member the student
    prefers is right. Of single answers it is the cross-entropy."""
    if answers.ndim == 1:
        return cross_entropy(logits, answers)
    return -log_probability(logits.float(), answers, answers).mean()


def _log_probabilities(
    logits: Float[Tensor, "batch d_vocab"], teacher: Float[Tensor, "batch d_vocab"] | TopLogits, temperature: float
) -> tuple[Tensor, Tensor]:
    """(student, teacher) over the vocabulary, or over what is kept of the teacher."""
    if isinstance(teacher, TopLogits):
        return over_outcomes(logits, teacher, temperature=temperature)
    student, target = (value.float().div(temperature).log_softmax(-1) for value in (logits, teacher))
    return student, target


def kl_to_teacher(
    logits: Float[Tensor, "batch d_vocab"],
    teacher: Float[Tensor, "batch d_vocab"] | TopLogits,
    *,
    temperature: float = 1.0,
    weights: Weights = None,
) -> Scalar:
    """Mean KL(teacher || student) at a temperature, times its square (Hinton et al. 2015), in nats."""
    student, target = _log_probabilities(logits, teacher, temperature)
    return _divergence(student, target, weights) * temperature**2


def reverse_kl_to_teacher(
    logits: Float[Tensor, "batch d_vocab"],
    teacher: Float[Tensor, "batch d_vocab"] | TopLogits,
    *,
    temperature: float = 1.0,
    weights: Weights = None,
) -> Scalar:
    """Mean KL(student || teacher) at a temperature, times its square, in nats (Gu et al. 2024, MiniLLM): seeks the
    teacher's modes."""
    student, target = _log_probabilities(logits, teacher, temperature)
    return _divergence(target, student, weights) * temperature**2


def jensen_shannon(
    logits: Float[Tensor, "batch d_vocab"],
    teacher: Float[Tensor, "batch d_vocab"] | TopLogits,
    *,
    temperature: float = 1.0,
    weights: Weights = None,
) -> Scalar:
    """Mean Jensen-Shannon divergence at a temperature, times its square, in nats: (KL(p || m) + KL(q || m)) / 2 with m
    = (p + q) / 2.

    Symmetric; at most ln 2 (times the squared temperature).
    """
    student, target = _log_probabilities(logits, teacher, temperature)
    middle = torch.logaddexp(student, target) - math.log(2)
    sides = [_divergence(middle, side, weights) for side in (student, target)]
    return (sides[0] + sides[1]) / 2 * temperature**2


DIVERGENCES: Mapping[str, Callable[..., Scalar]] = {
    "kl_teacher": kl_to_teacher,
    "reverse_kl_teacher": reverse_kl_to_teacher,
    "jsd_teacher": jensen_shannon,
}
"""The task losses on the teacher's distribution, by name."""


def alignment_loss(
    rows: Sequence[tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]]],
    *,
    estimator: Estimator,
    measure: Measure = "linear_cka",
    options: Options = NONE,
    pairs: Pairs = "sum",
    weights: Sequence[float] | None = None,
) -> tuple[Scalar, Float[Tensor, " pairs"]]:
    """SUM (or mean) over pairs of weight * (1 - similarity), and each pair's similarity. `rows`: (student, teacher) of
    each pair, rows of the same prompts in the same order. `weights`: of the pairs; None: all 1.

    Pairs of equal shape are computed in one batch.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (x, y) in enumerate(rows):
        groups.setdefault((*x.shape, *y.shape), []).append(index)
    values: list[Tensor] = [torch.empty(0)] * len(rows)
    for members in groups.values():
        x, y = (torch.stack([rows[i][side] for i in members]) for side in (0, 1))
        batched = similarity(x, y, measure=measure, estimator=estimator, options=options)
        for place, index in enumerate(members):
            values[index] = batched[place]
    ckas = torch.stack(values)
    parts = 1 - ckas
    if weights is not None and any(weight != 1 for weight in weights):
        parts = parts * parts.new_tensor(weights)
    return parts.sum() if pairs == "sum" else parts.mean(), ckas.detach()
