"""Lessons say what the tasks say: every answer is worked out again from the text alone, and no lesson tells a scene of
another split."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench.pretraining.config import CourseConfig, SizeConfig
from workbench.pretraining.course import Course, losses
from workbench.pretraining.lessons.boxes import BoxesLesson
from workbench.pretraining.lessons.exercise import Exercise, Lesson, collate
from workbench.pretraining.mixture import TASKS, held_out, mixture_lessons, mixture_tokenizer
from workbench.pretraining.models import new_model, pruned, with_layers
from workbench.tasks.base import task_dataset
from workbench.tasks.entity_tracking import split_of as scene_split
from workbench.tasks.ioi import NAMES
from workbench.tasks.ioi import split_of as names_split
from workbench.tasks.wording import split_by_hash

LESSONS = {lesson.name: lesson for lesson in mixture_lessons()}
CASES = [(name, level) for name, lesson in LESSONS.items() for level in range(lesson.levels)]
TINY = SizeConfig(layers=3, heads=4, kv_heads=2, d_head=4, d_model=16, d_mlp=16)


def solved_boxes(text: str) -> str:
    return {label: thing for thing, label in re.findall(r"[Tt]he (\w+) is in Box (\w)", text)}[
        re.findall(r"Box (\w) contains the$", text)[0]
    ]


def solved_operations(text: str) -> str:
    """Every sentence done one after the other, on a table of boxes."""
    boxes: dict[str, str] = {}
    for done in re.finditer(
        r"[Tt]he (\w+) is in Box (\w)|Box (\w) is empty|Move the \w+ from Box (\w) to Box (\w)|Put the (\w+) into Box "
        r"(\w)|Remove the \w+ from Box (\w)",
        text,
    ):
        thing, box, empty, source, target, new, into, cleared = done.groups()
        if thing:
            boxes[box] = thing
        if source:
            boxes[target] = boxes.pop(source)
        if new:
            boxes[into] = new
        if cleared:
            del boxes[cleared]
        assert empty is None or empty not in boxes
    return boxes.get(re.findall(r"What is in Box (\w) \? Answer :$", text)[0], "nothing")


def solved_minds(text: str) -> str:
    filled = {
        thing: (who, content)
        for who, thing, content in re.findall(r"(\w+) \w+ a \w+ (\w+) and \w+ it with (\w+)", text)
    }
    sees = dict(re.findall(r"(\w+) (can|cannot) ", text))
    who, container = re.findall(r"What does (\w+) \w+ the (\w+) \w+ \? Answer :$", text)[0]
    owner, content = filled[container]
    return content if owner == who or sees[who] == "can" else "unknown"


def solved_indirect(text: str) -> str:
    names = [word for word in text.split() if word in NAMES]
    (once,) = {name for name in names if names.count(name) == 1}
    return once


ORACLES = {
    "entity_tracking": solved_boxes,
    "entity_operations": solved_operations,
    "theory_of_mind": solved_minds,
    "ioi": solved_indirect,
}


def context_of(exercise: Exercise, number: int) -> str:
    """The text up to a question, with the answered questions between the first and it left out: the prompt of the
    task."""
    starts = [0, *(mark.at + 2 + (exercise.words[mark.at + 2 : mark.at + 3] == (".",)) for mark in exercise.answers)]
    queries = [exercise.words[start : mark.at + 1] for start, mark in zip(starts, exercise.answers, strict=False)]
    first = exercise.words[: exercise.answers[0].at + 1]
    if number == 0:
        return " ".join(first)
    return " ".join((*first[: len(first) - len(queries[number])], *queries[number]))


@pytest.mark.parametrize(("name", "level"), CASES)
def test_answers_are_those_of_the_text(name: str, level: int) -> None:
    draw, answers = random.Random(level), []
    for _ in range(60):
        exercise = LESSONS[name].exercise(draw, level)
        for number, mark in enumerate(exercise.answers):
            assert exercise.words[mark.at + 1] == mark.word
            assert ORACLES[name](context_of(exercise, number)) == mark.word
            answers.append(mark.word)
    assert len(set(answers)) > 10, "the questions have many answers"


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_oracles_solve_the_tasks(name: str) -> None:
    tokenizer = mixture_tokenizer()
    rows = task_dataset(TASKS[name], tokenizer, split="test", scenes=40, seed=3)
    for text, answer in zip(rows["clean"][:], rows["answer"][:], strict=True):
        assert ORACLES[name](" ".join(re.findall(r"\w+|[^\w\s]", text))) == answer.strip()


@pytest.mark.parametrize("name", sorted(LESSONS))
def test_the_last_level_asks_in_the_words_of_the_task(name: str) -> None:
    """The words that every prompt of the task has in the same place from the end: an exercise has them there too."""
    lesson, draw, pairs = LESSONS[name], random.Random(5), held_out(name, split="train", prompts=200)
    ids = mixture_tokenizer().get_vocab()
    ends = [row[keep][-12:].tolist() for row, keep in zip(pairs.clean, pairs.mask, strict=True)]
    allowed = [set(column) for column in zip(*ends, strict=True)]
    hits = 0
    for _ in range(50):
        exercise = lesson.exercise(draw, lesson.levels - 1)
        end = [ids[word] for word in exercise.words[: exercise.answers[0].at + 1]][-12:]
        hits += sum(token in seen for token, seen in zip(end, allowed, strict=True))
    assert hits > 0.9 * 50 * 12
    fixed = [column for column in allowed if len(column) == 1]
    assert fixed, "some words are in every prompt"


@pytest.mark.parametrize("name", sorted(LESSONS))
def test_only_scenes_of_the_train_split(name: str) -> None:
    lesson, draw = LESSONS[name], random.Random(6)
    for _ in range(80):
        text = context_of(lesson.exercise(draw, lesson.levels - 1), 0)
        if name == "entity_tracking":
            assert scene_split(tuple(re.findall(r"[Tt]he (\w+) is in Box (\w)", text))) == "train"
        if name == "ioi":
            names = list(dict.fromkeys(word for word in text.split() if word in NAMES))
            assert names_split((names[0], names[1])) == "train"
        if name == "theory_of_mind":
            filled = re.findall(r"(\w+) \w+ a \w+ (\w+) and \w+ it with (\w+)", text)
            assert split_by_hash(word for parts in filled for word in parts) == "train"


@pytest.mark.parametrize(("name", "level"), CASES)
def test_looks_go_to_what_decides(name: str, level: int) -> None:
    draw = random.Random(7)
    for _ in range(20):
        exercise = LESSONS[name].exercise(draw, level)
        for look, asked in zip(
            exercise.looks.get("fetch", ()),
            exercise.probes.get("queried_label", exercise.probes.get("asked_label", ())),
            strict=False,
        ):
            assert (look.at, exercise.words[look.to]) == (asked.at, asked.word)
            later = exercise.words[look.to + 1 : exercise.answers[0].at - (4 if name == "entity_operations" else 3)]
            assert asked.word not in later, "no later mention of the box"
        for look, sight in zip(exercise.looks.get("sight", ()), exercise.probes.get("sight", ()), strict=True):
            assert exercise.words[look.to] == sight.word


def _batch_and_model(lesson: Lesson) -> tuple[list[Exercise], nn.Module]:
    draw = random.Random(8)
    return [lesson.exercise(draw, lesson.levels - 1) for _ in range(5)], new_model(
        TINY, len(mixture_tokenizer()), seed=1
    )


@pytest.mark.parametrize("name", sorted(LESSONS))
def test_padding_changes_no_loss(name: str) -> None:
    """The loss of a padded batch is the mean over answers of the losses of its exercises alone."""
    exercises, model = _batch_and_model(LESSONS[name])
    vocabulary = mixture_tokenizer().get_vocab()
    with torch.no_grad():
        together = losses(model, None, LESSONS[name], collate(exercises, vocabulary))[0].item()
        alone = [
            losses(model, None, LESSONS[name], collate([exercise], vocabulary))[0].item() * len(exercise.answers)
            for exercise in exercises
        ]
    assert together == pytest.approx(sum(alone) / sum(len(exercise.answers) for exercise in exercises), rel=1e-5)


def test_an_even_head_looks_everywhere_alike() -> None:
    """A model whose queries are zero attends evenly: a look from token t then costs log(t + 1)."""
    lesson, vocabulary = BoxesLesson(), mixture_tokenizer().get_vocab()
    course = Course(new_model(TINY, len(vocabulary), seed=1), vocabulary, [lesson], CourseConfig(), label="even")
    for layer in course.model.model.layers:
        nn.init.zeros_(layer.self_attn.q_proj.weight)
    for probe in course.probes.values():
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
    batch = collate([lesson.exercise(random.Random(1), 3) for _ in range(3)], vocabulary)
    _, probe, _ = losses(course.model, course.probes, lesson, batch)
    looks = batch.looks["fetch"].at.add(1).log().mean().item()
    assert probe.item() == pytest.approx(looks + len(lesson.probe_layers) * math.log(len(vocabulary)), rel=1e-5)


def test_a_resumed_course_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    config = CourseConfig(tokens=120, rows=3, warmup=2)

    def begun() -> Course:
        return Course(
            new_model(TINY, len(mixture_tokenizer()), seed=1),
            mixture_tokenizer().get_vocab(),
            mixture_lessons(),
            config,
            label="test",
        )

    whole, first, second = begun(), begun(), begun()
    for _ in range(5):
        whole.advance()
    for _ in range(3):
        first.advance()
    first.resting.append("ioi")
    first.save(tmp_path)
    second.resume(tmp_path)
    assert second.resting == ["ioi"]
    second.resting.clear()
    for _ in range(2):
        second.advance()
    assert second.log == whole.log
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert not torch.equal(whole.model.lm_head.weight, begun().model.lm_head.weight), "training moved the model"


def test_a_passed_lesson_goes_up_a_level_and_a_solved_one_costs_half() -> None:
    course = Course(
        new_model(TINY, len(mixture_tokenizer()), seed=1),
        mixture_tokenizer().get_vocab(),
        [BoxesLesson()],
        CourseConfig(passed=-1.0),
        label="up",
    )
    for _ in range(12):
        course.advance()
    assert course.levels["entity_tracking"] == 5, "any accuracy passes here; the last level stays"
    rows = course._batch(course.lessons[0])[1].tokens.shape[0]
    course.accuracy["entity_tracking"] = 0.99
    assert course.finished
    assert course._batch(course.lessons[0])[1].tokens.shape[0] == pytest.approx(rows / 2, abs=1)


def test_pruning_keeps_the_layers_that_cost_least() -> None:
    """A layer that writes nothing is the one to drop, and dropping it changes nothing."""
    model = new_model(TINY, 30, seed=2)
    for matrix in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        nn.init.zeros_(matrix.weight)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        target = model(tokens).logits
        smaller, kept = pruned(model, 2, lambda candidate: float((candidate(tokens).logits - target).abs().max()))
        assert kept == [0, 2]
        assert torch.allclose(smaller(tokens).logits, target, atol=1e-6)
        assert (with_layers(model, (0, 1))(tokens).logits - target).abs().max() > 1e-3
