"""The mixture: its lessons, the tasks that they teach, their words, and how well a model does on held-out prompts."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from workbench.pretraining.lessons.boxes import BoxesLesson
from workbench.pretraining.lessons.exercise import Lesson
from workbench.pretraining.lessons.indirect import IndirectLesson
from workbench.pretraining.lessons.minds import MindsLesson
from workbench.pretraining.lessons.operations import OperationsLesson
from workbench.tasks.base import PromptPairs, Split, Task, encode, task_dataset
from workbench.tasks.breakdown import accuracy_by
from workbench.tasks.entity_operations import EntityOperations
from workbench.tasks.entity_tracking import EntityTracking
from workbench.tasks.ioi import IndirectObject
from workbench.tasks.theory_of_mind import TheoryOfMind
from workbench.tasks.vocabulary import word_level_tokenizer
from workbench.values.scores import wilson_interval

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (EntityTracking(boxes=7), EntityOperations(), TheoryOfMind(), IndirectObject())}
)
"""What the mixture teaches, at the settings that accuracies are told for."""


def mixture_lessons() -> tuple[Lesson, ...]:
    """One lesson for each task, of the same name."""
    return BoxesLesson(), OperationsLesson(), MindsLesson(), IndirectLesson()


def mixture_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the mixture's tasks."""
    return word_level_tokenizer(sorted({word for task in TASKS.values() for word in getattr(task, "words", ())}))


def held_out_rows(name: str, *, split: Split, prompts: int, seed: int = 0) -> Dataset:
    """So many prompts of a task's split, or up to 6 more (a scene of entity tracking is asked at each of its boxes)."""
    task = TASKS[name]
    scenes = -(-prompts // 7) if name == EntityTracking.name else prompts
    return task_dataset(task, mixture_tokenizer(), split=split, scenes=scenes, seed=seed)


@functools.cache
def held_out(name: str, *, split: Split, prompts: int, seed: int = 0) -> PromptPairs:
    """The same as tensors, padded on the right, so that a causal model needs no mask."""
    return encode(
        held_out_rows(name, split=split, prompts=prompts, seed=seed), mixture_tokenizer(), padding_side="right"
    )


@torch.no_grad()
def answered_right(model: LlamaForCausalLM, pairs: PromptPairs) -> Bool[Tensor, " batch"]:
    """Which prompts a model answers with the right word, of the whole vocabulary."""
    right = []
    for part in pairs.batches(128):
        hidden = model.model(part.clean, use_cache=False).last_hidden_state[part.position("last")]
        right.append(model.lm_head(hidden).argmax(-1) == part.answers)
    return torch.cat(right)


def accuracies(model: LlamaForCausalLM, *, split: Split, prompts: int, seed: int = 0) -> dict[str, float]:
    """Accuracy on held-out prompts of each task."""
    return {
        name: float(answered_right(model, held_out(name, split=split, prompts=prompts, seed=seed)).float().mean())
        for name in TASKS
    }


def accuracy_report(model: LlamaForCausalLM, *, prompts: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Each task on test prompts: accuracy with its 95 % Wilson interval, chance, and accuracy by each fact that the
    task records."""
    report = {}
    for name, task in TASKS.items():
        rows = held_out_rows(name, split="test", prompts=prompts, seed=seed)
        right = answered_right(model, encode(rows, mixture_tokenizer(), padding_side="right"))
        facts = rows.features.get("facts", {})
        report[name] = {
            "prompts": len(rows),
            "accuracy": float(right.float().mean()),
            "interval": list(wilson_interval(int(right.sum()), len(right))),
            "chance": task.chance,
            "by": {fact: accuracy_by(rows, right, fact=fact).to_dict("records") for fact in facts},
        }
    return report


def report_table(reports: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Reports of several models as a table: one row for each task, and for operations one for each number that touches
    the queried box."""
    lines = []
    for name, task in TASKS.items():
        lines.append(
            [
                name.replace("_", " "),
                f"{task.chance:.2f}",
                *(_accuracy_text(report[name]) for report in reports.values()),
            ]
        )
    by = {
        model: {row["touching"]: row for row in report[EntityOperations.name]["by"]["touching"]}
        for model, report in reports.items()
    }
    for count in sorted({count for rows in by.values() for count in rows}):
        lines.append(
            [
                f"  {count} operations touch the box",
                "",
                *(f"{rows[count]['accuracy']:.3f} ({rows[count]['prompts']})" for rows in by.values()),
            ]
        )
    return pd.DataFrame(lines, columns=["task", "chance", *reports])


def _accuracy_text(accuracy: Mapping[str, Any]) -> str:
    return f"{accuracy['accuracy']:.3f} [{accuracy['interval'][0]:.3f}, {accuracy['interval'][1]:.3f}]"
