"""The teacher's answers for a student with another tokenizer: its likeliest among the task's words, as text, in the
student's tokens.

Which words: the answers and distractors of the training prompts, whose two readings say what token each is for either
model. The rest of the teacher's vocabulary has no counterpart, so its logits are never compared with the student's.
`answered` appends answers of several tokens to the prompts, for losses over all of them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.distillation.config import TaskLoss, TrainingConfig
from workbench.distillation.losses import DIVERGENCES
from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs
from workbench.tasks.forcing import forced, greedy_answers


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
    words = torch.stack([torch.cat([side.answers.flatten(), side.distractors.flatten()]) for side in sides], 1)
    words = words[(words >= 0).all(1)].unique(dim=0)
    if any(len(side.unique()) < len(words) for side in words.T):
        raise InputError(
            "several answers begin with one token in one of the tokenizers, so the teacher's can't be told apart by "
            "it; set task_loss to ce_truth."
        )
    return AnswerWords(teacher=words[:, 0], student=words[:, 1])


def answered(prompts: PromptPairs, teacher: HookedModel, student: HookedModel, config: TrainingConfig) -> PromptPairs:
    """The training prompts with the answers that the loss is taken on after them, where these have several tokens.

    With `ce_teacher` they are the teacher's, by greedy decoding; with any other loss the right ones, which the teacher
    reads too. Prompts whose answers have one token, and all with `answers: first`, stay as they are. Errors:
    `InputError` for the teacher's answers in another tokenizer's tokens, and tokens that the student does not have.
    """
    several = prompts.answer_tokens is not None and prompts.answer_tokens.shape[1] > 1
    if not several or config.answers == "first":
        return prompts
    if config.weight > 0 and config.alignment is not None and config.alignment.interchanges:
        raise InputError(
            "an interchange compares the models at the prompt's last token, so it sees the first token of an answer "
            "alone; set `answers` to first, or another alignment loss."
        )
    if config.task_loss != "ce_teacher":
        return forced(prompts)
    if prompts.teacher is not None:
        raise InputError(
            "the models have different tokenizers, so the teacher's whole answers are other tokens to the student; set "
            "task_loss to ce_truth, or `answers` to first."
        )
    tokens = greedy_answers(teacher, prompts)
    if int(tokens.max()) >= student.d_vocab:
        raise InputError(
            f"the teacher answers with token {int(tokens.max())}, which the student (of {student.d_vocab}) does not "
            "have; use task loss ce_truth, or models of one vocabulary."
        )
    return forced(prompts, tokens)


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
