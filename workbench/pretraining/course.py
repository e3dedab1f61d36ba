"""A curriculum over several lessons at once: each goes up its own levels, all share every optimizer step."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from workbench import seeds
from workbench.pretraining.config import CourseConfig
from workbench.pretraining.curriculum import Curriculum, linear_probes
from workbench.pretraining.lessons.exercise import Batch, Lesson, Marks, collate


class Course(Curriculum):
    """A model in training on lessons."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        vocabulary: Mapping[str, int],
        lessons: Sequence[Lesson],
        config: CourseConfig,
        *,
        label: str,
    ) -> None:
        names = [f"{lesson.name}-{name}" for lesson in lessons for name in lesson.probe_layers]
        probes = linear_probes(model, names, outputs=len(vocabulary), seed=config.seed)
        super().__init__(model, probes, config, label=label)
        self.vocabulary, self.lessons, self.config = vocabulary, tuple(lessons), config
        self.levels = {lesson.name: 0 for lesson in lessons}
        self.accuracy = {lesson.name: 0.0 for lesson in lessons}
        """Running mean of the accuracy on first questions of the level at work."""
        self.resting: list[str] = []
        """Lessons that are left out for now."""

    def solved(self, lesson: Lesson) -> bool:
        """Whether a lesson is at its last level and above the mark."""
        return self.levels[lesson.name] == lesson.levels - 1 and self.accuracy[lesson.name] > self.config.stop_at

    @property
    def finished(self) -> bool:
        """Whether every lesson is solved."""
        return all(self.solved(lesson) for lesson in self.lessons)

    def backward(self) -> dict[str, float]:
        """Gradients of a batch of every lesson; returns the step's row of the log."""
        row: dict[str, float] = {"step": float(self.step)}
        for lesson in self.lessons:
            if lesson.name not in self.resting:
                row |= self._learn(lesson)
        return row

    def standing(self) -> dict[str, str]:
        """Level and running accuracy of each lesson."""
        return {name[:9]: f"{self.levels[name]}:{value:.2f}" for name, value in self.accuracy.items()}

    def state(self) -> dict[str, Any]:
        """Levels, running accuracies, and which lessons rest."""
        return {"levels": self.levels, "accuracy": self.accuracy, "resting": self.resting}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.levels, self.accuracy, self.resting = state["levels"], state["accuracy"], state["resting"]

    def identity(self) -> str:
        """Label, lessons and settings."""
        return (
            f"{self.label} {[lesson.name for lesson in self.lessons]} {json.dumps(asdict(self.config), sort_keys=True)}"
        )

    def _learn(self, lesson: Lesson) -> dict[str, float]:
        """Gradients of one lesson's batch, and what its row of the log says."""
        name, config = lesson.name, self.config
        level, batch = self._batch(lesson)
        probing = config.probe_weight * (not self.solved(lesson))
        answer, probe, accuracy = losses(self.model, self.probes if probing else None, lesson, batch)
        (answer + probing * probe).backward()
        if level == self.levels[name]:
            self.accuracy[name] += config.forgetting * (accuracy - self.accuracy[name])
            if self.accuracy[name] > config.passed and level < lesson.levels - 1:
                self.levels[name], self.accuracy[name] = level + 1, 0.0
        return {
            f"{name} level": float(level),
            f"{name} loss": answer.item(),
            f"{name} probes": probe.item(),
            f"{name} accuracy": accuracy,
        }

    def _batch(self, lesson: Lesson) -> tuple[int, Batch]:
        """The step's batch of a lesson: mostly the level at work, at times an easier one; a solved lesson takes half
        the tokens."""
        config, top = self.config, self.levels[lesson.name]
        draw = seeds.chooser(config.seed, "lesson", lesson.name, self.step)
        level = top if draw.random() < config.at_level else draw.randint(0, top)
        wanted = config.tokens // 2 if self.solved(lesson) else config.tokens
        exercises = [lesson.exercise(draw, level)]
        while sum(len(exercise.words) for exercise in exercises) < wanted and len(exercises) < config.rows:
            exercises.append(lesson.exercise(draw, level))
        return level, collate(exercises, self.vocabulary)


def losses(
    model: LlamaForCausalLM, probes: nn.ModuleDict | None, lesson: Lesson, batch: Batch
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], float]:
    """Cross-entropy of the answers, sum of the probes' and looks' losses (0 without probes), and accuracy on the first
    answers."""
    probing = probes is not None
    output = model.model(
        batch.tokens, output_hidden_states=probing, output_attentions=probing and bool(lesson.looking), use_cache=False
    )
    first, later = (
        model.lm_head(output.last_hidden_state[marks.rows, marks.at]) for marks in (batch.first, batch.later)
    )
    targets = torch.cat([batch.first.targets, batch.later.targets])
    answer = nn.functional.cross_entropy(torch.cat([first, later]), targets)
    accuracy = (first.argmax(-1) == batch.first.targets).float().mean().item()
    if probes is None:
        return answer, torch.zeros(()), accuracy
    read = [
        _probe_loss(probes[f"{lesson.name}-{name}"], output.hidden_states[layer], batch.probes[name])
        for name, layer in lesson.probe_layers.items()
    ]
    read += [
        _look_loss(output.attentions[head.layer][:, head.index], batch.looks[name])
        for name, head in lesson.looking.items()
    ]
    return answer, torch.stack(read).sum(), accuracy


def _probe_loss(probe: nn.Module, hidden: Float[Tensor, "batch pos d_model"], marks: Marks) -> Float[Tensor, ""]:
    """Probes read the direction alone, so that they cannot be served by making what a layer writes larger and
    larger."""
    read = nn.functional.rms_norm(hidden[marks.rows, marks.at], hidden.shape[-1:])
    return nn.functional.cross_entropy(probe(read), marks.targets)


def _look_loss(pattern: Float[Tensor, "batch pos pos"], looks: Marks) -> Float[Tensor, ""]:
    """Minus the mean log of the attention that goes where it should."""
    return -pattern[looks.rows, looks.at, looks.targets].clamp_min(1e-9).log().mean()
