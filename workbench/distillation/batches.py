"""Which prompts a step takes, as a function of (seed, step) alone: nothing needs saving for an exact resume."""

import torch
from jaxtyping import Int
from torch import Tensor

from workbench import seeds
from workbench.errors import InputError


def batch_index(prompts: int, batch: int, step: int, *, seed: int) -> Int[Tensor, " batch"]:
    """The prompts of a step: consecutive pieces of a new shuffle each epoch, the ragged end left out."""
    per_epoch = prompts // batch
    order = torch.randperm(prompts, generator=seeds.generator(seed, "epoch", step // per_epoch))
    return order[(step % per_epoch) * batch :][:batch]


def require_divisible(batch: int, *, accumulate: int, processes: int) -> None:
    """Refuse a batch that does not split evenly: then the mean of the pieces' means would not be the batch's mean."""
    if batch % (accumulate * processes):
        raise InputError(
            f"a batch of {batch} prompts does not split evenly over {processes} process(es) of {accumulate} micro-batch(es); "
            f"make `batch` a multiple of {accumulate * processes}, or change `accumulate`."
        )
