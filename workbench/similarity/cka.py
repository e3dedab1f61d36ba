"""Centered kernel alignment with the linear kernel (Kornblith et al. 2019; eq 1 and 2 of the paper), biased and
debiased.

    K = X X^T, L = Y Y^T, H = I - 11^T/m, HSIC(K, L) = tr(K H L H) / (m-1)^2,
    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

X [m p], Y [m q]: m examples, p and q features. The biased estimator is near 1 for unrelated X and Y when m is not far
above p and q; the debiased one (unbiased HSIC of Song et al. 2012) is 0 in expectation and may be negative. Neither is
clamped: a clamp has no gradient. Computation is in float32 at least. Constant input (no variance) has no CKA: the
stated result is 0, with zero gradient; so it is for the debiased estimator where all rows are equally far apart, which
it takes for no structure at all.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.similarity.names import Estimator
from workbench.similarity.rows import (
    Count,
    Features,
    Mask,
    Others,
    Value,
    nan_stays_nan,
    nan_stays_nan_pairwise,
    quotient,
    rows_counted,
    standardised,
)

ROWS = 64
"""Rows of a Gram matrix that are computed at a time for all sets."""


@nan_stays_nan
def linear_cka(x: Features, y: Others, *, estimator: Estimator = "biased", mask: Mask | None = None) -> Value:
    """CKA of X [*batch m p] and Y [*batch m q], differentiable in both.

    Computed in feature space (`||Y^T X||^2`) or on Gram matrices, whichever is smaller; the value is the same. Rows
    that `mask` [*batch m] leaves out count for nothing. Errors: `InputError` when the debiased estimator gets fewer
    than 4 examples, the biased one fewer than 2. Source: Kornblith et al. 2019; debiased: Song et al. 2012, Nguyen et
    al. 2021.
    """
    m = rows_counted(x, mask, least=fewest_rows(estimator), measure=f"{estimator} CKA")
    (x, x_varies), (y, y_varies) = standardised(x, mask), standardised(y, mask)
    xy, xx, yy = (hsic(a, b, m, estimator) for a, b in ((x, y), (x, x), (y, y)))
    return quotient(xy, xx, yy, x_varies & y_varies & _resolved(x, xx, m, estimator) & _resolved(y, yy, m, estimator))


def _resolved(x: Features, own: Value, m: Count, estimator: Estimator) -> Bool[Tensor, "*batch"]:
    """Whether the debiased HSIC of X with itself stands above the rounding of its terms: rows that are all equally far
    apart have none."""
    if estimator == "biased":
        return torch.ones_like(own, dtype=torch.bool)
    return own.detach() * (m * (m - 3)) > 64 * torch.finfo(x.dtype).eps * x.detach().square().sum(-1).square().sum(-1)


def fewest_rows(estimator: Estimator) -> int:
    """Examples below which an estimator is not defined."""
    return 4 if estimator == "debiased" else 2


def _product_norm(x: Features, y: Others) -> Value:
    """||Y^T X||_F^2 = tr(K L), by whichever of the two products is smaller."""
    m, p, q = x.shape[-2], x.shape[-1], y.shape[-1]
    if p * q <= m * m:
        return (y.mT @ x).square().sum((-2, -1))
    return ((x @ x.mT) * (y @ y.mT)).sum((-2, -1))


def hsic(x: Features, y: Others, m: Count, estimator: Estimator) -> Value:
    """HSIC (linear kernel) of centered features with m rows that count."""
    k, l = x.square().sum(-1), y.square().sum(-1)
    return _estimate(_product_norm(x, y), (k * l).sum(-1), k.sum(-1) * l.sum(-1), m, estimator)


def _estimate(trace: Value, cross: Value, sums: Value, m: Count, estimator: Estimator) -> Value:
    """HSIC from tr(K L), diag(K) . diag(L) and tr(K) tr(L) of centered features.

    Biased: tr(K L) / (m-1)^2, since H K H = K. Debiased (Song et al. 2012, eq 5), with zeroed diagonals K~, L~,

        [tr(K~ L~) + 1^T K~ 1 1^T L~ 1 / ((m-1)(m-2)) - 2/(m-2) 1^T K~ L~ 1] / (m (m-3)):

    centered rows sum to zero, so K 1 = 0 and K~ 1 = -diag(K), and every term needs only these three numbers.
    """
    if estimator == "biased":
        return trace / (m - 1) ** 2
    return (trace - cross + sums / ((m - 1) * (m - 2)) - 2 / (m - 2) * cross) / (m * (m - 3))


def shuffled_floor(x: Features, y: Others, *, order: Tensor, estimator: Estimator = "biased") -> Value:
    """CKA of X with the rows of Y in another order [m]: what two unrelated sets of this shape give. Report it beside
    every CKA."""
    return linear_cka(x, y[..., order, :], estimator=estimator)


@nan_stays_nan_pairwise
def pairwise_linear_cka(
    x: Float[Tensor, "a m p"],
    y: Float[Tensor, "b m q"],
    *,
    estimator: Estimator = "biased",
    mask: Bool[Tensor, " m"] | None = None,
) -> Float[Tensor, "a b"]:
    """CKA of every X with every Y, each self-term once. One mask for all pairs. Errors as `linear_cka`."""
    if mask is not None:
        x, y = x[:, mask], y[:, mask]
    rows_counted(x, None, least=fewest_rows(estimator), measure=f"{estimator} CKA")
    (x, x_varies), (y, y_varies) = standardised(x), standardised(y)
    xy, xx, yy = pairwise_hsic(x, y, estimator)
    m = x.shape[-2]
    x_varies, y_varies = x_varies & _resolved(x, xx[:, 0], m, estimator), y_varies & _resolved(y, yy[0], m, estimator)
    return quotient(xy, xx, yy, x_varies[:, None] & y_varies[None])


def pairwise_hsic(
    x: Float[Tensor, "a m p"], y: Float[Tensor, "b m q"], estimator: Estimator
) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC of every X with every Y, of X with itself and of Y with itself, each [a b], of centered features."""
    m, trace = x.shape[-2], pairwise_traces(x, y)
    k, l = x.square().sum(-1), y.square().sum(-1)
    xy = _estimate(trace, k @ l.mT, k.sum(-1)[:, None] * l.sum(-1)[None], m, estimator)
    return xy, hsic(x, x, m, estimator)[:, None].expand_as(xy), hsic(y, y, m, estimator)[None].expand_as(xy)


def pairwise_traces(x: Float[Tensor, "a m p"], y: Float[Tensor, "b m q"]) -> Float[Tensor, "a b"]:
    """tr(K L) of every X with every Y, by whichever takes fewer operations: a b p q m in feature space, or half of m^2
    (a p + b q + a b) on Gram matrices, where a pair is a dot product once each set has its matrix (a block of rows at a
    time, the symmetric half of it)."""
    (a, m, p), (b, _, q) = x.shape, y.shape
    if a * b * p * q <= m * (a * p + b * q + a * b) / 2:
        others = y.transpose(0, 1).flatten(1)
        return torch.stack([(one.mT @ others).unflatten(1, y.shape[::2]).square().sum((0, 2)) for one in x])
    total = x.new_zeros(a, b)
    for start in range(0, m, ROWS):
        rows, beyond = slice(start, start + ROWS), slice(start + ROWS, None)
        for columns, weight in ((rows, 1), (beyond, 2)):
            k, l = (each[:, rows] @ each[:, columns].mT for each in (x, y))
            total = total + weight * (k.flatten(1) @ l.flatten(1).mT)
    return total
