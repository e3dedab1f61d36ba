"""Schedules as functions of the step alone, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

from workbench.distillation.config import TrainingConfig


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
