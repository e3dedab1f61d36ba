"""CKA: reference values, laws, the estimator's floor, gradients, hard inputs, and an independent library as oracle."""

from typing import Any

import numpy as np
import pytest
import torch
from cka.hsic import hsic as library_hsic
from torch import Tensor

from workbench import seeds
from workbench.errors import InputError
from workbench.similarity.cka import linear_cka, pairwise_linear_cka, pairwise_traces, shuffled_floor

ESTIMATORS: list[Any] = ["biased", "debiased"]
SMALL = (
    torch.tensor([[1, 0], [0, 1], [1, 1], [2, 0], [0, 3.0]], dtype=torch.float64),
    torch.tensor([[1, 2, 0], [0, 1, 1], [1, 0, 2], [3, 1, 0], [0, 2, 2.0]], dtype=torch.float64),
)


def gaussian(*shape: int, label: str = "x", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeds.generator(0, label), dtype=dtype)


def by_definition(x: Tensor, y: Tensor, estimator: str) -> Tensor:
    """The formulas as they are written, on Gram matrices."""
    m = len(x)
    k, l = x @ x.T, y @ y.T
    if estimator == "biased":
        h = torch.eye(m, dtype=x.dtype) - 1 / m

        def hsic(a: Tensor, b: Tensor) -> Tensor:
            return (a @ h @ b @ h).trace() / (m - 1) ** 2
    else:

        def hsic(a: Tensor, b: Tensor) -> Tensor:
            a, b = a - a.diag().diag(), b - b.diag().diag()
            total = (a @ b).trace() + a.sum() * b.sum() / ((m - 1) * (m - 2)) - 2 / (m - 2) * (a @ b).sum()
            return total / (m * (m - 3))

    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


@pytest.mark.parametrize(("estimator", "expected"), [("biased", 0.7539997786455305), ("debiased", 0.799670984974775)])
def test_small_reference_value(estimator: Any, expected: float) -> None:
    assert float(linear_cka(*SMALL, estimator=estimator)) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("estimator", "expected"), [("biased", 0.544447633884985), ("debiased", 0.498391794433166)])
def test_random_reference_value(estimator: Any, expected: float) -> None:
    draw = np.random.RandomState(1234)
    x = draw.randn(100, 10)
    y = draw.randn(100, 10) + x
    assert float(linear_cka(torch.from_numpy(x), torch.from_numpy(y), estimator=estimator)) == pytest.approx(
        expected, abs=1e-13
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("m", "p", "q"), [(6, 3, 2), (20, 4, 7), (12, 30, 25), (300, 8, 8), (5, 64, 128)])
def test_equals_the_definition_in_both_spaces(estimator: Any, m: int, p: int, q: int) -> None:
    x, y = gaussian(m, p), gaussian(m, q, label="y") + 0.5 * gaussian(m, p) @ gaussian(p, q, label="w")
    value, expected = linear_cka(x, y, estimator=estimator), by_definition(x, y, estimator)
    assert float(value) == pytest.approx(float(expected), abs=1e-12)
    assert abs(float(expected)) > 1e-10


def test_debiased_equals_an_independent_library() -> None:
    x, y = gaussian(50, 6), gaussian(50, 6) + gaussian(50, 6, label="noise")
    xy, xx, yy = library_hsic((x @ x.T)[None], (y @ y.T)[None])
    assert float(linear_cka(x, y, estimator="debiased")) == pytest.approx(float(xy / (xx * yy).sqrt()), abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_laws(estimator: Any) -> None:
    x, y = gaussian(40, 6), gaussian(40, 6) + gaussian(40, 6, label="noise")
    rotation = torch.linalg.qr(gaussian(6, 6, label="rotation")).Q
    stretch = torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=x.dtype))
    value = float(linear_cka(x, y, estimator=estimator))
    assert float(linear_cka(x, x, estimator=estimator)) == pytest.approx(1, abs=1e-12)
    assert float(linear_cka(y, x, estimator=estimator)) == pytest.approx(value, abs=1e-12)
    assert float(linear_cka(x @ rotation, y, estimator=estimator)) == pytest.approx(value, abs=1e-12)
    assert float(linear_cka(-3.7 * x + 5, y, estimator=estimator)) == pytest.approx(value, abs=1e-12)
    assert abs(float(linear_cka(x @ stretch, y, estimator=estimator)) - value) > 0.05, (
        "linear CKA is not invariant to a linear map, and must not be"
    )


@pytest.mark.parametrize(("m", "expected"), [(8, 0.93), (32, 0.73), (128, 0.41), (1024, 0.08)])
def test_floor_of_unrelated_gaussians(m: int, expected: float) -> None:
    x, y = gaussian(20, m, 64, dtype=torch.float32), gaussian(20, m, 128, label="y", dtype=torch.float32)
    assert float(linear_cka(x, y, estimator="biased").mean()) == pytest.approx(expected, abs=0.02)
    assert float(linear_cka(x, y, estimator="debiased").mean()) == pytest.approx(0, abs=0.05)


def test_shuffled_floor_breaks_the_pairing_only() -> None:
    x = gaussian(64, 5)
    order = torch.randperm(64, generator=seeds.generator(0, "order"))
    assert float(shuffled_floor(x, x, order=torch.arange(64))) == pytest.approx(1)
    assert float(shuffled_floor(x, x, order=order)) == pytest.approx(float(linear_cka(x, x[order])))
    assert float(shuffled_floor(x, x, order=order)) < 0.3


def test_all_pairs_equal_a_loop() -> None:
    x, y = gaussian(3, 30, 4), gaussian(5, 30, 6, label="y")
    batched = pairwise_linear_cka(x, y, estimator="debiased")
    looped = torch.stack([torch.stack([linear_cka(a, b, estimator="debiased") for b in y]) for a in x])
    torch.testing.assert_close(batched, looped)
    assert batched.std() > 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_is_exact_and_not_clamped(estimator: Any) -> None:
    x, y = gaussian(12, 3).requires_grad_(), gaussian(12, 4, label="y").requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: linear_cka(a, b, estimator=estimator), (x, y))
    if estimator == "debiased":
        draws = (gaussian(12, 3, label=f"n{i}") for i in range(50))
        negative = next(
            draw for draw in draws if float(linear_cka(draw, y.detach(), estimator="debiased")) < -0.05
        ).requires_grad_()
        linear_cka(negative, y.detach(), estimator="debiased").backward()
        assert negative.grad is not None
        assert negative.grad.norm() > 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 12345.678])
def test_constant_input_gives_zero_and_no_gradient(estimator: Any, value: float) -> None:
    x = torch.full((16, 4), value).requires_grad_()
    y = gaussian(16, 3, dtype=torch.float32).requires_grad_()
    cka = linear_cka(x, y, estimator=estimator)
    cka.backward()
    assert float(cka.detach()) == 0
    assert x.grad is not None
    assert y.grad is not None
    assert not x.grad.any()
    assert not y.grad.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_scales_keep_the_value(scale: float) -> None:
    x, y = (
        gaussian(32, 4, dtype=torch.float32),
        gaussian(32, 4, dtype=torch.float32) + gaussian(32, 4, label="y", dtype=torch.float32),
    )
    assert float(linear_cka(scale * x, y)) == pytest.approx(float(linear_cka(x, y)), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = 200 * gaussian(64, 32), 200 * (gaussian(64, 32) + gaussian(64, 32, label="y"))
    value = linear_cka(x.to(dtype), y.to(dtype))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(linear_cka(x, y)), abs=5e-3)


@pytest.mark.parametrize(("estimator", "m"), [("biased", 1), ("debiased", 3)])
def test_too_few_examples_are_refused(estimator: Any, m: int) -> None:
    with pytest.raises(InputError, match="examples"):
        linear_cka(gaussian(m, 2), gaussian(m, 2), estimator=estimator)


@pytest.mark.parametrize(
    ("heads", "m", "width"), [((3, 4), 150, 5), ((6, 7), 130, 40), ((2, 2), 64, 3), ((5, 5), 65, 60)]
)
def test_all_pairs_are_what_each_pair_is_alone_in_feature_space_and_on_gram_matrices(heads, m, width):
    """Few narrow sets go through feature space, many wide ones through Gram matrices in blocks of rows that need not
    divide m."""
    draw = seeds.generator(0, "pairs")
    x, y = (torch.randn(count, m, width, generator=draw, dtype=torch.float64) for count in heads)
    traces = torch.stack([torch.stack([((a @ a.T) * (b @ b.T)).sum() for b in y]) for a in x])
    torch.testing.assert_close(pairwise_traces(x, y), traces)
    for estimator in ESTIMATORS:
        alone = torch.stack([torch.stack([linear_cka(a, b, estimator=estimator) for b in y]) for a in x])
        torch.testing.assert_close(pairwise_linear_cka(x, y, estimator=estimator), alone)
