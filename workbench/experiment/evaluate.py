"""The last stage: a model and its circuit on the test prompts, and the row of the results table that it gives."""

import logging

import torch
from torch import Tensor

from workbench.circuits import evaluation
from workbench.circuits.circuit import Circuit
from workbench.experiment.run import Run
from workbench.models.fused import attention
from workbench.models.hooked_model import HookedModel

log = logging.getLogger("workbench")


def evaluate(run: Run, model: HookedModel, circuit: Circuit) -> tuple[evaluation.CircuitReport, dict[str, Tensor]]:
    """A model and its circuit on the test prompts: the report, and which prompts were answered right (for paired
    tests)."""
    prompts, means, config = run.read_by(model, run.prompts.test), run.outside(model), run.recipe.evaluation
    with attention(model, config.attention):
        report, right = evaluation.evaluate_with_outcomes(
            model, prompts, circuit, means, scope=config.scope, random_circuits=config.random_circuits
        )
    return report, {name: value.to(torch.uint8) for name, value in right.items()}
