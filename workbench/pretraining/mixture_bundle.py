"""The bundled models of the mixture: a teacher of all four tasks, a student pruned from its early self, and an
unrelated student.

Lineage: the pruned student is an early checkpoint of the teacher with whole layers removed, then healed: trained less,
not damaged. The unrelated student has the same size and another initialisation: the negative control of every alignment
claim. A student rests from a task that it knows well enough, so that there is something left to distil. (Entity
tracking is learned so early that a student which knows theory of mind at all is close to the teacher in it.)
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from transformers import LlamaForCausalLM

from workbench import seeds, storage
from workbench.pretraining.config import STRICT, CourseConfig, SizeConfig
from workbench.pretraining.course import Course, losses
from workbench.pretraining.lessons.exercise import Lesson, collate
from workbench.pretraining.mixture import TASKS, accuracies, accuracy_report, mixture_lessons, mixture_tokenizer
from workbench.pretraining.models import finished, new_model, pruned, save_model

COMMAND = "workbench pretrain --bundle mixture"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class MixtureConfig:
    """The three models of the mixture."""

    teacher: SizeConfig = Field(default_factory=lambda: SizeConfig(layers=4, embedding_std=0.4))
    course: CourseConfig = Field(default_factory=CourseConfig)
    student_layers: Annotated[int, Field(ge=1)] = 3
    ancestor_step: Annotated[int, Field(ge=1)] = 650
    """The student descends from the teacher after so many steps (a multiple of `course.checkpoint_every`)."""
    student_from: float = 0.35
    """A student is trained until its accuracy on each task is so far on the way from chance (0) to everything right
    (1), on the calibration split."""
    healing_rate: float = 3e-4
    """Learning rate of the pruned student."""
    look_every: int = 10
    """Steps between two looks at a student's accuracies."""
    unrelated_seed: int = 2


def pretrain_mixture(config: MixtureConfig, folder: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Train the teacher, prune and heal the student, train the unrelated student; each as a Hugging Face directory in
    `folder`.

    `work` keeps checkpoints and finished phases; a killed run goes on from there. Returns each model's report on test
    prompts, which is also written beside it (`accuracies.json`).
    """
    models = {
        "mixture-teacher": finished(
            folder / "mixture-teacher", lambda: _train_teacher(config, folder / "mixture-teacher", work)
        ),
        "mixture-student": finished(
            folder / "mixture-student", lambda: _train_student(config, folder / "mixture-student", work)
        ),
        "mixture-unrelated-student": finished(
            folder / "mixture-unrelated-student",
            lambda: _train_unrelated(config, folder / "mixture-unrelated-student", work),
        ),
    }
    reports = {name: accuracy_report(model) for name, model in models.items()}
    for name, report in reports.items():
        storage.write_json(folder / name / "accuracies.json", report)
    return reports


def _train_teacher(config: MixtureConfig, target: Path, work: Path) -> None:
    model = new_model(config.teacher, len(mixture_tokenizer()), seed=config.course.seed)
    course = Course(model, mixture_tokenizer().get_vocab(), mixture_lessons(), config.course, label="mixture-teacher")
    course.resume(work / "mixture-teacher")
    for _ in course.steps(work / "mixture-teacher"):
        if course.step % config.course.checkpoint_every == 0:
            save_model(model, mixture_tokenizer(), _ancestor(work, course.step), {"levels": dict(course.levels)}, [])
        if course.finished:
            break
    _save(model, target, {"size": asdict(config.teacher), "course": asdict(config.course)}, course)


def _ancestor(work: Path, step: int) -> Path:
    return work / "mixture-teacher-early" / str(step)


def _train_student(config: MixtureConfig, target: Path, work: Path) -> None:
    """The pruned student, healed until it knows each task well enough."""
    course_config = replace(config.course, learning_rate=config.healing_rate)
    vocabulary, lessons = mixture_tokenizer().get_vocab(), mixture_lessons()
    early = _ancestor(work, config.ancestor_step)
    ancestor = finished(early, lambda: _train_teacher(config, work / "mixture-teacher-again", work))
    levels: dict[str, int] = storage.read_json(early / "training.json")["levels"]
    model, layers = pruned(
        ancestor,
        config.student_layers,
        lambda model: _cost(model, lessons, vocabulary, levels, seed=config.course.seed),
    )
    course = Course(model, vocabulary, lessons, course_config, label="mixture-student")
    course.levels |= levels
    _until_far_enough(course, config, work / "mixture-student")
    origin = {
        "ancestor": f"the teacher after {config.ancestor_step} steps",
        "kept_layers": layers,
        "course": asdict(course_config),
    }
    _save(model, target, origin, course)


def _train_unrelated(config: MixtureConfig, target: Path, work: Path) -> None:
    """The student of equal size and another initialisation, trained from scratch until it knows as much."""
    course_config, size = (
        replace(config.course, seed=config.unrelated_seed),
        replace(config.teacher, layers=config.student_layers),
    )
    model = new_model(size, len(mixture_tokenizer()), seed=config.unrelated_seed)
    course = Course(
        model, mixture_tokenizer().get_vocab(), mixture_lessons(), course_config, label="mixture-unrelated-student"
    )
    _until_far_enough(course, config, work / "mixture-unrelated-student")
    _save(model, target, {"size": asdict(size), "course": asdict(course_config)}, course)


def _cost(
    model: LlamaForCausalLM, lessons: Sequence[Lesson], vocabulary: dict[str, int], levels: dict[str, int], *, seed: int
) -> float:
    """Answer loss over the lessons at some levels."""
    draw = seeds.chooser(seed, "pruning")
    batches = [
        collate([lesson.exercise(draw, levels[lesson.name]) for _ in range(32)], vocabulary) for lesson in lessons
    ]
    return sum(losses(model, None, lesson, batch)[0].item() for lesson, batch in zip(lessons, batches, strict=True))


def _until_far_enough(course: Course, config: MixtureConfig, work: Path) -> None:
    """Train until every task has come far enough; one that has rests until it falls back."""
    course.resume(work)
    for _ in course.steps(work):
        if course.step % config.look_every:
            continue
        reached = accuracies(course.model, split="calibration", prompts=105)
        course.log[-1] |= {f"{name} held out": value for name, value in reached.items()}
        course.resting = [
            name
            for name, value in reached.items()
            if (value - TASKS[name].chance) / (1 - TASKS[name].chance) >= config.student_from
        ]
        if len(course.resting) == len(TASKS):
            return


def _save(model: LlamaForCausalLM, target: Path, origin: dict[str, Any], course: Course) -> None:
    save_model(
        model,
        mixture_tokenizer(),
        target,
        {**origin, "lessons": [lesson.name for lesson in course.lessons], "command": COMMAND},
        course.log,
    )
