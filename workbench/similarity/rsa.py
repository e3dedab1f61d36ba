"""Representational similarity analysis (Kriegeskorte, Mur & Bandettini 2008): do X and Y call the same examples alike?

    D_ij = distance of rows i and j,   RSA = Pearson's correlation of the m (m-1) / 2 entries i < j of the two matrices

Distances: `sqeuclidean` (the default: |x_i - x_j|^2, smooth where rows coincide, invariant to rotation, isotropic scale
and translation of X) or `correlation` (1 - Pearson's correlation of the two rows over features: Kriegeskorte's;
invariant to each row's own scale and offset, not to rotation or translation of X; a row without variance correlates 0
with all). Pearson's correlation, since Spearman's has no gradient.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.similarity.kernels import Gram, pairs_of_rows, squared_distances
from workbench.similarity.rows import (
    Features,
    Mask,
    Others,
    Value,
    filled,
    largest,
    nan_stays_nan,
    quotient,
    rows_counted,
    standardised,
)

Distance = Literal["sqeuclidean", "correlation"]


@nan_stays_nan
def rsa(x: Features, y: Others, *, distance: Distance = "sqeuclidean", mask: Mask | None = None) -> Value:
    """Correlation in [-1, 1] of the distance matrices of X [*batch m p] and Y [*batch m q], symmetric. 0 where all
    distances are equal.

    Errors: `InputError` on fewer than 3 examples and on an unknown distance.
    """
    rows_counted(x, mask, least=3, measure="RSA")
    a, b = _deviations(_distances(x, distance, mask), mask), _deviations(_distances(y, distance, mask), mask)
    xx, yy = a.square().sum(-1), b.square().sum(-1)
    noise = (64 * torch.finfo(a.dtype).eps) ** 2  # the entries have norm 1 before their mean is taken off
    return quotient((a * b).sum(-1), xx, yy, (xx > noise) & (yy > noise))


def _distances(x: Features, distance: Distance, mask: Mask | None) -> Gram:
    if distance == "sqeuclidean":
        return squared_distances(standardised(x, mask)[0])
    if distance != "correlation":
        raise InputError(f"RSA knows no distance {distance!r}; take sqeuclidean or correlation.")
    x = filled(x, mask)
    x = x / largest(x)
    rows = x - x.mean(-1, keepdim=True)
    varies = rows.detach().square().sum(-1, keepdim=True) > (
        16 * torch.finfo(x.dtype).eps
    ) ** 2 * x.detach().square().sum(-1, keepdim=True)
    rows = torch.where(varies, rows, 0.0) / torch.where(varies, rows.square().sum(-1, keepdim=True), 1.0).sqrt()
    return 1 - rows @ rows.mT


def _deviations(distances: Gram, mask: Mask | None) -> Float[Tensor, "*batch pairs"]:
    """The entries i < j at norm 1, minus their mean; 0 where a row does not count."""
    i, j = pairs_of_rows(distances)
    values = distances[..., i, j]
    present = torch.ones_like(values) if mask is None else (mask[..., i] & mask[..., j]).to(values.dtype)
    square = (values * present).detach().square().sum(-1, keepdim=True)
    values = values * present / torch.where(square > 0, square, 1.0).sqrt()
    return (values - values.sum(-1, keepdim=True) / present.sum(-1, keepdim=True)) * present
