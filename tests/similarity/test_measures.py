"""Every alignment measure behind the one interface: its laws (the invariances that it has and that it lacks),
gradients, hard inputs, masks, and independent oracles."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, spatial, special, stats
from torch import Tensor

from workbench import seeds
from workbench.errors import InputError
from workbench.similarity.kernels import gram_cka
from workbench.similarity.measures import (
    MEASURES,
    pairwise_similarity,
    shuffled_similarity,
    similarity,
    similarity_scores,
)
from workbench.similarity.minibatch import minibatch_cka

ROWS, WIDTH, OTHER = 80, 6, 7
SETTINGS: list[Any] = [
    ("linear_cka", {}),
    ("rbf_cka", {}),
    ("procrustes", {}),
    ("gram", {}),
    ("rsa", {}),
    ("rsa", {"distance": "correlation"}),
    ("svcca", {"keep": 0.9}),
    ("svcca", {"keep": 1.0}),
    ("pwcca", {}),
    ("projection_mse", {}),
    ("projection_cosine", {}),
]
"""All measures on features, with the options that change their laws."""
BY_ESTIMATOR = [
    (*setting, estimator)
    for setting in SETTINGS
    for estimator in ("biased", "debiased")
    if estimator == "biased" or "cka" in setting[0]
]
EVERY = {"rotation": True, "scale": True, "translation": True, "map of x": False, "map of y": False, "symmetric": True}
LAWS: dict[str, dict[str, bool]] = {
    "rsa correlation": {**EVERY, "rotation": False, "translation": False},
    "svcca 1.0": {**EVERY, "map of x": True, "map of y": True},
    "pwcca": {**EVERY, "rotation": False, "map of y": True, "symmetric": False},
    "projection_mse": {**EVERY, "symmetric": False},
    "projection_cosine": {**EVERY, "symmetric": False},
}
"""Where a measure's laws differ from `EVERY`. The projections forgive a map of X up to their ridge, which has a test of
its own."""
BOUND = 1e-9
"""Rounding in float64; what a measure lacks must show 100 000 times more."""


def gaussian(*shape: int, label: str = "x", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeds.generator(0, label), dtype=dtype)


def related(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = gaussian(rows, WIDTH, dtype=dtype)
    return x, x @ gaussian(WIDTH, OTHER, label="w", dtype=dtype) + gaussian(rows, OTHER, label="y", dtype=dtype)


def patterns(*shape: int, label: str = "p") -> Tensor:
    return gaussian(*shape, label=label).softmax(-1)


def key(measure: str, options: dict[str, Any]) -> str:
    return " ".join([measure, *map(str, options.values())])


@pytest.mark.parametrize(("measure", "options", "estimator"), BY_ESTIMATOR, ids=str)
def test_invariances_that_it_has_and_that_it_lacks(measure: Any, options: dict[str, Any], estimator: Any) -> None:
    x, y = related()
    rotation = torch.linalg.qr(gaussian(WIDTH, WIDTH, label="rotation")).Q

    def value(a: Tensor, b: Tensor) -> float:
        return float(similarity(a, b, measure=measure, estimator=estimator, options=options))

    base = value(x, y)
    stretch = torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1, 1], dtype=torch.float64)) + 0.5 * gaussian(
        OTHER, OTHER, label="shear"
    ).triu(1)
    moved = {
        "rotation": value(x @ rotation, y),
        "scale": value(3.7 * x, 0.2 * y),
        "translation": value(x + 5 * gaussian(WIDTH, label="t"), y - 3 * gaussian(OTHER, label="u")),
        "map of x": value(x @ stretch[:WIDTH, :WIDTH], y),
        "map of y": value(x, y @ stretch),
        "symmetric": value(y, x),
    }
    for law, holds in LAWS.get(key(measure, options), EVERY).items():
        difference = abs(moved[law] - base)
        assert difference < BOUND if holds else difference > 1e5 * BOUND, f"{law}: {difference}"
    assert 0.05 < base < 0.99, "neither floor nor ceiling: the laws could be seen to fail"


@pytest.mark.parametrize(("measure", "options"), SETTINGS, ids=str)
def test_self_similarity_is_one_and_unrelated_rows_are_far_from_it(measure: Any, options: dict[str, Any]) -> None:
    x, rotation = gaussian(400, WIDTH), torch.linalg.qr(gaussian(WIDTH, WIDTH, label="rotation")).Q
    own = float(similarity(x, x, measure=measure, options=options))
    assert own == pytest.approx(1, abs=1e-3 if "projection" in measure else 1e-9), (
        "a ridge shrinks the projection by about a hundredth"
    )
    if options.get("distance") != "correlation" and measure != "pwcca":
        assert float(similarity(x @ rotation, x, measure=measure, options=options)) == pytest.approx(own, abs=1e-9)
    assert float(similarity(gaussian(400, WIDTH, label="z"), x, measure=measure, options=options)) < 0.3
    order = torch.randperm(400, generator=seeds.generator(0, "order"))
    assert float(shuffled_similarity(x, x, order=order, measure=measure, options=options)) < 0.3


@pytest.mark.parametrize(("measure", "options", "estimator"), BY_ESTIMATOR, ids=str)
def test_a_mask_equals_dropping_rows_and_each_pair_has_its_own(
    measure: Any, options: dict[str, Any], estimator: Any
) -> None:
    x, y = torch.stack([related()[0], gaussian(ROWS, WIDTH, label="z")]), torch.stack([related()[1]] * 2)
    mask = torch.rand(2, ROWS, generator=seeds.generator(0, "mask")) > 0.4
    spoiled = torch.where(mask[..., None], x, torch.tensor([float("nan"), 1e30]).repeat(WIDTH // 2).double())
    settings: dict[str, Any] = {"measure": measure, "estimator": estimator, "options": options}
    found = similarity(spoiled, y, mask=mask, **settings)
    expected = torch.stack([similarity(a[rows], b[rows], **settings) for a, b, rows in zip(x, y, mask, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (found - similarity(x, y, **settings)).abs().max() > 1e-3, "the rows left out would have counted"
    free = spoiled.nan_to_num(0.0).requires_grad_()
    similarity(free, y, mask=mask, **settings).sum().backward()
    assert free.grad is not None
    assert not free.grad[~mask].any()
    assert free.grad[mask].isfinite().all()


@pytest.mark.parametrize(("measure", "options"), SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [5, 12, 64])
def test_gradients_are_finite_and_climb(measure: Any, options: dict[str, Any], rows: int) -> None:
    """Also with fewer rows than features; a step along the gradient raises the similarity where it is not already 1."""
    x, y = (value.clone() for value in related(rows, torch.float32))
    x.requires_grad_()
    value = similarity(x, y, measure=measure, options=options)
    value.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    if "cca" in measure and rows == 5:
        return  # more components than rows: all correlations are 1, and stay so
    assert x.grad.norm() > 1e-4
    with torch.no_grad():
        assert float(similarity(x + 1e-2 * x.grad / x.grad.norm(), y, measure=measure, options=options)) > float(
            value.detach()
        )


@pytest.mark.parametrize(
    ("measure", "options"), [s for s in SETTINGS if s[0] not in ("svcca", "pwcca") or s[1] == {"keep": 1.0}], ids=str
)
def test_gradient_is_exact(measure: Any, options: dict[str, Any]) -> None:
    x, y = (
        gaussian(14, 3).requires_grad_(),
        (gaussian(14, 3) @ gaussian(3, 4, label="w") + gaussian(14, 4, label="y")).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda a, b: similarity(a, b, measure=measure, options=options), (x, y))


@pytest.mark.parametrize(("measure", "options"), SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
def test_constant_input_gives_zero_and_no_gradient(
    measure: Any, options: dict[str, Any], rows: int, value: float
) -> None:
    x, y = (
        torch.full((rows, WIDTH), value).requires_grad_(),
        gaussian(rows, OTHER, dtype=torch.float32).requires_grad_(),
    )
    for pair in ((x, y), (y, x)):
        x.grad = y.grad = None
        found = similarity(*pair, measure=measure, options=options)
        found.backward()
        assert float(found.detach()) == 0
        assert x.grad is not None
        assert y.grad is not None
        assert not x.grad.any()
        assert not y.grad.any()


@pytest.mark.parametrize(("measure", "options"), SETTINGS, ids=str)
def test_tiny_and_equal_rows_give_a_number(measure: Any, options: dict[str, Any]) -> None:
    """Extreme scales keep the value; rows that coincide, rows equally far apart and a single feature are no NaN, and
    nor is their gradient."""
    x, y = related(32, torch.float32)
    base = float(similarity(x, y, measure=measure, options=options))
    for scale in (1e-30, 1e12, 1e30):
        assert float(similarity(scale * x, y, measure=measure, options=options)) == pytest.approx(base, abs=1e-4)
    twice = torch.cat([x[:4], x[:4]])
    for odd in (torch.eye(8, WIDTH), torch.eye(8), twice, x[:8, :1], torch.cat([x[:1].expand(7, -1), x[1:2]])):
        odd = odd.clone().requires_grad_()
        value = similarity(odd, y[:8], measure=measure, options=options)
        value.backward()
        assert odd.grad is not None
        assert value.isfinite()
        assert odd.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [4, 8, 64])
def test_rows_equally_far_apart_have_no_debiased_cka(dtype: torch.dtype, rows: int) -> None:
    """Their unbiased HSIC is 0 up to rounding; the quotient of two roundings would be any number, with a gradient of a
    million."""
    y = gaussian(rows, 5).to(dtype)
    for measure in ("linear_cka", "rbf_cka"):
        x = torch.eye(rows, dtype=dtype).requires_grad_()
        value = similarity(x, y, measure=measure, estimator="debiased")  # type: ignore[arg-type]
        value.backward()
        assert float(value.detach()) == 0
        assert x.grad is not None
        assert not x.grad.any()
        assert float(pairwise_similarity(x.detach()[None], y[None], measure=measure, estimator="debiased")) == 0  # type: ignore[arg-type]
    white = gaussian(1, 64, 8192, label="white").float()  # the other side of the line: hardly any structure, but some
    assert float(similarity(white, white, estimator="debiased")) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("measure", "options"), SETTINGS, ids=str)
def test_half_precision_is_computed_in_float32(measure: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    x, y = (200 * value for value in related())
    value = similarity(x.to(dtype), y.to(dtype), measure=measure, options=options)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(similarity(x, y, measure=measure, options=options)), abs=5e-3)


def test_procrustes_equals_scipy() -> None:
    x, y = related()
    padded = np.pad(x.numpy(), ((0, 0), (0, OTHER - WIDTH)))
    disparity = spatial.procrustes(padded, y.numpy())[2]
    value = float(similarity(x, y, measure="procrustes"))
    assert value == pytest.approx(np.sqrt(1 - disparity), abs=1e-12)
    a, b = (part - part.mean(0) for part in (padded, y.numpy()))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    rotation, _ = linalg.orthogonal_procrustes(a, b)
    assert 1 - value == pytest.approx(np.linalg.norm(a @ rotation - b) ** 2 / 2, abs=1e-12)


@pytest.mark.parametrize("distance", ["sqeuclidean", "correlation"])
def test_rsa_equals_scipy(distance: Any) -> None:
    x, y = related()
    expected = stats.pearsonr(*(spatial.distance.pdist(value.numpy(), distance) for value in (x, y))).statistic
    assert float(similarity(x, y, measure="rsa", options={"distance": distance})) == pytest.approx(expected, abs=1e-12)


def test_canonical_correlations_equal_scipys_angles_between_subspaces() -> None:
    x, y = related()
    a, b = (value.numpy() - value.numpy().mean(0) for value in (x, y))
    assert float(similarity(x, y, measure="svcca", options={"keep": 1.0})) == pytest.approx(
        np.cos(linalg.subspace_angles(a, b)).mean(), abs=1e-12
    )
    leading = []
    for value in (a, b):
        u, s, _ = np.linalg.svd(value, full_matrices=False)
        leading.append(u[:, : int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.8)) + 1])
    assert leading[0].shape[1] < WIDTH, "something is left out"
    truncated = np.cos(linalg.subspace_angles(*leading)).mean()
    assert float(similarity(x, y, measure="svcca", options={"keep": 0.8})) == pytest.approx(truncated, abs=1e-12)


def test_pwcca_weights_by_what_x_carries() -> None:
    """By hand: the canonical directions from the generalised eigenproblem of the covariances."""
    x, y = related()
    x = x * torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=x.dtype)
    a, b = (value.numpy() - value.numpy().mean(0) for value in (x, y))
    squares, vectors = linalg.eigh(a.T @ b @ np.linalg.inv(b.T @ b) @ b.T @ a, a.T @ a)
    directions = a @ vectors  # eigh normalises v^T A^T A v = 1
    weights = np.abs(directions.T @ a).sum(1)
    expected = (weights * np.sqrt(squares)).sum() / weights.sum()
    assert float(similarity(x, y, measure="pwcca")) == pytest.approx(expected, abs=1e-10)
    assert abs(expected - np.sqrt(squares).mean()) > 1e-3, "the weights matter"


@pytest.mark.parametrize("width", [3, 30])
def test_projection_predicts_left_out_rows(width: int) -> None:
    """A slow loop that really leaves each row out, with more and with fewer rows than features."""
    m, ridge = 12, 0.05
    x, y = gaussian(m, width), gaussian(m, 4, label="y") + gaussian(m, width)[:, :3] @ gaussian(3, 4, label="w")
    shift = ridge * (x - x.mean(0)).square().sum() / width
    design, penalty = torch.cat([torch.ones(m, 1), x], 1).double(), torch.eye(width + 1).double() * shift
    penalty[0, 0] = 0
    predicted, means = torch.zeros_like(y), torch.zeros_like(y)
    for i in range(m):
        rest = [j for j in range(m) if j != i]
        predicted[i] = design[i] @ torch.linalg.solve(design[rest].T @ design[rest] + penalty, design[rest].T @ y[rest])
        means[i] = y[rest].mean(0)
    mse = 1 - (y - predicted).square().sum() / (y - means).square().sum()
    assert float(similarity(x, y, measure="projection_mse", options={"ridge": ridge})) == pytest.approx(
        float(mse), abs=1e-10
    )
    cosine = torch.cosine_similarity(predicted - means, y - means, dim=-1).mean()
    assert float(similarity(x, y, measure="projection_cosine", options={"ridge": ridge})) == pytest.approx(
        float(cosine), abs=1e-10
    )


def test_projection_forgives_a_map_of_x_up_to_its_ridge_and_can_not_fit_noise() -> None:
    x, y = related()
    stretched = x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    for measure in ("projection_mse", "projection_cosine"):
        gaps = []
        for ridge in (1e-2, 1e-6):
            a, b = (float(similarity(value, y, measure=measure, options={"ridge": ridge})) for value in (x, stretched))  # type: ignore[arg-type]
            gaps.append(abs(a - b))
        assert gaps[1] < 1e-5 < gaps[0] / 100
    wide, target = gaussian(10, 16, 32, label="wide"), gaussian(10, 16, 32, label="noise")
    assert float(similarity(wide, target, measure="projection_mse").mean()) < 0.05, (
        "in-sample, 32 features explain 16 rows in full"
    )
    assert float(similarity(wide, target, measure="projection_cosine").mean()) < 0.05


def test_attention_kl_is_the_divergence_of_teacher_from_student() -> None:
    x, y = patterns(3, 10, 8), patterns(3, 10, 8, label="q")
    expected = special.rel_entr(y.numpy(), x.numpy()).sum((-2, -1)) / 10
    torch.testing.assert_close(
        1 - similarity(x, y, measure="attention_kl"), torch.from_numpy(expected), rtol=0, atol=1e-7
    )
    assert expected.min() > 0.1
    assert similarity(x, x, measure="attention_kl").sub(1).abs().max() < 1e-12
    assert (similarity(x, y, measure="attention_kl") - similarity(y, x, measure="attention_kl")).abs().min() > 1e-3, (
        "it is not symmetric"
    )
    mask = torch.rand(3, 10, generator=seeds.generator(0, "mask")) > 0.5
    torch.testing.assert_close(
        similarity(x, y, measure="attention_kl", mask=mask),
        torch.stack([similarity(a[m], b[m], measure="attention_kl") for a, b, m in zip(x, y, mask, strict=True)]),
    )


def test_attention_kl_has_a_finite_gradient_where_the_student_does_not_look() -> None:
    logits = torch.zeros(4, 5)
    logits[:, 2] = -200  # softmax gives exactly 0 there in float32
    logits.requires_grad_()
    value = similarity(logits.softmax(-1), patterns(4, 5).float(), measure="attention_kl")
    value.backward()
    assert logits.grad is not None
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad.norm() > 1e-3
    with pytest.raises(InputError, match=r"student.*attention patterns"):
        similarity(gaussian(4, 5), patterns(4, 5), measure="attention_kl")
    with pytest.raises(InputError, match="same prompts"):
        similarity(patterns(4, 5), patterns(4, 6), measure="attention_kl")


@pytest.mark.parametrize(("measure", "options"), SETTINGS, ids=str)
def test_all_pairs_in_one_call_are_labelled_scores(measure: Any, options: dict[str, Any]) -> None:
    x, y = (
        torch.stack([gaussian(ROWS, WIDTH, label=f"x{i}") for i in range(3)]),
        torch.stack([related()[1], gaussian(ROWS, OTHER, label="z")]),
    )
    mask = torch.rand(ROWS, generator=seeds.generator(0, "mask")) > 0.4
    scores = similarity_scores(
        x, y, student=["L0H0", "L0H1", "L1H0"], teacher=["L0H0", "L2H1"], measure=measure, mask=mask, options=options
    )
    looped = torch.stack(
        [
            torch.stack(
                [similarity(a[mask], b[mask], measure=measure, estimator="debiased", options=options) for b in y]
            )
            for a in x
        ]
    )
    torch.testing.assert_close(scores.values, looped, rtol=0, atol=1e-10)
    assert float(scores.select(student="L0H1", teacher="L2H1").values) == float(scores.values[1, 1])
    assert looped.std() > 1e-3
    if measure in ("linear_cka", "rbf_cka"):
        assert scores.unit.startswith("debiased")


def test_refusals_name_the_remedy() -> None:
    x, y = related()
    with pytest.raises(InputError, match="fraction"):
        similarity(x, y, measure="rbf_cka", options={"fracton": 1})
    with pytest.raises(InputError, match="has none"):
        similarity(x, y, measure="procrustes", options={"keep": 1})
    for measure, options, match in (
        ("rbf_cka", {"fraction": 0}, "median distance"),
        ("svcca", {"keep": 0}, "share of variance"),
        ("projection_mse", {"ridge": 0}, "ridge"),
        ("rsa", {"distance": "cosine"}, "sqeuclidean"),
    ):
        with pytest.raises(InputError, match=match):
            similarity(x, y, measure=measure, options=options)  # type: ignore[arg-type]
    for measure in set(MEASURES) - {"attention_kl"}:
        with pytest.raises(InputError, match="examples"):
            similarity(x[:1], y[:1], measure=measure)  # type: ignore[arg-type]
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[2:] = False
    with pytest.raises(InputError, match="got 2"):
        similarity(x, y, measure="rsa", mask=mask)
    assert pairwise_similarity(x[None], y[None]).shape == (1, 1)


NOT_NUMBERS = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", NOT_NUMBERS, ids=str)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("measure", "options", "estimator"), [*BY_ESTIMATOR, ("attention_kl", {}, "biased")], ids=str)
def test_what_is_no_number_gives_nan_in_its_pair_alone(
    measure: Any, options: dict[str, Any], estimator: Any, side: int, bad: float
) -> None:
    """Whether one entry, one row or all; the other pairs keep value and gradient, and pairwise matrices theirs."""
    made = patterns if measure == "attention_kl" else gaussian
    sets = [made(3, 12, 5, label=label) for label in ("a", "b")]
    settings: dict[str, Any] = {"measure": measure, "estimator": estimator, "options": options}
    for where in ((1, 4, 2), (1, 4), (1,)):
        broken = [each.clone() for each in sets]
        broken[side][where] = bad
        x = broken[0].clone().requires_grad_()
        found = similarity(x, broken[1], **settings)
        assert found.isnan().tolist() == [False, True, False]
        expected = similarity(sets[0], sets[1], **settings)
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
        found[[0, 2]].sum().backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        assert float(x.grad[0].abs().max()) > 0
        pairwise = pairwise_similarity(*broken, **settings)
        lost = torch.zeros(3, 3, dtype=torch.bool)
        lost[(1, slice(None)) if side == 0 else (slice(None), 1)] = True
        assert torch.equal(pairwise.isnan(), lost)
        alone = similarity(broken[0][1], broken[1][1], **settings)
        assert bool(alone.isnan())


@pytest.mark.parametrize("bad", NOT_NUMBERS, ids=str)
@pytest.mark.parametrize(("measure", "options", "estimator"), BY_ESTIMATOR, ids=str)
def test_what_the_mask_leaves_out_may_be_no_number(
    measure: Any, options: dict[str, Any], estimator: Any, bad: float
) -> None:
    x, y = gaussian(2, 12, 5, label="a"), gaussian(2, 12, 4, label="b")
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 3] = False
    settings: dict[str, Any] = {"measure": measure, "estimator": estimator, "options": options, "mask": mask}
    expected = similarity(x, y, **settings)
    x[:, 3], y[:, 3] = bad, bad
    torch.testing.assert_close(similarity(x, y, **settings), expected)
    x[1, 0, 0] = bad
    assert similarity(x, y, **settings).isnan().tolist() == [False, True]


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("bad", NOT_NUMBERS, ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_one_minibatch_that_is_no_number_leaves_no_value(kernel: Any, bad: float, which: int) -> None:
    parts = [(gaussian(12, 5, label=f"x{i}"), gaussian(12, 4, label=f"y{i}")) for i in range(2)]
    assert bool(minibatch_cka(parts, kernel=kernel).isfinite())
    parts[which][0][3, 1] = bad
    assert bool(minibatch_cka(parts, kernel=kernel).isnan())


@pytest.mark.parametrize("estimator", ["biased", "debiased"])
def test_gram_matrices_with_what_is_no_number_give_nan(estimator: Any) -> None:
    x = gaussian(12, 5)
    for bad in NOT_NUMBERS:
        k = x @ x.mT
        k[2, 5] = bad
        assert bool(gram_cka(k, x @ x.mT, estimator=estimator).isnan())
