"""Medians of interleaved repeats, after one warm-up of each."""

import statistics
import time
from collections.abc import Callable


def medians(*runs: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each, taken in turns so that a busy moment falls on all."""
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for place, run in enumerate(runs):
            start = time.perf_counter()
            run()
            seconds[place].append(time.perf_counter() - start)
    return [statistics.median(values) for values in seconds]
