"""Orthogonal Procrustes similarity: how well Y is X, rotated and rescaled.

    s(X, Y) = ||X^T Y||_* / (||X||_F ||Y||_F)   of centered X, Y
    ||.||_* = sum of singular values (the largest tr(Q^T X^T Y) over rotations Q)

1 - s is half the squared Procrustes distance of X and Y at unit norm (Ding, Denain & Steinhardt 2021, section 2;
Williams et al. 2021), and 1 - s^2 is scipy's `procrustes` disparity. 1: equal up to rotation, reflection, scale and
translation. Not invariant to other linear maps. Unrelated rows do not give 0: at m not far above p and q the value is
high, as with biased CKA, so read it beside its shuffled floor.
"""

import torch

from workbench.similarity.rows import Features, Mask, Others, Value, nan_stays_nan, quotient, rows_counted, standardised


@nan_stays_nan
def procrustes(x: Features, y: Others, *, mask: Mask | None = None) -> Value:
    """Similarity in [0, 1] of X [*batch m p] and Y [*batch m q], symmetric; the narrower one counts as padded with
    zeros. 0 for constant input.

    Errors: `InputError` on fewer than 2 examples.
    """
    rows_counted(x, mask, least=2, measure="Procrustes similarity")
    (x, x_varies), (y, y_varies) = standardised(x, mask), standardised(y, mask)
    nuclear = torch.linalg.svdvals(x.mT @ y).sum(-1)
    return quotient(nuclear, x.square().sum((-2, -1)), y.square().sum((-2, -1)), x_varies & y_varies)
