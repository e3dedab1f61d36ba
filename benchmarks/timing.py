"""Medians of interleaved repeats after one warm-up of each, and what a comparison of a fast way with a slow one
reports."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EQUAL = 1000.0
"""How many times smaller than the largest effect a difference must be for two ways to give the same numbers."""
Product = tuple[int, int, int]
"""A matrix product: rows, inner width, columns."""


def medians(
    *runs: Callable[[], object], repeats: int, warm: bool = False, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median seconds of each, taken in turns so that a busy moment falls on all; after a warm-up, unless they are
    warm."""
    for run in () if warm else runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for place, run in enumerate(runs):
            start = clock()
            run()
            seconds[place].append(clock() - start)
    return [statistics.median(values) for values in seconds]


def compared(
    name: str,
    ours: Callable[[], Tensor],
    reference: Callable[[], Tensor],
    forward: Callable[[], object],
    products: Sequence[Product],
    *,
    repeats: int = 3,
) -> dict[str, Any]:
    """One result. `products` are the matrix products that the question needs at least; their bare time here is the
    floor.

    `reference` gives the same effects (clean minus patched) as `ours`; it runs once for the numbers and `repeats` times
    for the clock.
    """
    found, expected = ours(), reference()
    forward()
    _multiply(products)
    difference = float((found - expected).abs().max())
    effect = float(expected.abs().max())
    assert effect > EQUAL * difference, f"{name}: they differ by {difference:.2g}, the largest effect is {effect:.2g}"
    fast, slow, plain, floor = medians(
        ours, reference, forward, lambda: _multiply(products), repeats=repeats, warm=True
    )
    return {
        "name": name,
        "ratio": round(slow / fast, 2),
        "max_abs_difference": difference,
        "effect_over_difference": round(effect / max(difference, 1e-30), 1),
        "forwards": round(fast / plain, 2),
        "floor_ratio": round(fast / floor, 2),
        "seconds": round(fast, 4),
        "threads": torch.get_num_threads(),
    }


_OPERANDS: dict[tuple[int, int], Tensor] = {}


def _multiply(products: Sequence[Product]) -> None:
    for rows, inner, columns in products:
        torch.mm(_operand(rows, inner), _operand(inner, columns))


def _operand(rows: int, columns: int) -> Tensor:
    if (rows, columns) not in _OPERANDS:
        _OPERANDS[rows, columns] = torch.randn(rows, columns)
    return _OPERANDS[rows, columns]
