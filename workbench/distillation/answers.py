"""The teacher's answers for a student with another tokenizer: its likeliest among the task's words, as text, in the
student's tokens.

Which words: the answers and distractors of the training prompts, whose two readings say what token each is for either
model. The rest of the teacher's vocabulary has no counterpart, so its logits are never compared with the student's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.distillation.config import TaskLoss
from workbench.distillation.losses import DIVERGENCES
from workbench.errors import InputError
from workbench.tasks.base import PromptPairs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswerWords:
    """The words that a teacher may answer with, by their tokens in each tokenizer."""

    teacher: Int[Tensor, " words"]
    student: Int[Tensor, " words"]

    def labels(self, logits: Float[Tensor, "rows d_vocab"]) -> Int[Tensor, " rows"]:
        """The student's token of the word that the teacher finds likeliest."""
        return self.student.to(logits.device)[logits[:, self.teacher.to(logits.device)].argmax(-1)]


def answer_words(prompts: PromptPairs) -> AnswerWords:
    """The answers and distractors of prompts with two readings. Errors: `InputError` where a token of one is several
    words in the other."""
    sides = (prompts.for_teacher, prompts)
    words = torch.stack([torch.cat([side.answers, side.distractors]) for side in sides], 1).unique(dim=0)
    if any(len(side.unique()) < len(words) for side in words.T):
        raise InputError(
            "several answers begin with one token in one of the tokenizers, so the teacher's can't be told apart by "
            "it; set task_loss to ce_truth."
        )
    return AnswerWords(teacher=words[:, 0], student=words[:, 1])


def require_own_vocabulary(task_loss: TaskLoss, prompts: PromptPairs) -> None:
    """Refuse, on prompts with two readings, a task loss that compares the logits of the two, or labels that can't be
    told apart."""
    if prompts.teacher is None:
        return
    if task_loss in DIVERGENCES:
        raise InputError(
            f"the models have different tokenizers, so task loss {task_loss} has no common vocabulary to compare their "
            "logits on; use ce_truth or "
            "ce_teacher (its answers as words), and leave the condition full_kl out."
        )
    if task_loss == "ce_teacher":
        answer_words(prompts)
