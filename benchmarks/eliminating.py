"""Backward elimination: exactly, against the same elimination as a loop of hooked forwards; and by the gradients of
gates, against the exact one.

What the exact question costs at least, in plain forwards F (L layers, H heads, n = L H parts): n (n + 1) / 2
candidates, each of which leaves alone what is below its layer and, in the last layer, every token but the last: half of
F on average, and less as layers empty, for what removed heads write is a constant. The loop takes F and its hooks for
each.
"""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import subjects
from benchmarks.timing import medians
from workbench.circuits.elimination import Elimination, EliminationConfig, eliminate
from workbench.circuits.remaining import Remaining
from workbench.experiment.prompts import Prompts
from workbench.experiment.recipe import read_recipe
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import reference_means
from workbench.patching.execution import Engine, Execution
from workbench.storage import located

LAYERS, HEADS = 6, 8


def elimination() -> dict[str, Any]:
    """All 48 heads one after another, 8 prompts of 24 tokens, by the answer's log-probability at the last token."""
    model = subjects.llama(layers=LAYERS, heads=HEADS, kv_heads=HEADS, d_model=128, d_head=16)
    pairs = subjects.random_pairs(8, 24)
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

    seconds = medians(lambda: run("replay"), lambda: run("hooks"), repeats=2, warm=True, clock=time.process_time)
    (plain,) = medians(forward, repeats=9, clock=time.process_time)
    return {
        "name": "elimination",
        "ratio": round(seconds[1] / seconds[0], 2),
        "max_abs_difference": difference,
        "effect_over_difference": round(effect / max(difference, 1e-30), 1),
        "forwards": round(seconds[0] / plain, 2),
        "candidates": LAYERS * HEADS * (LAYERS * HEADS + 1) // 2,
        "cpu_seconds": round(seconds[0], 4),
        "threads": torch.get_num_threads(),
    }


BUNDLED = {"mixture-teacher": ("mind", {}), "teacher": ("demo", {"data.discovery_scenes": 8})}
"""Bundled teachers with the recipes that say their prompts; entity tracking on 56 of them."""
FAST: dict[str, Any] = {"exact_from": 12, "round_share": 0.3, "round_steps": 2, "prompts": 30}


def fast() -> dict[str, Any]:
    """Elimination by gates against exact elimination on the bundled teachers: accuracy on fresh prompts at the size of
    the exact circuit, and the forwards over prompts that each took."""
    rows = {name: _fast(name, *recipe) for name, recipe in BUNDLED.items()}
    return {
        "name": "elimination-fast",
        "forwards_share": {name: round(row["fast_runs"] / row["exact_runs"], 4) for name, row in rows.items()},
        "accuracy_difference": {name: round(row["fast"] - row["exact"], 4) for name, row in rows.items()},
        "bundled": rows,
        "threads": torch.get_num_threads(),
    }


def _fast(name: str, recipe: str, overrides: dict[str, Any]) -> dict[str, Any]:
    model = Teacher.load(located(name))
    prompts = Prompts(read_recipe(recipe, overrides=overrides), model.tokenizer)
    means, test = reference_means(model, prompts.reference), prompts.test.rows(slice(0, 280))
    quiet = Execution(progress=False)
    exact = eliminate(model, prompts.discovery, means, EliminationConfig(target=0.9), execution=quiet)
    size = len(exact.left(exact.removals))
    fast = eliminate(model, prompts.discovery, means, EliminationConfig(target=0.9, **FAST), execution=quiet)
    removals = min(len(exact.sites) - size, len(fast.order))
    fresh = Remaining(model, test, means, "log_probability", quiet)

    def accuracy(result: Elimination, removed: int) -> float:
        gone = [(site.part, site.position) for site in result.order[:removed]]
        return float(fresh.after(gone)[1].mean())

    return {
        "parts": len(exact.sites),
        "size": size,
        "fast_size": len(fast.sites) - removals,
        "full": float(fresh.after([])[1].mean()),
        "exact": accuracy(exact, exact.removals),
        "fast": accuracy(fast, removals),
        "exact_runs": exact.runs,
        "fast_runs": fast.runs,
    }


RUNS = {"elimination": elimination, "elimination-fast": fast}
