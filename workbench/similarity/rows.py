"""Rows of features made ready to be compared: float32 or more, centered, at unit scale, with padding rows set to zero.

Every measure of this room takes X [*batch m p] and Y [*batch m q], and a mask [*batch m] that is True at the rows that
count: a row left out by the mask is as good as dropped, whatever it holds (NaN included), and each pair of a batch may
leave out its own.

One rule for what is not a number, in every measure and estimator: a pair of which a row that counts holds NaN or an
infinity has the value NaN (and no gradient), never 0 and never an error; the other pairs of the batch keep theirs. So a
training that has diverged shows it in its loss.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import InputError

Features = Float[Tensor, "*batch m p"]
Others = Float[Tensor, "*batch m q"]
Mask = Bool[Tensor, "*batch m"]
Value = Float[Tensor, "*batch"]
Count = int | Value
"""m: the number of rows, or with a mask that number for each pair."""
Settings = ParamSpec("Settings")
Measure = Callable[Concatenate[Tensor, Tensor, Settings], Tensor]


def nan_stays_nan(measure: Measure[Settings]) -> Measure[Settings]:
    """A measure of pairs [*batch] with the rule above."""

    @functools.wraps(measure)
    def with_rule(x: Tensor, y: Tensor, *args: Settings.args, **settings: Settings.kwargs) -> Tensor:
        mask = settings.get("mask")
        assert mask is None or isinstance(mask, Tensor)
        (x, x_finite), (y, y_finite) = finite(x, mask), finite(y, mask)
        return only_where(measure(x, y, *args, **settings), x_finite, y_finite)

    return with_rule


def nan_stays_nan_pairwise(measure: Measure[Settings]) -> Measure[Settings]:
    """A measure of every X [a m p] with every Y [b m q] with the rule above."""

    @functools.wraps(measure)
    def with_rule(x: Tensor, y: Tensor, *args: Settings.args, **settings: Settings.kwargs) -> Tensor:
        mask = settings.get("mask")
        assert mask is None or isinstance(mask, Tensor)
        (x, x_finite), (y, y_finite) = finite(x, mask), finite(y, mask)
        return only_where(measure(x, y, *args, **settings), None if x_finite is None else x_finite[:, None], y_finite)

    return with_rule


def finite(x: Tensor, mask: Mask | None) -> tuple[Tensor, Bool[Tensor, "*batch"] | None]:
    """X with each set that is not finite in the rows that count replaced by a constant one (whose rows sum to 1, as
    attention does), and which sets are finite; None where all are."""
    whole = filled(x.detach(), mask).isfinite().all(-1).all(-1)
    if bool(whole.all()):
        return x, None
    return torch.where(whole[..., None, None], x, 1 / x.shape[-1]), whole


def only_where(value: Tensor, *whole: Tensor | None) -> Tensor:
    """The values, NaN where one of the conditions fails."""
    for each in whole:
        if each is not None:
            value = torch.where(each, value, torch.nan)
    return value


def standardised(x: Features, mask: Mask | None = None) -> tuple[Features, Bool[Tensor, "*batch"]]:
    """Centered features at unit scale in float32 or more (squares of squares overflow otherwise), and whether they vary
    beyond the rounding of their mean. The scale is a constant in the gradient: right for every measure that does not
    depend on scale."""
    x = filled(x, mask)
    x = x / largest(x)
    centered = center(x, mask)
    norm = centered.detach().square().sum((-2, -1), keepdim=True)
    varies = ~(norm <= (16 * torch.finfo(x.dtype).eps) ** 2 * x.detach().square().sum((-2, -1), keepdim=True))
    return centered / torch.where(varies, norm, 1.0).sqrt(), varies[..., 0, 0]


def filled(x: Features, mask: Mask | None) -> Features:
    """Float32 or more, with zeros in the rows that do not count."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


def largest(x: Features) -> Float[Tensor, "*batch 1 1"]:
    """The largest absolute value of each X (1 where all are 0), without a gradient: a scale at which squares do not
    overflow."""
    value = x.detach().abs().amax((-2, -1), keepdim=True)
    return torch.where(value > 0, value, 1.0)


def center(x: Features, mask: Mask | None) -> Features:
    """Minus the mean over the rows that count; the others stay 0."""
    if mask is None:
        return x - x.mean(-2, keepdim=True)
    present = mask[..., None]
    return torch.where(present, x - x.sum(-2, keepdim=True) / present.sum(-2, keepdim=True).clamp(min=1), 0.0)


def rows_counted(x: Features, mask: Mask | None, *, least: int, measure: str) -> Count:
    """m. Errors: `InputError` when a pair has fewer than `least` rows."""
    fewest = x.shape[-2] if mask is None else int(mask.sum(-1).min())
    if fewest < least:
        raise InputError(
            f"{measure} needs at least {least} examples, got {fewest}; use a larger batch or more positions."
        )
    return x.shape[-2] if mask is None else mask.sum(-1).to(torch.promote_types(x.dtype, torch.float32))


def quotient(xy: Value, xx: Value, yy: Value, defined: Bool[Tensor, "*batch"]) -> Value:
    """xy / sqrt(xx yy); 0 with zero gradient where it is not defined. A NaN is not hidden: it stays in the result."""
    defined = defined & ~(xx <= 0) & ~(yy <= 0)
    product = torch.where(defined, xx * yy, 1.0)  # the inner `where` keeps NaN out of the gradient
    return torch.where(defined, xy / product.sqrt(), 0.0)
