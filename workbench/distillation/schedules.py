"""Which prompts, learning rate and lambda a step takes, as functions of (seed, step) alone: an exact resume needs no
scheduler state."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import get_scheduler

from workbench import seeds
from workbench.distillation.config import TrainingConfig
from workbench.errors import InputError


def share_of_rate(config: TrainingConfig, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Step -> the factor of the learning rate, from the schedules of `transformers`."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(name, optimizer, config.warmup, config.steps)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    return scheduler.lr_lambdas[0]


def alignment_weight(config: TrainingConfig, step: int) -> float:
    """lambda at a step (from 0). With w = `weight`, s = `weight_steps` and t = min(step / s, 1):

    linear_warmup w t, cosine_warmup w (1 - cos(pi t)) / 2, and the decays w minus these; constant w.
    """
    if config.weight_schedule == "constant":
        return config.weight
    done = min(step / (config.weight_steps or config.steps), 1.0)
    risen = done if config.weight_schedule.startswith("linear") else (1 - math.cos(math.pi * done)) / 2
    return config.weight * (risen if config.weight_schedule.endswith("warmup") else 1 - risen)


def batch_index(prompts: int, batch: int, step: int, *, seed: int) -> Int[Tensor, " batch"]:
    """The prompts of a step: consecutive pieces of a new shuffle each epoch, the ragged end left out."""
    per_epoch = prompts // batch
    order = torch.randperm(prompts, generator=seeds.generator(seed, "epoch", step // per_epoch))
    return order[(step % per_epoch) * batch :][:batch]


def require_divisible(batch: int, *, accumulate: int, processes: int) -> None:
    """Refuse a batch that does not split evenly: then the mean of the pieces' means would not be the batch's mean."""
    if batch % (accumulate * processes):
        raise InputError(
            f"a batch of {batch} prompts does not split evenly over {processes} process(es) of {accumulate} "
            "micro-batch(es); "
            f"make `batch` a multiple of {accumulate * processes}, or change `accumulate`."
        )
