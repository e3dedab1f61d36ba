"""CKA on Gram matrices: the RBF kernel, and any kernel of the user's own.

    K_ij = exp(-|x_i - x_j|^2 / (2 s^2)),
    s^2 = fraction^2 * median over i < j of |x_i - x_j|^2  (Kornblith et al. 2019, section 4)

The bandwidth s is a fraction of the median distance, so that the value does not depend on scale; it stands in the
gradient. With centered matrices A, B both estimators are a cosine, sum(A B) / sqrt(sum(A A) sum(B B)): biased A = H K
H; debiased A = the U-centered K (Szekely & Rizzo 2014, eq 2.5), whose product is the unbiased HSIC of Song et al. 2012.
Rows that are all equal, or equally far apart, have no CKA: the stated result is 0. So it is where the median distance
is 0 (over half of the pairs of rows coincide), which leaves no bandwidth.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.similarity.cka import Estimator, fewest_rows
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

Gram = Float[Tensor, "*batch m m"]


@nan_stays_nan
def rbf_cka(
    x: Features, y: Others, *, estimator: Estimator = "biased", fraction: float = 0.5, mask: Mask | None = None
) -> Value:
    """CKA with RBF kernels of bandwidth `fraction` times the median distance (each side its own). Errors: `InputError`
    on too few rows (as `linear_cka`) and on a fraction that is not above 0."""
    rows_counted(x, mask, least=fewest_rows(estimator), measure=f"{estimator} CKA")
    return gram_cka(
        rbf_gram(x, fraction=fraction, mask=mask),
        rbf_gram(y, fraction=fraction, mask=mask),
        estimator=estimator,
        mask=mask,
    )


def rbf_gram(x: Features, *, fraction: float = 0.5, mask: Mask | None = None) -> Gram:
    """K [*batch m m]; all ones where the rows do not vary, or their median distance is 0."""
    centered, varies = standardised(x, mask)
    distances = squared_distances(centered)
    return rbf(distances, torch.where(varies, median_of_pairs(distances, mask), 0.0), fraction)


def rbf(distances: Gram, median: Value, fraction: float) -> Gram:
    """exp(-distances / (2 fraction^2 median)) of squared distances; all ones where the median is 0."""
    if fraction <= 0:
        raise InputError(
            f"the bandwidth is a fraction above 0 of the median distance, not {fraction}; 0.2 to 1 are usual."
        )
    defined = (median > 0)[..., None, None]
    scale = torch.where(defined, 2 * fraction**2 * median[..., None, None], 1.0)
    return torch.where(defined, (-distances / scale).exp(), 1.0)


def squared_distances(x: Features) -> Gram:
    """|x_i - x_j|^2, exactly 0 on the diagonal."""
    k = x @ x.mT
    norms = k.diagonal(dim1=-2, dim2=-1)
    return (norms[..., :, None] + norms[..., None, :] - 2 * k) * (
        1 - torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    )


def median_of_pairs(distances: Gram, mask: Mask | None) -> Value:
    """Median over pairs i < j of rows that count (the mean of the middle two when they are even in number)."""
    i, j = pairs_of_rows(distances)
    values = distances[..., i, j]
    if mask is None:
        count = torch.full(values.shape[:-1], values.shape[-1], device=values.device)
    else:
        values = torch.where(mask[..., i] & mask[..., j], values, torch.inf)
        count = (mask[..., i] & mask[..., j]).sum(-1)
    ordered = values.sort(-1).values
    lower, upper = (ordered.gather(-1, at[..., None])[..., 0] for at in ((count - 1).clamp(min=0) // 2, count // 2))
    return (lower + upper) / 2


def pairs_of_rows(distances: Gram) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """The indices of all pairs i > j, each once."""
    m = distances.shape[-1]
    i, j = torch.tril_indices(m, m, -1, device=distances.device)
    return i, j


def gram_cka(k: Gram, l: Gram, *, estimator: Estimator = "biased", mask: Mask | None = None) -> Value:
    """CKA of two Gram matrices over the same examples, differentiable in both. Errors: `InputError` on too few
    examples."""
    m = rows_counted(k, mask, least=fewest_rows(estimator), measure=f"{estimator} CKA")
    (a, a_varies), (b, b_varies) = (centered_gram(gram, m, estimator, mask) for gram in (k, l))
    xy, xx, yy = ((one * other).sum((-2, -1)) for one, other in ((a, b), (a, a), (b, b)))
    return quotient(xy, xx, yy, a_varies & b_varies)


def centered_gram(
    k: Gram, m: Count, estimator: Estimator, mask: Mask | None = None
) -> tuple[Gram, Bool[Tensor, "*batch"]]:
    """A with sum(A B) = HSIC times a factor of m, and whether it stands above the rounding of K.

    Biased: H K H. Debiased: K~ - rows / (m-2) - columns / (m-2) + total / ((m-1)(m-2)) off the diagonal, with K~ = K
    without its diagonal.
    """
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    present = torch.ones_like(k) if mask is None else (mask[..., :, None] & mask[..., None, :]).to(k.dtype)
    if estimator == "debiased":
        present = present * (1 - torch.eye(k.shape[-1], dtype=k.dtype, device=k.device))
    k = torch.where(present > 0, k, 0.0)
    one, two = (m, m) if estimator == "biased" else (m - 2, m - 1)
    rows = k.sum(-1) / (one if isinstance(one, int) else one[..., None])
    total = rows.sum(-1) / two
    a = (k - rows[..., :, None] - rows[..., None, :] + total[..., None, None]) * present
    return a, ~(
        a.detach().square().sum((-2, -1)) <= (16 * torch.finfo(k.dtype).eps) ** 2 * k.detach().square().sum((-2, -1))
    )


@nan_stays_nan_pairwise
def pairwise_rbf_cka(
    x: Float[Tensor, "a m p"], y: Float[Tensor, "b m q"], *, estimator: Estimator = "biased", fraction: float = 0.5
) -> Float[Tensor, "a b"]:
    """RBF CKA of every X with every Y: each Gram matrix once, then one matrix product of the centered ones."""
    m = rows_counted(x, None, least=fewest_rows(estimator), measure=f"{estimator} CKA")
    (a, a_varies), (b, b_varies) = (centered_gram(rbf_gram(side, fraction=fraction), m, estimator) for side in (x, y))
    a, b = a.flatten(1), b.flatten(1)
    xy = a @ b.mT
    xx, yy = a.square().sum(-1)[:, None].expand_as(xy), b.square().sum(-1)[None].expand_as(xy)
    return quotient(xy, xx, yy, a_varies[:, None] & b_varies[None])
