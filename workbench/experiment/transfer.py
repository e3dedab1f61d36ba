"""What training on one task does to the others: accuracy on their test prompts, before and after (forgetting, or
transfer).

Asked for by `evaluation.transfer` of a recipe. The untrained student (`base`) is "before"; each trained condition and
seed is "after", on the same prompts. The teacher's accuracy says what there was to know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from workbench import storage
from workbench.circuits import evaluation
from workbench.experiment.conditions import TITLES
from workbench.experiment.origins import Origin, to_metadata
from workbench.experiment.prompts import Prompts
from workbench.experiment.recipe import TransferConfig
from workbench.experiment.results import in_columns
from workbench.experiment.results import read_outcomes as read_outcomes_of
from workbench.experiment.run import Run
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import plain_logits
from workbench.tasks.base import PromptPairs
from workbench.values.statistics import compared, mean_interval

FILE = "transfer.safetensors"
"""In a condition's folder: task -> which of its prompts were answered right."""


def transfer_outcomes(run: Run, model: HookedModel) -> dict[str, UInt8[Tensor, " prompt"]]:
    """Which test prompts of each other task a model answers right (1) or not (0)."""
    outcomes = {}
    for other in run.recipe.evaluation.transfer:
        prompts = run.read_by(model, transfer_prompts(run, other))
        outcomes[other.task] = evaluation.correct(plain_logits(model, prompts), prompts).to(torch.uint8)
    return outcomes


def transfer_prompts(run: Run, other: TransferConfig) -> PromptPairs:
    """Test prompts of another task, put to the models as the recipe puts its own."""
    data = replace(
        run.recipe.data,
        task=other.task,
        options=other.options,
        pairs=None,
        test_scenes=other.scenes,
        seed=other.seed,
    )
    return Prompts(replace(run.recipe, data=data), run.prompts.tokenizer, teacher=run.prompts.teacher).test


def record_transfer(run: Run, model: HookedModel, folder: Path, origin: Origin) -> None:
    """Write a model's outcomes on the other tasks beside its row, where the recipe asks for any."""
    if run.recipe.evaluation.transfer:
        storage.write_tensors(folder / FILE, transfer_outcomes(run, model), metadata=to_metadata(origin))


def transfer_table(outcomes: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> dict[str, Any]:
    """Condition -> the outcomes of its seeds (`base` and `teacher` among them) -> task -> condition -> accuracy, and
    its change from `base`.

    Accuracies with intervals over seeds; changes with intervals over seeds and over prompts, and McNemar's test
    (`workbench.values.statistics`).
    """
    if "base" not in outcomes:
        return {}
    before = outcomes["base"][0]
    return {
        task: {
            condition: _changed([seed[task].bool() for seed in seeds], right.bool())
            for condition, seeds in outcomes.items()
            if seeds
        }
        for task, right in before.items()
    }


def _changed(after: Sequence[Tensor], before: Tensor) -> dict[str, Any]:
    accuracy = mean_interval([float(right.float().mean()) for right in after])
    return {"accuracy": accuracy.to_json(), "change": compared(after, [before] * len(after)).to_json()}


def read_outcomes(folders: Sequence[Path]) -> list[dict[str, Tensor]]:
    """The outcomes that lie in some condition folders; those without any are left out."""
    return [read_outcomes_of(folder, FILE) for folder in folders if (folder / FILE).exists()]


def transfer_text(transfer: Mapping[str, Any]) -> str:
    """A transfer table as text: one row for each condition, for each task its accuracy and its change."""
    tasks = list(transfer)
    conditions = [name for name in TITLES if name in transfer[tasks[0]]]
    head = ["condition", *(column for task in tasks for column in (task.replace("_", " "), "change", "p"))]
    return in_columns(
        [
            head,
            *(
                [TITLES[name], *(cell for task in tasks for cell in _cells(name, transfer[task][name]))]
                for name in conditions
            ),
        ]
    )


def _cells(condition: str, value: Mapping[str, Any]) -> tuple[str, str, str]:
    accuracy, change = value["accuracy"], value["change"]["over_seeds"]
    if condition in ("base", "teacher"):
        return f"{accuracy['mean']:.3f}", "-", "-"
    return _interval(accuracy, ".3f"), _interval(change, "+.3f"), f"{value['change']['pooled_p']:.1g}"


def _interval(value: Mapping[str, Any], form: str) -> str:
    spread = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}}{spread}"
