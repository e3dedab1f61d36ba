"""Similarity by the distance of Gram matrices: are the same prompts near each other in both, and as near?

    K = X X^T / tr(X X^T), L = Y Y^T / tr(Y Y^T)   of centered X, Y
    s(X, Y) = 1 - ||K - L||_F^2 / (||K||_F^2 + ||L||_F^2) = 2 <K, L> / (||K||_F^2 + ||L||_F^2)

Linear CKA is the cosine of K and L: it forgives one of them being flatter than the other. The distance does not: s =
CKA * 2 r / (1 + r^2) with r = ||K||_F / ||L||_F, and ||K||_F^2 is one over the participation ratio of X (how many
directions it spreads over). So s is at most CKA, and 1 only for equal geometry up to rotation, scale and translation.
"""

from workbench.similarity.rows import Features, Mask, Others, Value, nan_stays_nan, rows_counted, standardised


@nan_stays_nan
def gram(x: Features, y: Others, *, mask: Mask | None = None) -> Value:
    """Similarity in [0, 1] of X [*batch m p] and Y [*batch m q], symmetric. 0 for constant input.

    Errors: `InputError` on fewer than 2 examples.
    """
    rows_counted(x, mask, least=2, measure="Gram similarity")
    (x, x_varies), (y, y_varies) = standardised(x, mask), standardised(y, mask)
    xy, xx, yy = (_product(a, b) for a, b in ((x, y), (x, x), (y, y)))
    x_trace, y_trace = (value.square().sum((-2, -1)) for value in (x, y))
    defined = x_varies & y_varies
    x_trace, y_trace = (value.where(defined, value.new_ones(())) for value in (x_trace, y_trace))
    spread = xx / x_trace.square() + yy / y_trace.square()
    shared = 2 * xy / (x_trace * y_trace) / spread.where(defined, spread.new_ones(()))
    return shared.where(defined, shared.new_zeros(()))


def _product(x: Features, y: Others) -> Value:
    """<X X^T, Y Y^T> = ||X^T Y||_F^2."""
    return (x.mT @ y).square().sum((-2, -1))
