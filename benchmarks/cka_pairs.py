"""All pairs of 12 x 12 teacher and 6 x 12 student heads at m = 512, d_head = 64, debiased, against a loop over
pytorch-cka's `hsic`.

The arithmetic: the loop forms two 512 x 512 Gram matrices a pair (2 * 512^2 * 64 * 2 operations, and eight passes over
512^2 numbers); in feature space a pair needs one 64 x 64 product of 512 rows (2 * 64^2 * 512 operations), sixteen times
less, and the self-terms are done once a head.
"""

from typing import Any

import torch
from cka.hsic import hsic as library_hsic

from benchmarks.timing import medians
from workbench import seeds
from workbench.similarity.cka import pairwise_linear_cka


def run() -> dict[str, Any]:
    """One result: ratio of the medians and the largest difference of the values."""
    draw = seeds.generator(0, "cka-pairs")
    shared = torch.randn(512, 64, generator=draw)
    x, y = (torch.randn(heads, 512, 64, generator=draw) + shared for heads in (72, 144))
    ours, theirs = (lambda: pairwise_linear_cka(x, y, estimator="debiased")), (lambda: _loop(x[:6], y[:12]))
    fast, slow = medians(ours, theirs, repeats=3)
    slow *= 72 * 144 / (6 * 12)  # the loop costs the same for each pair; a part of it is timed
    return {
        "name": "cka-pairs",
        "ratio": slow / fast,
        "max_abs_difference": float((ours()[:6, :12] - theirs()).abs().max()),
    }


def _loop(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows = []
    for a in x:
        row = [library_hsic((a @ a.T)[None], (b @ b.T)[None]) for b in y]
        rows.append(torch.stack([(xy / (xx * yy).sqrt()).squeeze() for xy, xx, yy in row]))
    return torch.stack(rows)
