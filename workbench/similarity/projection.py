"""Cosine and mean squared error through a learned linear projection of X onto Y: can Y be read off X?

    W = (X^T X + r I)^-1 X^T Y,  r = ridge * ||X||^2 / p      of centered X, Y
    MSE similarity = 1 - sum_i |y_i - x_i W_(-i)|^2 / sum_i |y_i - mean_(-i)|^2
    cosine similarity = mean_i cos(x_i W_(-i), y_i - mean_(-i))

The projection is learned by ridge regression in closed form, on the batch at hand, and each row is predicted by the
projection that the *other* rows give (leave-one-out, exact by the hat matrix: e_i / (1 - h_i)). So it needs no
parameters, no optimizer and no checkpoint of its own, it is differentiable, and it cannot fit what it is judged on:
unrelated rows give 0 or less at any m, where in-sample regression gives 1 for m <= p. 1 - MSE similarity is the
normalised error of the usual hint loss (FitNets, Romero et al. 2015). It is directed: X (the student) predicts Y.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.similarity.rows import Features, Mask, Others, Value, nan_stays_nan, rows_counted, standardised


@nan_stays_nan
def projection_mse(x: Features, y: Others, *, ridge: float = 0.01, mask: Mask | None = None) -> Value:
    """Share of Y's variance that X predicts on rows left out: at most 1, below 0 where the mean predicts better. 0 for
    constant input.

    Errors: `InputError` on fewer than 3 examples and on a ridge that is not above 0.
    """
    predicted, target, defined = _left_out(x, y, ridge, mask)
    error, total = ((value).square().sum((-2, -1)) for value in (target - predicted, target))
    return torch.where(defined, 1 - error / torch.where(defined, total, 1.0), 0.0)


@nan_stays_nan
def projection_cosine(x: Features, y: Others, *, ridge: float = 0.01, mask: Mask | None = None) -> Value:
    """Mean cosine in [-1, 1] of each row of Y (from the mean of the others) and its prediction from the other rows. 0
    for constant input.

    Errors: as `projection_mse`.
    """
    predicted, target, defined = _left_out(x, y, ridge, mask)
    square = predicted.square().sum(-1) * target.square().sum(-1)
    lengths = torch.where(square > 0, square, 1.0).sqrt()
    cosines = torch.where(square > 0, (predicted * target).sum(-1) / lengths, 0.0)
    count = x.shape[-2] if mask is None else mask.sum(-1)
    return torch.where(defined, cosines.sum(-1) / count, 0.0)


def _left_out(x: Features, y: Others, ridge: float, mask: Mask | None) -> tuple[Others, Others, Tensor]:
    """Predictions of Y's rows and the rows themselves, each from the mean of the other rows; whether both sides vary.

    With leverage h_i = 1/m + x_i (X^T X + r I)^-1 x_i^T: y_i - prediction = (y_i - x_i W) / (1 - h_i), y_i - mean_(-i)
    = y_i m / (m - 1).
    """
    if ridge <= 0:
        raise InputError(f"the ridge is above 0, not {ridge}; 0.01 of the mean variance is the default.")
    m = rows_counted(x, mask, least=3, measure="similarity through a projection")
    (x, x_varies), (y, y_varies) = standardised(x, mask), standardised(y, mask)
    each = m if isinstance(m, int) else m[..., None, None]
    hat = _hat(x, ridge)
    leverage = hat.diagonal(dim1=-2, dim2=-1)[..., None] + 1 / each
    target = y * each / (each - 1)
    return target - (y - hat @ y) / (1 - leverage), target, x_varies & y_varies


def _hat(x: Features, ridge: float) -> Float[Tensor, "*batch m m"]:
    """X (X^T X + r I)^-1 X^T, by whichever of the two inverses is smaller."""
    m, p = x.shape[-2:]
    shift = (ridge * x.square().sum((-2, -1)) / p)[..., None, None]
    shift = torch.where(shift > 0, shift, 1.0)
    gram = x.mT @ x if p <= m else x @ x.mT
    whitening = torch.linalg.cholesky(gram + shift * torch.eye(min(m, p), dtype=x.dtype, device=x.device))
    half = torch.linalg.solve_triangular(whitening, x.mT if p <= m else gram, upper=False)
    if p <= m:
        return half.mT @ half
    return torch.linalg.solve_triangular(whitening.mT, half, upper=True)
