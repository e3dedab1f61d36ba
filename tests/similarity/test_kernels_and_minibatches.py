"""RBF CKA, CKA on given Gram matrices, and CKA summed over minibatches: definitions, an independent library, and
convergence."""

from typing import Any

import numpy as np
import pytest
import torch
from cka.hsic import hsic as library_hsic
from scipy import spatial
from torch import Tensor

from tests.similarity.test_cka import by_definition
from workbench import seeds
from workbench.errors import InputError
from workbench.similarity.cka import linear_cka, pairwise_linear_cka
from workbench.similarity.kernels import gram_cka, pairwise_rbf_cka, rbf_cka, rbf_gram
from workbench.similarity.minibatch import MinibatchCka, minibatch_cka


def gaussian(*shape: int, label: str = "x", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeds.generator(0, label), dtype=dtype)


def related(rows: int = 50) -> tuple[Tensor, Tensor]:
    x = gaussian(rows, 6)
    return x, x @ gaussian(6, 5, label="w") + 2 * gaussian(rows, 5, label="y")


def scipy_gram(x: Tensor, fraction: float) -> Tensor:
    distances = spatial.distance.pdist(x.numpy(), "sqeuclidean")
    return torch.from_numpy(
        spatial.distance.squareform(np.exp(-distances / (2 * fraction**2 * np.median(distances)))) + np.eye(len(x))
    )


@pytest.mark.parametrize("rows", [9, 10, 50])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_rbf_gram_equals_scipys_distances_and_numpys_median(rows: int, fraction: float) -> None:
    x = gaussian(rows, 4)
    torch.testing.assert_close(rbf_gram(x, fraction=fraction), scipy_gram(x, fraction), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_rbf_cka_equals_the_definition_and_an_independent_library(fraction: float) -> None:
    x, y = related()
    k, l = (scipy_gram(value, fraction) for value in (x, y))
    h = torch.eye(50, dtype=x.dtype) - 1 / 50
    a, b = h @ k @ h, h @ l @ h
    biased = float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())
    assert float(rbf_cka(x, y, estimator="biased", fraction=fraction)) == pytest.approx(biased, abs=1e-12)
    xy, xx, yy = library_hsic(k[None], l[None])
    debiased = float(xy / (xx * yy).sqrt())
    assert float(rbf_cka(x, y, estimator="debiased", fraction=fraction)) == pytest.approx(debiased, abs=1e-12)
    assert abs(biased - debiased) > 1e-2
    assert abs(debiased - float(linear_cka(x, y, estimator="debiased"))) > 1e-3, "not the linear kernel"


@pytest.mark.parametrize("estimator", ["biased", "debiased"])
def test_a_wide_kernel_is_the_linear_one(estimator: Any) -> None:
    """exp(-d / s) = 1 - d / s + ..., and a centered matrix of squared distances is -2 times the linear kernel's."""
    x, y = related()
    linear = float(linear_cka(x, y, estimator=estimator))
    assert float(rbf_cka(x, y, estimator=estimator, fraction=300.0)) == pytest.approx(linear, abs=1e-4)
    assert abs(float(rbf_cka(x, y, estimator=estimator, fraction=0.5)) - linear) > 1e-2


@pytest.mark.parametrize("estimator", ["biased", "debiased"])
def test_given_gram_matrices_equal_feature_space(estimator: Any) -> None:
    x, y = related()
    assert float(gram_cka(x @ x.T, y @ y.T, estimator=estimator)) == pytest.approx(
        float(linear_cka(x, y, estimator=estimator)), abs=1e-12
    )
    assert float(gram_cka(x @ x.T, y @ y.T, estimator=estimator)) == pytest.approx(
        float(by_definition(x, y, estimator)), abs=1e-12
    )


@pytest.mark.parametrize("estimator", ["biased", "debiased"])
def test_all_rbf_pairs_equal_a_loop(estimator: Any) -> None:
    x, y = gaussian(3, 30, 4), gaussian(5, 30, 6, label="y")
    looped = torch.stack([torch.stack([rbf_cka(a, b, estimator=estimator) for b in y]) for a in x])
    torch.testing.assert_close(pairwise_rbf_cka(x, y, estimator=estimator), looped)
    assert looped.std() > 0.01


def test_more_than_half_of_the_pairs_coinciding_leaves_no_bandwidth() -> None:
    x = torch.zeros(10, 3).double()
    x[9] = 1
    free = x.clone().requires_grad_()
    value = rbf_cka(free, gaussian(10, 3))
    value.backward()
    assert float(value.detach()) == 0
    assert free.grad is not None
    assert not free.grad.any()
    assert float(linear_cka(x, gaussian(10, 3)).detach()) > 0.1


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_one_minibatch_is_the_debiased_cka_and_sums_are_the_librarys(kernel: Any) -> None:
    x, y = related(96)
    whole = linear_cka(x, y, estimator="debiased") if kernel == "linear" else rbf_cka(x, y, estimator="debiased")
    torch.testing.assert_close(minibatch_cka([(x, y)], kernel=kernel), whole, rtol=0, atol=1e-12)
    if kernel == "linear":
        sums = [library_hsic((a @ a.T)[None], (b @ b.T)[None]) for a, b in zip(x.split(16), y.split(16), strict=True)]
        xy, xx, yy = (torch.stack([part[i].squeeze() for part in sums]).sum() for i in range(3))
        found = minibatch_cka(zip(x.split(16), y.split(16), strict=True))
        torch.testing.assert_close(found, xy / (xx * yy).sqrt(), rtol=0, atol=1e-12)
        assert abs(float(found - whole)) > 1e-4


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_minibatches_converge_to_the_whole_where_the_mean_of_biased_ones_does_not(kernel: Any) -> None:
    x, y = related(8192)
    x, y = x.float(), y.float()
    whole = float(linear_cka(x, y, estimator="debiased"))
    parts = list(zip(x.split(16), y.split(16), strict=True))
    if kernel == "rbf":  # the whole is in feature space for the linear kernel alone: take 1024 rows as the whole
        whole = float(rbf_cka(x[:1024], y[:1024], estimator="debiased"))
    function = linear_cka if kernel == "linear" else rbf_cka
    biased = float(torch.stack([function(a, b) for a, b in parts]).mean())
    error = abs(float(minibatch_cka(parts, kernel=kernel)) - whole)
    assert error < (0.005 if kernel == "linear" else 0.03)
    assert abs(biased - whole) > 0.1


def test_minibatches_of_unequal_scale_and_size_are_on_one_scale() -> None:
    """The scale is fixed once: a minibatch that is ten times larger counts as such, and the sums are in float32 without
    overflow."""
    x, y = related(64)
    x[32:] *= 10
    parts = list(zip(x.split([32, 20, 12]), y.split([32, 20, 12]), strict=True))
    sums = [library_hsic((a @ a.T)[None], (b @ b.T)[None]) for a, b in parts]
    xy, xx, yy = (torch.stack([part[i].squeeze() for part in sums]).sum() for i in range(3))
    assert float(minibatch_cka(parts)) == pytest.approx(float(xy / (xx * yy).sqrt()), abs=1e-12)
    for scale in (1e-25, 1e25):
        small = minibatch_cka([(a.float() * scale, b.float() / scale) for a, b in parts])
        assert float(small) == pytest.approx(float(xy / (xx * yy).sqrt()), abs=1e-5)


def test_minibatches_of_all_pairs_with_gradients_and_masks() -> None:
    x, y = gaussian(3, 40, 4).requires_grad_(), gaussian(5, 40, 6, label="y")
    sums = MinibatchCka(pairwise=True)
    for a, b in zip(x.split(10, 1), y.split(10, 1), strict=True):
        sums.add(a, b)
    single = torch.stack(
        [torch.stack([minibatch_cka(zip(a.split(10), b.split(10), strict=True)) for b in y]) for a in x]
    )
    torch.testing.assert_close(sums.value(), single)
    sums.value().sum().backward()
    assert x.grad is not None
    assert (x.grad.square().sum((1, 2)) > 0).all()
    mask = torch.rand(2, 20, generator=seeds.generator(0, "mask")) > 0.3
    for kernel in ("linear", "rbf"):
        masked = MinibatchCka(kernel=kernel)  # type: ignore[arg-type]
        masked.add(gaussian(2, 20, 3), gaussian(2, 20, 4, label="y"), mask)
        dropped = [
            minibatch_cka([(a[m], b[m])], kernel=kernel)
            for a, b, m in zip(gaussian(2, 20, 3), gaussian(2, 20, 4, label="y"), mask, strict=True)
        ]  # type: ignore[arg-type]
        torch.testing.assert_close(masked.value(), torch.stack(dropped))
    one = pairwise_linear_cka(x.detach(), y, estimator="debiased")
    whole = MinibatchCka(pairwise=True)
    whole.add(x.detach(), y)
    torch.testing.assert_close(whole.value(), one)


def test_constant_minibatches_and_refusals() -> None:
    assert float(minibatch_cka([(torch.full((8, 3), 0.1), gaussian(8, 3).float())] * 3)) == 0
    with pytest.raises(InputError, match="add"):
        MinibatchCka().value()
    with pytest.raises(InputError, match="at least 4"):
        minibatch_cka([(gaussian(3, 2), gaussian(3, 2))])
    with pytest.raises(InputError, match="linear kernel"):
        MinibatchCka(kernel="rbf", pairwise=True)
