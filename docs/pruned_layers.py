"""Which half of a model's layers a task misses least: `python -m docs.pruned_layers FOLDER` prints what
`smollm2_boxes_half` keeps.

Of the layers that are left, all but the first, the one without which the answers to one train scene have the highest
mean log-probability is taken out, until half are left.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import workbench as wb
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import METRICS


@torch.no_grad()
def value_of(model: Any, layers: list[nn.Module], pairs: PromptPairs) -> float:
    """Mean log-probability of the answers with these layers alone."""
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    logits: Tensor = model(pairs.clean, attention_mask=pairs.mask.long(), use_cache=False, logits_to_keep=1).logits
    return float(METRICS["log_probability"](logits[:, -1], pairs.answers, pairs.distractors).mean())


def main() -> int:
    """Print the layers after each removal."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m docs.pruned_layers FOLDER\n")
        return 2
    pairs = wb.task("entity_tracking", boxes=5).pairs(wb.Teacher.load(sys.argv[1]), scenes=1, split="train")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    layers = list(model.model.layers)
    kept = list(range(len(layers)))
    while 2 * len(kept) > len(layers):
        shorter = [[each for each in kept if each != gone] for gone in kept[1:]]
        kept = max(shorter, key=lambda some: value_of(model, [layers[each] for each in some], pairs))
        sys.stdout.write(f"{kept}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
