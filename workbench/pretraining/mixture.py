"""The mixture: its lessons, the tasks that they teach, their words, and how well a model does on held-out prompts."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from workbench.pretraining.lessons.boxes import BoxesLesson
from workbench.pretraining.lessons.exercise import Lesson
from workbench.pretraining.lessons.indirect import IndirectLesson
from workbench.pretraining.lessons.minds import MindsLesson
from workbench.pretraining.lessons.operations import OperationsLesson
from workbench.tasks.base import PromptPairs, Split, Task, encode, task_dataset
from workbench.tasks.entity_operations import EntityOperations
from workbench.tasks.entity_tracking import EntityTracking
from workbench.tasks.ioi import IndirectObject
from workbench.tasks.theory_of_mind import TheoryOfMind
from workbench.tasks.vocabulary import word_level_tokenizer

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


def held_out(name: str, *, split: Split, prompts: int, seed: int = 0) -> PromptPairs:
    """So many prompts of a task's split, at least; padded on the right, so that a causal model needs no mask."""
    tokenizer, task = mixture_tokenizer(), TASKS[name]
    scenes = -(-prompts // 7) if name == EntityTracking.name else prompts
    return encode(task_dataset(task, tokenizer, split=split, scenes=scenes, seed=seed), tokenizer, padding_side="right")


@torch.no_grad()
def answered_right(model: LlamaForCausalLM, pairs: PromptPairs) -> Bool[Tensor, " batch"]:
    """Which prompts a model answers with the right word, of the whole vocabulary."""
    right = []
    for part in pairs.batches(128):
        hidden = model.model(part.clean, use_cache=False).last_hidden_state[part.position("last")]
        right.append(model.lm_head(hidden).argmax(-1) == part.answers)
    return torch.cat(right)


def accuracies(model: LlamaForCausalLM, *, split: Split, prompts: int, seed: int = 0, names: Sequence[str] = tuple(TASKS)) -> dict[str, float]:
    """Accuracy on held-out prompts of each task."""
    return {name: float(answered_right(model, held_out(name, split=split, prompts=prompts, seed=seed)).float().mean()) for name in names}
