"""A curriculum over several lessons at once: each goes up its own levels, all share every optimizer step.

Plain training stalls at "some word of the context": moving things together, moving the question to the last token, and
matching the two must appear together. Temporary linear probes on the residual stream get past it (they are no part of a
saved model), and levels from easy to hard. Every batch is a function of (seed, step, levels) alone, so an interrupted
training resumes to the same bits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from workbench import seeds, storage
from workbench.pretraining.config import CourseConfig
from workbench.pretraining.lessons.exercise import Batch, Lesson, Marks, collate
from workbench.storage import checkpoint


class Course:
    """A model in training on lessons, resumable to the bit."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        vocabulary: Mapping[str, int],
        lessons: Sequence[Lesson],
        config: CourseConfig,
        *,
        label: str,
    ) -> None:
        self.model, self.vocabulary, self.lessons, self.config, self.label = (
            model,
            vocabulary,
            tuple(lessons),
            config,
            label,
        )
        self.probes = _probes(model, vocabulary, lessons, seed=config.seed)
        self.leaves = {
            f"{part}.{name}": p
            for part, module in (("model", model), ("probes", self.probes))
            for name, p in module.named_parameters()
        }
        self.optimizer = torch.optim.Adam(self.leaves.values(), lr=config.learning_rate, betas=(0.9, 0.98))
        self.step = 0
        self.levels = {lesson.name: 0 for lesson in lessons}
        self.accuracy = {lesson.name: 0.0 for lesson in lessons}
        """Running mean of the accuracy on first questions of the level at work."""
        self.resting: list[str] = []
        """Lessons that are left out for now."""
        self.log: list[dict[str, float]] = []

    def solved(self, lesson: Lesson) -> bool:
        """Whether a lesson is at its last level and above the mark."""
        return self.levels[lesson.name] == lesson.levels - 1 and self.accuracy[lesson.name] > self.config.stop_at

    @property
    def finished(self) -> bool:
        """Whether every lesson is solved."""
        return all(self.solved(lesson) for lesson in self.lessons)

    def advance(self) -> None:
        """One optimizer step on a batch of every lesson."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.optimizer.zero_grad()
        record: dict[str, float] = {"step": float(self.step)}
        for lesson in self.lessons:
            if lesson.name not in self.resting:
                record |= self._learn(lesson)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.log.append(record)
        self.step += 1

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

    def save(self, folder: Path) -> None:
        """Write an exact checkpoint."""
        extra = {"levels": self.levels, "accuracy": self.accuracy, "resting": self.resting, "log": self.log}
        storage.write_json(folder / f"state-{self.step}.json", extra)
        checkpoint.save(
            folder / "checkpoint.safetensors",
            step=self.step,
            leaves=self.leaves,
            optimizer=self.optimizer,
            identity=self._identity(),
        )
        for old in folder.glob("state-*.json"):
            if old.name != f"state-{self.step}.json":
                old.unlink()

    def resume(self, folder: Path) -> None:
        """Go on from the last checkpoint, if there is one."""
        file = folder / "checkpoint.safetensors"
        if not file.exists():
            return
        self.step, values = checkpoint.load(
            file, leaves=self.leaves, optimizer=self.optimizer, identity=self._identity()
        )
        extra = storage.read_json(folder / f"state-{self.step}.json")
        self.levels, self.accuracy, self.resting, self.log = (
            extra[name] for name in ("levels", "accuracy", "resting", "log")
        )
        with torch.no_grad():
            for key, leaf in self.leaves.items():
                leaf.copy_(values[key])

    def _identity(self) -> str:
        return (
            f"{self.label} {[lesson.name for lesson in self.lessons]} {json.dumps(asdict(self.config), sort_keys=True)}"
        )


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


def _probes(
    model: LlamaForCausalLM, vocabulary: Mapping[str, int], lessons: Sequence[Lesson], *, seed: int
) -> nn.ModuleDict:
    """A linear map from the residual stream to words for each probe; the global random state is left as it was."""
    with seeds.local(seed, "probes"):
        return nn.ModuleDict(
            {
                f"{lesson.name}-{name}": nn.Linear(model.config.hidden_size, len(vocabulary))
                for lesson in lessons
                for name in lesson.probe_layers
            }
        )
