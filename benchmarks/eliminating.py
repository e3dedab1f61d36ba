"""Backward elimination: exactly, against the same elimination as a loop of hooked forwards; and by the gradients of
gates, against the exact one.

What the exact question costs at least, in plain forwards F (L layers, H heads, n = L H parts): n (n + 1) / 2
candidates, each of which leaves alone what is below its layer and, in the last layer, every token but the last: half of
F on average, and less as layers empty, for what removed heads write is a constant. The loop takes F and its hooks for
each.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks import subjects
from benchmarks.timing import medians
from workbench.circuits.elimination import Elimination, EliminationConfig, eliminate
from workbench.patching.ablation import reference_means
from workbench.patching.execution import Engine, Execution

LAYERS, HEADS = 6, 8


def elimination() -> dict[str, Any]:
    """All 48 heads one after another, 12 prompts of 24 tokens, by the answer's log-probability at the last token."""
    model = subjects.llama(layers=LAYERS, heads=HEADS, kv_heads=HEADS, d_model=128, d_head=16)
    pairs = subjects.random_pairs(12, 24)
    means, config = reference_means(model, pairs.swapped()), EliminationConfig(to_the_end=True)

    def run(engine: Engine) -> Elimination:
        return eliminate(model, pairs, means, config, execution=Execution(engine=engine, progress=False))

    fast, slow = run("replay"), run("hooks")
    assert fast.order == slow.order, "both remove the same heads in the same order"
    difference = float((fast.criterion.values - slow.criterion.values).abs().max())
    effect = float((slow.criterion.values - slow.criterion.values[:1]).abs().max())

    def forward() -> Tensor:
        with torch.no_grad():
            return model.model(pairs.clean, attention_mask=pairs.mask.long())

    seconds = medians(lambda: run("replay"), lambda: run("hooks"), repeats=2, warm=True)
    (plain,) = medians(forward, repeats=9)
    return {
        "name": "elimination",
        "ratio": round(seconds[1] / seconds[0], 2),
        "max_abs_difference": difference,
        "effect_over_difference": round(effect / max(difference, 1e-30), 1),
        "forwards": round(seconds[0] / plain, 2),
        "candidates": LAYERS * HEADS * (LAYERS * HEADS + 1) // 2,
        "seconds": round(seconds[0], 4),
        "threads": torch.get_num_threads(),
    }


RUNS = {"elimination": elimination}
