"""What a training is made of: each ingredient in turn is another training, which a checkpoint refuses by name; and
nothing that is not finite is ever written."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import entity_pairs
from tests.distillation.distilling import CONFIG, HEADS, PAIRS, PROMPTS, aligning, trained
from workbench import storage
from workbench.distillation import teacher_cache
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_heads
from workbench.distillation.teacher_cache import LiveTeacher, computed
from workbench.distillation.teacher_shards import INDEX, TeacherShards, teacher_shards
from workbench.errors import InputError
from workbench.matching.head_rows import hook_names
from workbench.models.hooked_model import Student

Loader = Callable[..., Any]
NAMES = hook_names([pair.teacher for pair in PAIRS])
VALIDATION = entity_pairs(split="calibration", scenes=3)
EVALUATED = replace(CONFIG, evaluate_every=3)


@pytest.fixture
def ingredients(load_student: Loader, load_teacher: Loader) -> dict[str, Any]:
    """Those of one training, by their names in a checkpoint."""
    return {
        "student": load_student(seed=2),
        "teacher": computed(load_teacher(seed=1), PROMPTS, NAMES),
        "configuration": EVALUATED,
        "prompts": PROMPTS,
        "pairs": PAIRS,
        "trained parts": HEADS,
        "seed": 3,
        "validation prompts": VALIDATION,
    }


def training(parts: dict[str, Any]) -> Distillation:
    student: Student = parts["student"]
    return Distillation(
        student,
        TrainedSlices(student, slices_of_heads(student, parts["trained parts"])),
        parts["prompts"],
        parts["teacher"],
        parts["pairs"],
        parts["configuration"],
        seed=parts["seed"],
        validation=parts["validation prompts"],
    )


def test_each_ingredient_in_turn_is_refused_by_name(
    ingredients: dict[str, Any], load_student: Loader, load_teacher: Loader, tmp_path: Path
) -> None:
    training(ingredients).run(tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    others = {
        "student": load_student(seed=4),
        "teacher": computed(load_teacher(seed=9), PROMPTS, NAMES),
        "configuration": replace(EVALUATED, learning_rate=0.5),
        "pairs": PAIRS[:2],
        "trained parts": HEADS[:2],
        "seed": 4,
        "validation prompts": entity_pairs(split="calibration", scenes=2),
    }
    for name, other in others.items():
        with pytest.raises(InputError, match=rf"another configuration.*\(here: {name}\)"):
            training({**ingredients, "student": load_student(seed=2), name: other}).run(tmp_path, resume=True)
    prompts = entity_pairs(split="train", scenes=8, seed=1)
    outputs = computed(load_teacher(seed=1), prompts, NAMES)
    with pytest.raises(InputError, match=r"\(here: prompts, teacher\)"):
        training({**ingredients, "student": load_student(seed=2), "prompts": prompts, "teacher": outputs}).run(
            tmp_path, resume=True
        )
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert len(training({**ingredients, "student": load_student(seed=2)}).run(tmp_path, resume=True)) == CONFIG.steps
    assert set(training(ingredients).identity) == set(ingredients), "every ingredient has been changed"


def test_the_same_outputs_are_the_same_wherever_they_are_kept(load_teacher: Loader, tmp_path: Path) -> None:
    teacher = load_teacher(seed=1)
    shards = teacher_shards(teacher, PROMPTS, NAMES, tmp_path, shard=7)
    made = [
        computed(teacher, PROMPTS, NAMES),
        teacher_cache.teacher_cache(teacher, PROMPTS, NAMES, tmp_path),
        teacher_cache.teacher_cache(teacher, PROMPTS, NAMES, tmp_path),
        LiveTeacher(teacher, PROMPTS, NAMES),
        shards,
        TeacherShards.open(shards.folder, PROMPTS),
    ]
    assert len({outputs.fingerprint for outputs in made}) == 1
    index = storage.read_json(shards.folder / INDEX)
    del index["fingerprint"]  # as it was written before
    storage.write_json(shards.folder / INDEX, index)
    assert TeacherShards.open(shards.folder, PROMPTS).fingerprint != shards.fingerprint
    assert teacher_shards(teacher, PROMPTS, NAMES, tmp_path).fingerprint == shards.fingerprint


def test_a_checkpoint_of_before_is_refused_with_its_remedy(ingredients: dict[str, Any], tmp_path: Path) -> None:
    training(ingredients).run(tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    tensors, _ = storage.read_tensors(file)
    old = {"checkpoint": json.dumps({"step": 6, "identity": "0" * 64})}
    storage.write_tensors(file, tensors, metadata=old)
    with pytest.raises(InputError, match=r"before 0.2.0.*delete .* to train this anew"):
        training(ingredients).run(tmp_path, resume=True)


@pytest.mark.parametrize("left", [0, 3, 5])
def test_a_log_shorter_than_its_checkpoint_is_refused(
    ingredients: dict[str, Any], load_student: Loader, tmp_path: Path, left: int
) -> None:
    """The steps would be trained twice; with all of its lines the log is taken."""
    training(ingredients).run(tmp_path)
    log = tmp_path / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:left]))
    ingredients["student"] = load_student(seed=2)
    with pytest.raises(InputError, match=rf"holds {left} of the 6 steps of checkpoint.safetensors.*Put it back"):
        training(ingredients).run(tmp_path, resume=True)
    log.write_text("".join(lines))
    assert len(training(ingredients).run(tmp_path, resume=True)) == 6


def test_the_log_is_on_the_disk_before_the_checkpoint(
    ingredients: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    save, sync = storage.checkpoint.save, __import__("os").fsync
    monkeypatch.setattr(storage.checkpoint, "save", lambda *a, **k: (order.append("checkpoint"), save(*a, **k))[1])
    monkeypatch.setattr("workbench.distillation.loop.os.fsync", lambda handle: (order.append("sync"), sync(handle))[1])
    training(ingredients).run(tmp_path)
    first = [order.index("sync"), order.index("checkpoint")]
    assert first == sorted(first)
    assert order.count("checkpoint") == 3


def finite(folder: Path) -> bool:
    """Whether every weight that lies in a folder is finite, and every loss of its log."""
    tensors = [value for file in folder.glob("*.safetensors") for value in storage.read_tensors(file)[0].values()]
    return all(bool(value.isfinite().all()) for value in tensors) and "NaN" not in (folder / "log.jsonl").read_text()


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_an_update_that_overflows_is_never_written(
    load_student: Loader, load_teacher: Loader, tmp_path: Path, steps: int, rate: float
) -> None:
    """Whatever is written is finite, after the last step too, whose loss was taken before its update."""
    outputs = computed(load_teacher(seed=1), PROMPTS, NAMES)
    config = replace(CONFIG, learning_rate=rate, steps=steps, checkpoint_every=1)
    finite_so_far = rate == 1e30 and steps == 1  # norms bring even such weights back to finite logits, once
    with nullcontext() if finite_so_far else pytest.raises(InputError, match="the last checkpoint is kept"):
        trained(load_student(), outputs, config, tmp_path)
    assert finite(tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == int(rate == 1e30)


@pytest.mark.parametrize("value", [3e38, float("inf"), float("nan")])
def test_a_last_update_that_overflows_keeps_the_checkpoint_before_it(
    load_student: Loader, load_teacher: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Weights that are finite, of which no finite loss is left; and weights that are not."""
    outputs, update = computed(load_teacher(seed=1), PROMPTS, NAMES), torch.optim.AdamW.step
    taken: list[int] = []

    def overflowing(self: torch.optim.AdamW) -> None:
        update(self)
        taken.append(1)
        if len(taken) == CONFIG.steps:
            with torch.no_grad():
                for leaf in self.param_groups[0]["params"]:
                    leaf.fill_(value)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(InputError, match=r"not finite.*the last checkpoint is kept"):
        trained(load_student(), outputs, CONFIG, tmp_path)
    assert finite(tmp_path)
    assert json.loads(storage.read_metadata(tmp_path / "checkpoint.safetensors")["checkpoint"])["step"] == 4
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5


def test_float16_is_refused_with_its_remedy(model_folder: Any, load_teacher: Loader, tmp_path: Path) -> None:
    outputs = computed(load_teacher(seed=1), PROMPTS, NAMES)
    half = Student.load(model_folder("llama", seed=2), dtype="float16", check=False)
    with pytest.raises(InputError, match=r"float16 can't be trained.*bfloat16"):
        trained(half, outputs, CONFIG, tmp_path)


def test_alignment_is_part_of_the_configuration(ingredients: dict[str, Any]) -> None:
    other = {**ingredients, "configuration": aligning(EVALUATED, estimator="debiased")}
    assert training(ingredients).identity["configuration"] != training(other).identity["configuration"]
