"""One door to every alignment measure: `similarity(x, y, measure=...)`, one value for each pair of a batch, larger =
more alike.

The loss of a measure is 1 - similarity, so that 1 is its optimum and the paper's 1 - CKA is one of them. Which measure
forgives what:

    measure           rotation  scale  translation  invertible map    symmetric  unrelated rows give
    linear_cka        yes       yes    yes          no                yes        debiased 0, biased > 0 (1 at small m)
    rbf_cka           yes       yes    yes          no                yes        as linear_cka
    procrustes        yes       yes    yes          no                yes        above 0 (high at small m)
    gram              yes       yes    yes          no                yes        above 0 (at most biased linear_cka)
    rsa               yes       yes    yes          no                yes        0 (distance=correlation: scale only)
    svcca             yes       yes    yes          with keep=1       yes        above 0 (1 at m <= p + q)
    pwcca             of Y      yes    yes          of Y              no         above 0 (1 at m <= p + q)
    projection_mse    yes       yes    yes          of X, nearly      no         0 or less
    projection_cosine yes       yes    yes          of X, nearly      no         0 or less
    attention_kl      no        no     no           no                no         1 - KL in nats; of attention patterns

NaN or an infinity among a pair's rows gives NaN, in all of them (`rows.py`).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from workbench.errors import InputError, nearest
from workbench.similarity.attention import attention_kl
from workbench.similarity.cca import pwcca, svcca
from workbench.similarity.cka import linear_cka, pairwise_linear_cka
from workbench.similarity.gram import gram
from workbench.similarity.kernels import pairwise_rbf_cka, rbf_cka
from workbench.similarity.names import Estimator, Measure
from workbench.similarity.procrustes import procrustes
from workbench.similarity.projection import projection_cosine, projection_mse
from workbench.similarity.rows import Features, Mask, Others, Value
from workbench.similarity.rsa import rsa
from workbench.values.scores import Scores

Options = Mapping[str, Any]
"""Settings of a measure by name, e.g. `{"fraction": 0.2}` of rbf_cka; those left out keep the measure's defaults."""
MEASURES: Mapping[str, Callable[..., Tensor]] = {
    "linear_cka": linear_cka,
    "rbf_cka": rbf_cka,
    "procrustes": procrustes,
    "gram": gram,
    "rsa": rsa,
    "svcca": svcca,
    "pwcca": pwcca,
    "projection_mse": projection_mse,
    "projection_cosine": projection_cosine,
    "attention_kl": attention_kl,
}
ESTIMATED = ("linear_cka", "rbf_cka")
"""Measures that `estimator` concerns."""
NONE: Options = MappingProxyType({})


def similarity(
    x: Features,
    y: Others,
    *,
    measure: Measure = "linear_cka",
    estimator: Estimator = "biased",
    mask: Mask | None = None,
    options: Options = NONE,
) -> Value:
    """How alike X [*batch m p] and Y [*batch m q] are, differentiable in X; X is the student where the measure is not
    symmetric.

    `estimator` is that of CKA; `mask` [*batch m] leaves rows out. Errors: `InputError` on unknown options, and as the
    measure's own function.
    """
    return MEASURES[measure](x, y, mask=mask, **_settings(measure, estimator, options))


def _settings(measure: Measure, estimator: Estimator, options: Options) -> dict[str, Any]:
    settings = {"estimator": estimator} if measure in ESTIMATED else {}
    return {**settings, **checked_options(measure, options)}


def checked_options(measure: Measure, options: Options) -> dict[str, Any]:
    """The options in their types, or `InputError` for the first that this measure does not have or that is no such
    value."""
    parameters = inspect.signature(MEASURES[measure]).parameters
    known = [
        name
        for name, each in parameters.items()
        if each.kind is each.KEYWORD_ONLY and name not in ("mask", "estimator")
    ]
    for name in options:
        if name not in known:
            raise InputError(
                f"measure {measure} has no option {name!r}; {nearest(name, known) if known else 'it has none.'}"
            )
    try:
        return {
            name: TypeAdapter(parameters[name].annotation).validate_python(value) for name, value in options.items()
        }
    except ValidationError as error:
        raise InputError(f"options of measure {measure} {dict(options)}: {error.errors()[0]['msg']}.") from None


def shuffled_similarity(
    x: Features,
    y: Others,
    *,
    order: Tensor,
    measure: Measure = "linear_cka",
    estimator: Estimator = "biased",
    options: Options = NONE,
) -> Value:
    """The similarity with the rows of Y in another order [m]: what two unrelated sets of this shape give. Report it
    beside every value."""
    return similarity(x, y[..., order, :], measure=measure, estimator=estimator, options=options)


def pairwise_similarity(
    x: Float[Tensor, "a m p"],
    y: Float[Tensor, "b m q"],
    *,
    measure: Measure = "linear_cka",
    estimator: Estimator = "biased",
    mask: Bool[Tensor, " m"] | None = None,
    options: Options = NONE,
) -> Float[Tensor, "a b"]:
    """Every X against every Y, over the rows of one mask: CKA by matrix products over all pairs at once, the others one
    X at a time."""
    if mask is not None:
        x, y = x[:, mask], y[:, mask]
    settings = _settings(measure, estimator, options)
    if measure == "linear_cka":
        return pairwise_linear_cka(x, y, **settings)
    if measure == "rbf_cka":
        return pairwise_rbf_cka(x, y, **settings)
    return torch.stack([MEASURES[measure](one.expand(len(y), *one.shape), y, **settings) for one in x])


def similarity_scores(
    x: Float[Tensor, "student m p"],
    y: Float[Tensor, "teacher m q"],
    *,
    student: Sequence[str],
    teacher: Sequence[str],
    measure: Measure = "linear_cka",
    estimator: Estimator = "debiased",
    mask: Bool[Tensor, " m"] | None = None,
    options: Options = NONE,
) -> Scores:
    """All pairs of two models' parts (heads, layers) as `Scores` [student teacher] under the names given."""
    values = pairwise_similarity(
        x.detach(), y.detach(), measure=measure, estimator=estimator, mask=mask, options=options
    )
    labels = {"student": tuple(student), "teacher": tuple(teacher)}
    return Scores(values=values, axes=("student", "teacher"), labels=labels, unit=unit(measure, estimator))


def unit(measure: Measure, estimator: Estimator) -> str:
    """What a value is: `debiased CKA`, `biased RBF CKA`, `procrustes similarity`, ..."""
    if measure in ESTIMATED:
        return f"{estimator} {'' if measure == 'linear_cka' else 'RBF '}CKA"
    return f"{measure.replace('_', ' ')} similarity"
