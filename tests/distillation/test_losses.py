"""Task losses: laws, sums by hand, and `torch.distributions` as oracle."""

import itertools
import math

import pytest
import torch
from torch import Tensor, distributions

from workbench import seeds
from workbench.distillation import losses
from workbench.distillation.losses import DIVERGENCES

NAMES = sorted(DIVERGENCES)
TEMPERATURES = (0.5, 1.0, 2.0)


def logits(*labels: str | int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(6, 11, generator=seeds.generator(0, "losses", *labels))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_zero_at_equality_and_only_there(name: str, temperature: float) -> None:
    student, teacher = logits("student"), logits("teacher")
    same = float(
        DIVERGENCES[name](student, student + 3.0, temperature=temperature)
    )  # a shift of logits is no change of distribution
    other = float(DIVERGENCES[name](student, teacher, temperature=temperature))
    assert abs(same) < 1e-5
    assert other > 100 * 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_square_of_the_temperature_and_nothing_else(name: str) -> None:
    """loss(z; T) = T^2 loss(z / T; 1)."""
    student, teacher = logits("student"), logits("teacher")
    for temperature in (0.5, 3.0):
        scaled = float(DIVERGENCES[name](student, teacher, temperature=temperature))
        assert scaled == pytest.approx(
            temperature**2 * float(DIVERGENCES[name](student / temperature, teacher / temperature)), rel=1e-6
        )
        assert scaled != pytest.approx(float(DIVERGENCES[name](student, teacher)), rel=1e-2)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_both_ways_equals_torch_distributions(temperature: float) -> None:
    student, teacher = logits("student"), logits("teacher")
    p, q = (distributions.Categorical(logits=value / temperature) for value in (teacher, student))
    forward = float(distributions.kl_divergence(p, q).mean()) * temperature**2
    reverse = float(distributions.kl_divergence(q, p).mean()) * temperature**2
    assert float(losses.kl_to_teacher(student, teacher, temperature=temperature)) == pytest.approx(forward, rel=1e-5)
    assert float(losses.reverse_kl_to_teacher(student, teacher, temperature=temperature)) == pytest.approx(
        reverse, rel=1e-5
    )
    assert abs(forward - reverse) > 1e-3 * forward, "the two directions differ"


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_jensen_shannon_equals_the_sum_by_hand(temperature: float) -> None:
    student, teacher = logits("student"), logits("teacher")
    p, q = (teacher.double() / temperature).softmax(-1), (student.double() / temperature).softmax(-1)
    middle = (p + q) / 2
    expected = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)).mean() / 2 * temperature**2
    assert float(losses.jensen_shannon(student, teacher, temperature=temperature)) == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations("abcd", 2)))
def test_jensen_shannon_is_symmetric_and_at_most_ln_2(first: str, second: str) -> None:
    for scale in (0.1, 3.0, 300.0):
        x, y = logits(first, scale=scale), logits(second, scale=scale)
        found = float(losses.jensen_shannon(x, y))
        assert found == pytest.approx(float(losses.jensen_shannon(y, x)), rel=1e-5)
        assert 0 < found <= math.log(2) * (1 + 1e-6)
    disjoint = torch.eye(4) * 1e4
    assert float(losses.jensen_shannon(disjoint, disjoint.roll(1, 0))) == pytest.approx(math.log(2)), (
        "the bound is reached"
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_points_to_the_teacher(name: str) -> None:
    """Following it, the student's distribution becomes the teacher's; a detached loss would leave it where it is."""
    student, teacher = logits("student").requires_grad_(), logits("teacher")
    before = float(DIVERGENCES[name](student, teacher, temperature=2.0).detach())
    for _ in range(300):
        (gradient,) = torch.autograd.grad(DIVERGENCES[name](student, teacher, temperature=2.0), student)
        student = (student - 5 * gradient).detach().requires_grad_()
    assert float(DIVERGENCES[name](student, teacher, temperature=2.0).detach()) < before / 20


@pytest.mark.parametrize("name", NAMES)
def test_finite_for_certain_models(name: str) -> None:
    """Distributions without overlap: a large loss, never NaN."""
    student = (torch.eye(5) * 500).requires_grad_()
    loss = DIVERGENCES[name](student, torch.eye(5).roll(1, 0) * 500)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
