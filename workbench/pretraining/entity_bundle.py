"""How the bundled models of entity tracking are made: a Llama-style teacher, its pruned student, and an unrelated
student; and the same with thin heads.

Two temporary probes on the residual after the first layer (each context label predicts its object, the last token
predicts the queried label) and a curriculum over the number of boxes get past where plain training stalls.

Lineage: the pruned student is an early checkpoint of the teacher with whole layers removed, then healed on few boxes:
trained less, not damaged. The unrelated student has the same size and another initialisation: the negative control of
every alignment claim.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from workbench import seeds
from workbench.errors import InputError
from workbench.pretraining.config import STRICT, CurriculumConfig, SizeConfig
from workbench.pretraining.curriculum import Curriculum, linear_probes
from workbench.pretraining.head_penalty import head_penalty
from workbench.pretraining.models import finished, new_model, pruned, save_model
from workbench.tasks.base import Split, encode, task_dataset
from workbench.tasks.entity_tracking import LABELS, OBJECTS, EntityTracking, Scene, context, draw_scene
from workbench.tasks.vocabulary import word_level_tokenizer

CLAUSE = 7
"""Tokens of one clause of a context: `the apple is in Box F ,`; the object is the second, the label the sixth."""
QUERY = 6
"""Tokens of one query with its answer: `Box F contains the apple .`; the answer is predicted at the fourth."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class LessonConfig(CurriculumConfig):
    """How a bundled model is trained."""

    batch: int = 64
    queries: int = 8
    """Queries in each sequence, drawn with replacement (without it later answers are guessed by elimination)."""
    boxes: tuple[int, int] = (2, 7)
    """First and last number of boxes of the curriculum; the probes are dropped once the first is solved."""
    solved: float = 0.9
    """Accuracy on the first query (a running mean) that adds a box."""
    stop_at: float = 0.99
    """The same on the last number of boxes, which ends the training."""
    head_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the penalty on heads once the first number of boxes is solved (see `pretraining.head_penalty`): what
    few heads can do is then left to few."""
    settling: Annotated[int, Field(ge=0)] = 0
    """Steps that the training stays at each number of boxes after it is solved, for the penalty to work; at the last
    one the learning rate falls to 0 over them."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class BundleConfig:
    """The three bundled models."""

    prefix: str = ""
    """Of their names: `thin-` makes `thin-teacher`."""
    teacher: SizeConfig = Field(default_factory=SizeConfig)
    student_layers: Annotated[int, Field(ge=1)] = 4
    lessons: LessonConfig = Field(default_factory=LessonConfig)
    pruned_from: int = 3
    """The student descends from the teacher at the moment it had solved this many boxes."""
    student_band: tuple[float, float] = (0.45, 0.65)
    """Accuracy on 7 boxes (calibration split) at which a student's training ends: above chance, below the teacher."""
    healing_rate: float = 5e-4
    """Learning rate of the pruned student."""
    look_every: int = 10
    """Steps between two looks at a student's accuracy."""
    unrelated_seed: int = 2

    @property
    def command(self) -> str:
        """What makes them."""
        return "workbench pretrain" + (f" --bundle {self.prefix.rstrip('-')}" if self.prefix else "")


THIN: dict[str, Any] = {
    "prefix": "thin-",
    "teacher": {"heads": 16, "kv_heads": 8, "d_head": 8},
    "lessons": {"head_penalty": 0.02, "settling": 100, "stop_at": 0.956},
    "pruned_from": 4,
}
"""What the bundle of thin heads has otherwise: twice as many of half the size, and a penalty that leaves the task to
few of them. After three boxes its teacher knows nothing yet of seven."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of our tasks; words and punctuation are one token each."""
    words = [".", ",", "?", *LABELS, "The", "the", "is", "in", "Box", "contains", *OBJECTS]
    return word_level_tokenizer(words)


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(arbitrary_types_allowed=True))
class Lesson:
    """A batch of training sequences: tokens, and where and what the answers and the probes' targets are."""

    tokens: Int[Tensor, "batch pos"]
    answers: Int[Tensor, "batch queries"]
    answer_at: Int[Tensor, " queries"]
    objects: Int[Tensor, "batch boxes"]
    label_at: Int[Tensor, " boxes"]
    queried: Int[Tensor, "batch queries"]


def lesson(vocabulary: dict[str, int], boxes: int, config: LessonConfig, step: int) -> Lesson:
    """The batch of one step: scenes of the train split, each followed by its queries and their answers."""
    draw = seeds.chooser(config.seed, "lesson", step)
    scenes = [draw_scene(draw, boxes, "train") for _ in range(config.batch)]
    asked = [[draw.randrange(boxes) for _ in range(config.queries)] for _ in scenes]
    tokens = torch.tensor(
        [[vocabulary[word] for word in _words(scene, queries)] for scene, queries in zip(scenes, asked, strict=True)]
    )
    start = CLAUSE * boxes
    answer_at = torch.arange(config.queries) * QUERY + start + 3
    label_at = torch.arange(boxes) * CLAUSE + 5
    return Lesson(
        tokens=tokens,
        answers=tokens[:, answer_at + 1],
        answer_at=answer_at,
        objects=tokens[:, label_at - 4],
        label_at=label_at,
        queried=tokens[:, answer_at - 2],
    )


def _words(scene: Scene, queries: Sequence[int]) -> list[str]:
    text = context(scene).replace(",", " ,").replace(".", " .").split()
    for index in queries:
        thing, label = scene[index]
        text += ["Box", label, "contains", "the", thing, "."]
    return text


def lesson_losses(
    model: LlamaForCausalLM, probes: nn.ModuleDict | None, batch: Lesson
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], float]:
    """Answer loss, probe loss (0 without probes), and accuracy on the first query."""
    output = model(batch.tokens, output_hidden_states=True, use_cache=False)
    logits = output.logits[:, batch.answer_at]
    answer = nn.functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
    accuracy = (logits[:, 0].argmax(-1) == batch.answers[:, 0]).float().mean().item()
    if probes is None:
        return answer, torch.zeros(()), accuracy
    first = output.hidden_states[1]
    bound = probes["object"](first[:, batch.label_at]).flatten(0, 1)
    asked = probes["label"](first[:, batch.answer_at]).flatten(0, 1)
    probe = nn.functional.cross_entropy(bound, batch.objects.flatten()) + nn.functional.cross_entropy(
        asked, batch.queried.flatten()
    )
    return answer, probe, accuracy


class Boxes(Curriculum):
    """A model in training on more and more boxes."""

    def __init__(
        self, model: LlamaForCausalLM, vocabulary: dict[str, int], config: LessonConfig, *, label: str
    ) -> None:
        probes = linear_probes(model, ("object", "label"), outputs=len(vocabulary), seed=config.seed)
        super().__init__(model, probes, config, label=label)
        self.vocabulary, self.config = vocabulary, config
        self.boxes, self.accuracy = config.boxes[0], 0.0
        self.solved: int | None = None
        """The number of boxes that the last step solved, if it did."""
        self.passed_at: int | None = None
        """The step that passed the number of boxes at work, while it settles."""

    def backward(self) -> dict[str, float]:
        """Gradients of a batch of scenes, mostly of the number of boxes at work; returns the step's row of the log."""
        config = self.config
        draw = seeds.chooser(config.seed, "boxes", self.step)
        boxes = self.boxes if draw.random() < 0.6 else draw.randint(config.boxes[0], self.boxes)
        batch = lesson(self.vocabulary, boxes, config, self.step)
        answer, probe, accuracy = lesson_losses(self.model, self.probes, batch)
        begins = self.boxes == config.boxes[0] and self.passed_at is None
        row = {
            "step": self.step,
            "boxes": boxes,
            "answer_loss": answer.item(),
            "probe_loss": probe.item(),
            "accuracy": accuracy,
        }
        loss = answer + (config.probe_weight if begins else 0.0) * probe
        if config.head_penalty and not begins:
            penalty = head_penalty(self.model)
            loss, row["head_penalty"] = loss + config.head_penalty * penalty, penalty.item()
        loss.backward()
        self._graduate(boxes, accuracy)
        return row

    def _graduate(self, boxes: int, accuracy: float) -> None:
        """Add a box once the number at work is solved."""
        if boxes == self.boxes:
            self.accuracy = 0.8 * self.accuracy + 0.2 * accuracy
        last, self.solved = self.boxes == self.config.boxes[1], None
        if self.passed_at is None and self.accuracy > (self.config.stop_at if last else self.config.solved):
            self.passed_at = self.step
        if self.passed_at is None or self.step < self.passed_at + self.config.settling:
            return
        self.solved, self.boxes, self.passed_at = self.boxes, self.boxes + (not last), None
        self.accuracy = self.accuracy if last else 0.0

    def rate(self) -> float:
        """Falls to 0 while the last number of boxes settles."""
        rate = super().rate()
        if self.passed_at is None or self.boxes < self.config.boxes[1]:
            return rate
        return rate * (1 - (self.step - self.passed_at) / (self.config.settling + 1))

    def standing(self) -> dict[str, str]:
        """Number of boxes at work, and the running accuracy on it."""
        return {"boxes": str(self.boxes), "accuracy": f"{self.accuracy:.2f}"}

    def state(self) -> dict[str, Any]:
        """Number of boxes at work, the running accuracy on it, and since when it settles."""
        return {"boxes": self.boxes, "accuracy": self.accuracy, "passed_at": self.passed_at}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.boxes, self.accuracy, self.passed_at = state["boxes"], state["accuracy"], state["passed_at"]

    def identity(self) -> str:
        """Label and settings."""
        return f"{self.label} {json.dumps(asdict(self.config), sort_keys=True)}"


@torch.no_grad()
def task_accuracy(model: LlamaForCausalLM, *, boxes: int, split: Split, scenes: int, seed: int = 0) -> float:
    """Accuracy on held-out scenes of the task itself, each queried at each of its boxes."""
    tokenizer = word_tokenizer()
    pairs = encode(
        task_dataset(EntityTracking(boxes=boxes), tokenizer, split=split, scenes=scenes, seed=seed), tokenizer
    )
    right = [model(part.clean).logits[:, -1].argmax(-1) == part.answers for part in pairs.batches(256)]
    return float(torch.cat(right).float().mean())


def pretrain(config: BundleConfig, folder: Path, work: Path) -> dict[str, float]:
    """Train the teacher, prune and heal the student, train the unrelated student; each as a Hugging Face directory in
    `folder`.

    `work` keeps checkpoints and finished phases; a killed run goes on from there. Returns each model's accuracy on 7
    boxes on test scenes.
    """
    work /= config.prefix.rstrip("-")
    phases = {"teacher": _train_teacher, "student": _train_student, "unrelated-student": _train_unrelated}
    models = {
        f"{config.prefix}{name}": finished(
            folder / f"{config.prefix}{name}",
            lambda name=name, train=train: train(config, folder / f"{config.prefix}{name}", work),
        )
        for name, train in phases.items()
    }
    return {name: task_accuracy(model, boxes=7, split="test", scenes=100) for name, model in models.items()}


def _train_teacher(config: BundleConfig, target: Path, work: Path) -> None:
    model = new_model(config.teacher, len(word_tokenizer()), seed=config.lessons.seed, attention="sdpa")
    course = Boxes(model, word_tokenizer().get_vocab(), config.lessons, label="teacher")
    course.resume(work / "teacher")
    for _ in course.steps(work / "teacher"):
        if course.solved is not None:
            _save(model, work / f"teacher-{course.solved}-boxes", config, {}, [])
        if course.solved == config.lessons.boxes[1]:
            break
    _save(model, target, config, {"size": asdict(config.teacher), "lessons": asdict(config.lessons)}, course.log)


def _train_student(config: BundleConfig, target: Path, work: Path) -> None:
    """The pruned student, healed on the boxes that its ancestor had solved until its accuracy on 7 is in the band."""
    lessons = replace(
        config.lessons,
        boxes=(2, config.pruned_from),
        stop_at=2.0,
        solved=0.0,
        settling=0,
        learning_rate=config.healing_rate,
        probe_weight=0.0,
    )
    vocabulary = word_tokenizer().get_vocab()
    ancestor = finished(
        work / f"teacher-{config.pruned_from}-boxes", lambda: _train_teacher(config, work / "teacher-again", work)
    )
    batch = lesson(vocabulary, config.pruned_from, lessons, -1)
    model, layers = pruned(ancestor, config.student_layers, lambda model: lesson_losses(model, None, batch)[0].item())
    course = Boxes(model, vocabulary, lessons, label="student")
    course.resume(work / "student")
    _until_in_band(course, config, work / "student")
    origin = {
        "ancestor": f"the teacher when it had solved {config.pruned_from} boxes",
        "kept_layers": layers,
        "lessons": asdict(lessons),
    }
    _save(model, target, config, origin, course.log)


def _train_unrelated(config: BundleConfig, target: Path, work: Path) -> None:
    """The student of equal size and another initialisation, trained from scratch until its accuracy on 7 boxes is in
    the same band."""
    lessons, size = (
        replace(config.lessons, seed=config.unrelated_seed),
        replace(config.teacher, layers=config.student_layers),
    )
    model = new_model(size, len(word_tokenizer()), seed=config.unrelated_seed, attention="sdpa")
    course = Boxes(model, word_tokenizer().get_vocab(), lessons, label="unrelated student")
    course.resume(work / "unrelated-student")
    _until_in_band(course, config, work / "unrelated-student")
    _save(model, target, config, {"size": asdict(size), "lessons": asdict(lessons)}, course.log)


def _until_in_band(course: Boxes, config: BundleConfig, work: Path) -> None:
    low, high = config.student_band
    for _ in course.steps(work):
        if course.step % config.look_every == 0 and course.boxes > course.config.boxes[0]:
            accuracy = task_accuracy(course.model, boxes=7, split="calibration", scenes=40)
            course.log[-1]["accuracy_on_7_boxes"] = accuracy
            if low <= accuracy <= high:
                return
            if accuracy > high:
                raise InputError(
                    f"{course.label} is at {accuracy:.2f} on 7 boxes, above {high}; lower `look_every`, the learning "
                    "rate or `pruned_from`."
                )


def _save(
    model: LlamaForCausalLM,
    target: Path,
    config: BundleConfig,
    origin: dict[str, Any],
    log: list[dict[str, float]],
) -> None:
    save_model(model, word_tokenizer(), target, {**origin, "command": config.command}, log)
