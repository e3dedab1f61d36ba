"""CKA of more examples than fit in memory: the unbiased HSIC summed over minibatches (Nguyen, Raghu & Kornblith 2021,
eq 4).

    CKA = sum_b HSIC_1(K_b, L_b) / sqrt(sum_b HSIC_1(K_b, K_b) * sum_b HSIC_1(L_b, L_b))

HSIC_1 is unbiased, so each minibatch estimates the same number whatever its size, and the sums converge to the CKA of
the population; the mean of biased CKAs does not. One minibatch gives the debiased CKA. Scale and RBF bandwidth are
those of the first minibatch.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.similarity.cka import fewest_rows, hsic, pairwise_hsic
from workbench.similarity.kernels import centered_gram, median_of_pairs, rbf, squared_distances
from workbench.similarity.rows import Mask, Value, center, filled, finite, largest, only_where, quotient, rows_counted

Kernel = Literal["linear", "rbf"]


class MinibatchCka:
    """Sums of HSIC over minibatches: `add` each, then `value()`.

    X [*batch m p] against Y [*batch m q], or with `pairwise` every X [a m p] against every Y [b m q] (linear kernel, no
    mask). Differentiable in all minibatches that were added.
    """

    def __init__(self, *, kernel: Kernel = "linear", fraction: float = 0.5, pairwise: bool = False) -> None:
        if pairwise and kernel != "linear":
            raise InputError(
                "all pairs over minibatches are there for the linear kernel only; leave `pairwise` out and add pair by "
                "pair."
            )
        self.kernel, self.fraction, self.pairwise = kernel, fraction, pairwise
        self._scales: dict[str, Tensor] = {}
        self._medians: dict[str, Tensor] = {}
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor, mask: Mask | None = None) -> None:
        """Another minibatch. Errors: `InputError` when it has fewer than 4 examples, or a mask with `pairwise`."""
        if self.pairwise and mask is not None:
            raise InputError("a mask for all pairs is the same rows for all: leave those rows out of X and Y.")
        (x, x_finite), (y, y_finite) = finite(x, mask), finite(y, mask)
        if self.pairwise and x_finite is not None:
            x_finite = x_finite[:, None]
        xy, xx, yy = (only_where(each, x_finite, y_finite) for each in self._hsics(x, y, mask))
        old = self._sums
        self._sums = (xy, xx, yy) if old is None else (old[0] + xy, old[1] + xx, old[2] + yy)

    def _hsics(self, x: Tensor, y: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor, Tensor]:
        m = rows_counted(x, mask, least=fewest_rows("debiased"), measure="minibatch CKA")
        a, b = self._centered("x", x, mask), self._centered("y", y, mask)
        if self.pairwise:
            return pairwise_hsic(a, b, "debiased")
        if self.kernel == "linear":
            return hsic(a, b, m, "debiased"), hsic(a, a, m, "debiased"), hsic(b, b, m, "debiased")
        (k, _), (l, _) = (
            centered_gram(self._gram(side, value, mask), m, "debiased", mask) for side, value in (("x", a), ("y", b))
        )
        xy, xx, yy = ((one * other).sum((-2, -1)) / (m * (m - 3)) for one, other in ((k, l), (k, k), (l, l)))
        return xy, xx, yy

    def value(self) -> Tensor:
        """The CKA of all that was added; 0 where one side did not vary. Errors: `InputError` when nothing was added."""
        if self._sums is None:
            raise InputError("no minibatch was added; call `add` before `value`.")
        return quotient(*self._sums, torch.ones_like(self._sums[0], dtype=torch.bool))

    def _centered(self, side: str, x: Tensor, mask: Mask | None) -> Tensor:
        x = filled(x, mask)
        scaled = x / self._scales.setdefault(side, largest(x))
        centered = center(scaled, mask)
        noise = (16 * torch.finfo(x.dtype).eps) ** 2 * scaled.detach().square().sum((-2, -1), keepdim=True)
        return torch.where(centered.detach().square().sum((-2, -1), keepdim=True) <= noise, 0.0, centered)

    def _gram(self, side: str, centered: Tensor, mask: Mask | None) -> Tensor:
        distances = squared_distances(centered)
        median = self._medians.setdefault(side, median_of_pairs(distances, mask).detach())
        return rbf(distances, median, self.fraction)


def minibatch_cka(
    minibatches: Iterable[tuple[Tensor, Tensor]], *, kernel: Kernel = "linear", fraction: float = 0.5
) -> Value:
    """CKA over (X, Y) minibatches of any size of at least 4 rows."""
    sums = MinibatchCka(kernel=kernel, fraction=fraction)
    for x, y in minibatches:
        sums.add(x, y)
    return sums.value()
