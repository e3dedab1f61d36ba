"""Canonical correlations: SVCCA (Raghu et al. 2017) and projection-weighted CCA (Morcos, Raghu & Bengio 2018).

    rho_i = singular values of Q_x^T Q_y,  Q_x, Q_y orthonormal bases of the leading principal components
    of centered X and Y
    SVCCA = mean of rho over min(k_x, k_y)
    PWCCA = sum_i a_i rho_i / sum_i a_i,  a_i = sum_j |<Q_x u_i, x_j>| over the columns x_j of X

`keep` is the share of variance whose components are kept (k_x, k_y of them). Where k_x + k_y > m - 1 at least k_x + k_y
- m + 1 correlations are 1 whatever the data: CCA needs many examples, so read it beside its shuffled floor. PWCCA's
weights come from X (the student): it is not symmetric. In the gradient the principal directions and the weights stand
still (their own derivatives divide by gaps between singular values); the whitening does not, so the correlations of the
kept subspaces have their exact gradient.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import InputError
from workbench.similarity.rows import Features, Mask, Others, Value, nan_stays_nan, rows_counted, standardised

Basis = Float[Tensor, "*batch m k"]


@nan_stays_nan
def svcca(x: Features, y: Others, *, keep: float = 0.99, mask: Mask | None = None) -> Value:
    """Mean canonical correlation of the kept components, in [0, 1], symmetric; 0 for constant input.

    Invariant to rotation, scale and translation; to any invertible map only where every component is kept (`keep=1`).
    Errors: `InputError` on fewer than 3 examples, and on a `keep` outside (0, 1].
    """
    correlations, counts, defined, _ = _canonical(x, y, keep, mask)
    return torch.where(defined, correlations.sum(-1) / counts.clamp(min=1), 0.0)


@nan_stays_nan
def pwcca(x: Features, y: Others, *, keep: float = 1.0, mask: Mask | None = None) -> Value:
    """Canonical correlations weighted by how much of X each direction carries, in [0, 1]; 0 for constant input.

    Invariant to every invertible linear map of Y (with `keep=1`), to scale and translation of X; not to a rotation of
    X, whose columns the weights are summed over. Errors: as `svcca`.
    """
    correlations, _, defined, weights = _canonical(x, y, keep, mask)
    total = weights.sum(-1)
    return torch.where(defined, (weights * correlations).sum(-1) / torch.where(defined, total, 1.0), 0.0)


def _canonical(
    x: Features, y: Others, keep: float, mask: Mask | None
) -> tuple[Float[Tensor, "*batch k"], Value, Bool[Tensor, "*batch"], Float[Tensor, "*batch k"]]:
    """Correlations, how many there are (the rest are 0), whether they are defined, and the weights of PWCCA."""
    if not 0 < keep <= 1:
        raise InputError(f"`keep` is a share of variance in (0, 1], not {keep}; 0.99 is SVCCA's own.")
    rows_counted(x, mask, least=3, measure="CCA")
    (x, x_varies), (y, y_varies) = standardised(x, mask), standardised(y, mask)
    (a, a_kept), (b, b_kept) = _orthonormal(x, keep), _orthonormal(y, keep)
    product = a.mT @ b
    u, _, vh = torch.linalg.svd(product.detach(), full_matrices=False)
    counts = torch.minimum(a_kept.sum(-1), b_kept.sum(-1)).to(x.dtype)
    real = torch.arange(u.shape[-1], device=x.device) < counts[..., None]
    correlations = torch.where(real, (u * (product @ vh.mT)).sum(-2), 0.0)
    weights = torch.where(real, ((a @ u).mT @ x).detach().abs().sum(-1), 0.0)
    return correlations, counts, x_varies & y_varies, weights


def _orthonormal(x: Features, keep: float) -> tuple[Basis, Bool[Tensor, "*batch k"]]:
    """An orthonormal basis of the leading principal components of centered X (columns of 0 for those left out), and
    which are kept."""
    _, sizes, directions = torch.linalg.svd(x.detach(), full_matrices=False)
    variance = sizes.square()
    before = variance.cumsum(-1) - variance
    rounding = sizes[..., :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    large = sizes > rounding
    if keep < 1:
        large = large & (before < keep * variance.sum(-1, keepdim=True))
    components = x @ directions.mT * torch.where(large, 1 / torch.where(large, sizes, 1.0), 0.0)[..., None, :]
    gram = components.mT @ components + torch.diag_embed((~large).to(x.dtype))
    whitening = torch.linalg.cholesky(gram)
    return torch.linalg.solve_triangular(whitening, components.mT, upper=False).mT, large
