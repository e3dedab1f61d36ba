"""Answers of several tokens: accuracy is that of decoding, and a loss over all their tokens that of a plain loop."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distillation.distilling import CONFIG, PLAIN, aligning
from tests.tasks.test_prompt_settings import LONG, long_pairs
from workbench.distillation.answers import answered
from workbench.distillation.assembly import teacher_outputs, trained_slices
from workbench.distillation.backward import backward
from workbench.distillation.loop import Distillation
from workbench.distillation.processes import launched
from workbench.distillation.reports import validated
from workbench.distillation.teacher_cache import LiveTeacher, computed
from workbench.distillation.teacher_shards import Top
from workbench.distillation.trainers import IGNORED, training_rows
from workbench.errors import InputError
from workbench.matching.aligned_pairs import AlignedPair
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, Student, Teacher
from workbench.tasks.base import PromptPairs
from workbench.tasks.forcing import forced, greedy_answers, whole_answers_right
from workbench.values.refs import Head

Loader = Callable[..., Any]
PAIR = AlignedPair(
    student=Head(1, 0), teacher=Head(1, 0), student_positions=("answering",), teacher_positions=("answering",)
)
TASK_LOSSES = ("ce_truth", "ce_teacher", "kl_teacher", "reverse_kl_teacher", "jsd_teacher")


def twelve() -> PromptPairs:
    """The three pairs, their answers of 2, 1 and 3 tokens, four times over."""
    return long_pairs().rows(torch.arange(3).repeat(4))


def decoded(model: HookedModel, prompt: list[int], count: int) -> tuple[list[int], list[torch.Tensor]]:
    """The slow reference: one unpadded run for each token; (tokens, logits)."""
    tokens, logits = list(prompt), []
    for _ in range(count):
        read = torch.tensor([tokens])
        with torch.no_grad():
            logits.append(model.final_logits(read, torch.ones_like(read, dtype=torch.bool))[0])
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], logits


def test_an_answer_is_right_just_where_decoding_gives_it(load_teacher: Loader) -> None:
    right = []
    for seed in range(3):
        model, pairs = load_teacher(seed=seed), long_pairs()
        own = greedy_answers(model, pairs)
        for row, (tokens, wanted) in enumerate(zip(own.tolist(), pairs.answer_tokens.tolist(), strict=True)):
            count = sum(token >= 0 for token in wanted)
            plain, _ = decoded(model, pairs.clean[row][pairs.mask[row]].tolist(), count)
            assert tokens == [*plain, *[-1] * (len(tokens) - count)]
        assert whole_answers_right(model, replace(pairs, answer_tokens=own)).all()
        for row, token in [(0, 0), (0, 1), (1, 0), (2, 2)]:  # one token is another: the answer is wrong, and it alone
            changed = own.clone()
            changed[row, token] = (changed[row, token] + 1) % 20
            verdict = whole_answers_right(model, replace(pairs, answer_tokens=changed))
            assert [index for index in range(3) if not verdict[index]] == [row]
        right.append((own == pairs.answer_tokens).all(1))
        assert torch.equal(whole_answers_right(model, pairs), right[-1])
        assert torch.equal(whole_answers_right(model, pairs, batch=1), right[-1])


def run_of(student: Student, teacher: Teacher, config: Any, prompts: PromptPairs, outputs: Any = None) -> Distillation:
    names = [hooks.z(1)] if config.weight else []
    pairs = [PAIR] if config.weight else []
    held = computed(teacher, prompts, names) if outputs is None else outputs
    slices = trained_slices(student, [Head(1, 0), Head(2, 3)], config, train_kv=True, seed=0)
    return Distillation(student, slices, prompts, held, pairs, config, seed=3)


def by_loop(loss: str, student: HookedModel, teacher: HookedModel, pairs: PromptPairs) -> float:
    """Token by token from unpadded runs: a mean over prompts of means over answers."""
    assert pairs.answer_tokens is not None
    means = []
    for row in range(len(pairs)):
        prompt = pairs.clean[row][pairs.mask[row]].tolist()
        answer = [token for token in pairs.answer_tokens[row].tolist() if token >= 0]
        if loss == "ce_teacher":
            answer = decoded(teacher, prompt, len(answer))[0]
        values = []
        for place, token in enumerate(answer):
            read = torch.tensor([[*prompt, *answer[:place]]])
            with torch.no_grad():
                ours, theirs = (
                    model.final_logits(read, torch.ones_like(read, dtype=torch.bool))[0].double().log_softmax(-1)
                    for model in (student, teacher)
                )
            middle = (0.5 * (ours.exp() + theirs.exp())).log()
            kl = lambda p, q: float((p.exp() * (p - q)).sum())  # noqa: E731
            values.append(
                {
                    "ce_truth": -float(ours[token]),
                    "ce_teacher": -float(ours[token]),
                    "kl_teacher": kl(theirs, ours),
                    "reverse_kl_teacher": kl(ours, theirs),
                    "jsd_teacher": (kl(ours, middle) + kl(theirs, middle)) / 2,
                }[loss]
            )
        means.append(sum(values) / len(values))
    return sum(means) / len(means)


@pytest.mark.parametrize("loss", TASK_LOSSES)
def test_the_loss_over_whole_answers_is_that_of_a_plain_loop(
    load_teacher: Loader, load_student: Loader, tmp_path: Path, loss: Any
) -> None:
    teacher, student, pairs = load_teacher(seed=1), load_student(), long_pairs()
    config = replace(PLAIN, task_loss=loss, batch=4)
    prompts = answered(twelve(), teacher, student, config)
    index = torch.arange(3)
    expected = by_loop(loss, student, teacher, pairs)
    ways = [computed(teacher, prompts, []), LiveTeacher(teacher, prompts, [])]
    if loss != "ce_truth":
        everything = Top(k=teacher.d_vocab)
        ways.append(teacher_outputs("shards", teacher, prompts, [], tmp_path, top=everything))
    for outputs in ways:
        task, _, _ = run_of(student, teacher, config, prompts, outputs).losses(index)
        assert task is not None
        assert float(task.detach()) == pytest.approx(expected, abs=1e-5)
    first, _, _ = run_of(
        student, teacher, config, answered(twelve(), teacher, student, replace(config, answers="first"))
    ).losses(index)
    assert first is not None
    assert abs(float(first.detach()) - expected) > 1e-3, "the later tokens count: a hundred times the tolerance"
    if loss not in ("ce_truth", "ce_teacher"):
        own, _, _ = run_of(load_student(seed=1), teacher, config, prompts).losses(index)
        assert own is not None
        assert abs(float(own.detach())) < 1e-6, "a student that is its teacher has nothing to learn"


def test_pieces_of_a_batch_and_the_alignment_over_all_answer_tokens(load_teacher: Loader, load_student: Loader) -> None:
    """4 accumulated pieces = the batch; the aligned rows are all answer tokens, and heads equal to themselves agree."""
    teacher, config = load_teacher(seed=1), replace(aligning(CONFIG, weight=0.5), batch=12)
    prompts = answered(twelve(), teacher, teacher, config)
    index = torch.arange(12)
    gradients = []
    for pieces in (1, 4):
        student = load_student()
        run = run_of(student, teacher, replace(config, accumulate=pieces), prompts)
        assert run.objective.row_counts(index) == [4 * (2 + 1 + 3)]
        with run.slices.gradients():
            backward(run.objective, index, 0.5, launched(student.device), lambda *_: nullcontext())
            run.slices.collect_gradients()
            gradients.append(
                torch.cat([leaf.grad.flatten() for leaf in run.slices.leaves.values() if leaf.grad is not None])
            )
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert gradients[0].abs().max() > 1e-3
    _, alignment, ckas = run_of(load_student(seed=1), teacher, config, prompts).losses(index)
    assert alignment is not None
    assert float(alignment.detach()) == pytest.approx(0, abs=1e-5)
    assert float(ckas[0]) == pytest.approx(1, abs=1e-5)


def test_answers_of_one_token_train_to_the_same_bits(
    load_teacher: Loader, load_student: Loader, tmp_path: Path
) -> None:
    teacher, whole = load_teacher(seed=1), long_pairs().rows(torch.ones(12, dtype=torch.long))
    assert whole.answer_tokens is not None
    single = replace(whole, answer_tokens=whole.answer_tokens[:, :1], distractor_tokens=None)
    plain, trained = replace(whole, answer_tokens=None, distractor_tokens=None), []
    for number, pairs in enumerate((single, plain)):
        student, config = load_student(), replace(PLAIN, steps=2, checkpoint_every=2)
        prompts = answered(pairs, teacher, student, config)
        assert prompts is pairs
        (tmp_path / str(number)).mkdir()
        run_of(student, teacher, config, prompts).run(tmp_path / str(number))
        trained.append({name: value.detach().clone() for name, value in student.parameters().items()})
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_validation_rows_and_refusals(load_teacher: Loader, load_student: Loader) -> None:
    teacher, student, pairs = load_teacher(seed=1), load_student(seed=1), long_pairs()
    own = replace(pairs, answer_tokens=greedy_answers(teacher, pairs))
    assert own.answer_tokens is not None
    wrong = own.answer_tokens.clone()
    wrong[0, 1] = (wrong[0, 1] + 1) % 20
    assert validated(student, own) == 1.0
    assert validated(student, replace(own, answer_tokens=wrong)) == pytest.approx(2 / 3), "the second token counts"
    student.model.eval()
    rows: Any = training_rows(pairs)
    for row, pair, ids in zip(rows, LONG, pairs.answer_tokens.tolist(), strict=True):
        answer = [token for token in ids if token >= 0]
        assert row["input_ids"][-len(answer) :] == [label for label in row["labels"] if label != IGNORED] == answer, (
            pair
        )
    assert forced(pairs).prompts() == pairs.prompts(), "disjointness is of prompts, whatever follows them"
    with pytest.raises(InputError, match="append answers once"):
        forced(forced(pairs))
    with pytest.raises(InputError, match="padded on the left"):
        greedy_answers(teacher, long_pairs(padding_side="right"))
    with pytest.raises(InputError, match="multi_token=True"):
        whole_answers_right(teacher, replace(pairs, answer_tokens=None))
    with pytest.raises(InputError, match="whole answers are other tokens"):
        answered(replace(pairs, teacher=pairs), teacher, student, PLAIN)
