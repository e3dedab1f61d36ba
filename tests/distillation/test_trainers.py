"""The alignment inside other people's trainers: losses, gradient norms, similarities and weights of the loop's own
trainings, step by step."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from tests.distillation.distilling import CONFIG, HEADS, PAIRS, PROMPTS
from workbench.distillation.alignment_loss import CircuitAlignmentLoss
from workbench.distillation.config import TrainingConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_everything, slices_of_heads
from workbench.distillation.objective import Objective
from workbench.distillation.reports import StepReport
from workbench.distillation.teacher_cache import TeacherCache, computed
from workbench.distillation.trainers import CircuitAlignment, training_rows
from workbench.errors import InputError
from workbench.matching.head_rows import hook_names
from workbench.models.hooked_model import Student, Teacher
from workbench.models.plain_heads import PlainHeads
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import task_dataset
from workbench.tasks.entity_tracking import EntityTracking

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("others_randomness")]
Folder = Callable[..., Path]
BATCH = PROMPTS[:8]
STEPS = 3
LOOP = replace(CONFIG, steps=STEPS, batch=8)


class Aligned(CircuitAlignment, Trainer): ...


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """A trainer collects garbage when it begins and ends: a second each where a whole session's objects are looked
    through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folders(model_folder: Folder) -> tuple[Path, Path]:
    """(student, teacher)."""
    return model_folder("llama", seed=0), model_folder("llama", seed=1)


@pytest.fixture(scope="module")
def cache(folders: tuple[Path, Path]) -> TeacherCache:
    return computed(Teacher.load(folders[1], check=False), BATCH, hook_names([pair.teacher for pair in PAIRS]))


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    """What makes a trainer's step the loop's."""
    return {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": LOOP.learning_rate,
        "weight_decay": LOOP.weight_decay,
        "max_grad_norm": LOOP.clip,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **changes,
    }


def trainer_of(kind: str, folders: tuple[Path, Path], cache: TeacherCache, out: Path, **named: Any) -> Any:
    """A trainer on the one batch, with the alignment of the loop's configuration."""
    model = named.pop("model", None) or plain(folders[0])
    rows = training_rows(BATCH, cache.labels_of(torch.arange(8)))
    changes = named.pop("settings", {})
    named.setdefault("alignment", CircuitAlignmentLoss(model, cache, PAIRS, prompts=BATCH, weight=LOOP.weight))
    common: dict[str, Any] = {"model": model, "train_dataset": rows, **named}
    collator = DataCollatorForSeq2Seq(word_tokenizer())
    if kind == "transformers":
        return Aligned(args=TrainingArguments(**settings(out, **changes)), data_collator=collator, **common)
    pytest.importorskip("trl", reason="the extra trainers")
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        class AlignedTrainer(CircuitAlignment, SFTTrainer): ...

        args = SFTConfig(**settings(out, gradient_checkpointing=False, **changes))
        return AlignedTrainer(args=args, processing_class=word_tokenizer(), **common)
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class AlignedDistiller(CircuitAlignment, GKDTrainer): ...

    more = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "gradient_checkpointing": False}
    return AlignedDistiller(
        teacher_model=plain(folders[1]),
        args=GKDConfig(**settings(out, **more, **changes)),
        processing_class=word_tokenizer(),
        data_collator=collator,
        **common,
    )


Loop = Callable[[TrainingConfig, bool], tuple[list[StepReport], Student]]


@pytest.fixture(scope="module")
def loop(folders: tuple[Path, Path], cache: TeacherCache, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """The loop's own training of the matched heads, or of everything."""
    done: dict[Any, Any] = {}

    def run(config: TrainingConfig, heads: bool) -> tuple[list[StepReport], Student]:
        key = (config.task_loss, config.weight_decay, heads, config.alignment is None)
        if key not in done:
            student = Student.load(folders[0], check=False)
            parts = slices_of_heads(student, HEADS) if heads else slices_of_everything(student)
            pairs = PAIRS if config.weight else ()
            training = Distillation(student, TrainedSlices(student, parts), BATCH, cache, pairs, config, seed=0)
            done[key] = training.run(tmp_path_factory.mktemp("loop")), student
        return done[key]

    return run


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(trainer: Any, reports: list[StepReport], student: Student, heads: bool) -> None:
    """Logs step by step, and the weights at the end."""
    log = logged(trainer)
    assert len(log) == len(reports) == STEPS
    for entry, report in zip(log, reports, strict=True):
        assert entry["loss"] == pytest.approx(report.loss, rel=2e-4)
        assert entry["grad_norm"] == pytest.approx(report.gradient_norm, rel=2e-3)
        for pair, cka in report.ckas.items():
            assert entry[f"similarity/{pair}"] == pytest.approx(cka, abs=1e-3)
    assert abs(log[0]["loss"] - log[-1]["loss"]) > 100 * 2e-4 * log[0]["loss"], "it trains"
    model = PlainHeads(trainer.model)
    names = HEADS if heads else [*HEADS, *(type(HEADS[0])(0, index) for index in range(4))]
    for ours, theirs in zip(slices_of_heads(model, names), slices_of_heads(student, names), strict=True):
        found, expected = (
            each.parameters()[part.parameter][part.index].detach() for each, part in ((model, ours), (student, theirs))
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "heads"),
    [("transformers", False), ("sft", True), ("gkd", False)],
    ids=["transformers, everything", "sft, matched heads", "gkd, everything"],
)
def test_a_trainers_steps_are_the_loops(
    kind: str, heads: bool, folders: tuple[Path, Path], cache: TeacherCache, loop: Loop, tmp_path: Path
) -> None:
    decay = LOOP.weight_decay if heads else 0.0  # of everything a trainer spares norms and biases, the loop does not
    named: dict[str, Any] = {"heads": "matched" if heads else None, "settings": {"weight_decay": decay}}
    trainer = trainer_of(kind, folders, cache, tmp_path, **named)
    trainer.train()
    config = replace(LOOP, task_loss="kl_teacher" if kind == "gkd" else "ce_teacher", weight_decay=decay)
    assert_same_training(trainer, *loop(config, heads), heads)
    start, end = plain(folders[0]), trainer.model
    assert all(parameter.requires_grad for parameter in end.parameters()), "the flags are as they were"
    if heads:
        masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in start.named_parameters()}
        for part in slices_of_heads(PlainHeads(start), HEADS):
            masks[part.parameter][part.index] = True
        for (name, before), after in zip(start.named_parameters(), end.parameters(), strict=True):
            assert torch.equal(before[~masks[name]], after[~masks[name]]), f"{name} moved outside the slices"
            assert not masks[name].any() or not torch.equal(before[masks[name]], after[masks[name]])


def test_without_alignment_it_is_the_trainer_itself(
    folders: tuple[Path, Path], cache: TeacherCache, loop: Loop, tmp_path: Path
) -> None:
    """The control at equal budget; and evaluation never sees the alignment."""
    control = trainer_of("transformers", folders, cache, tmp_path, alignment=None, heads=HEADS)
    control.train()
    reports, _ = loop(replace(LOOP, alignment=None), True)
    assert [entry["loss"] for entry in logged(control)] == pytest.approx([each.loss for each in reports], rel=2e-4)
    aligned = trainer_of("transformers", folders, cache, tmp_path)
    assert aligned.evaluate(aligned.train_dataset)["eval_loss"] == pytest.approx(reports[0].loss, rel=1e-4)


def test_accumulated_micro_batches_are_each_aligned_alone(
    folders: tuple[Path, Path], cache: TeacherCache, tmp_path: Path
) -> None:
    trainer = trainer_of(
        "transformers",
        folders,
        cache,
        tmp_path,
        settings={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1},
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    trainer.train()
    student = Student.load(folders[0], check=False)
    objective = Objective(student, BATCH, cache, PAIRS, LOOP)
    with torch.no_grad():
        pieces = [objective.losses(piece)[1] for piece in torch.arange(8).chunk(2)]
        task, whole, _ = objective.losses(torch.arange(8))
    expected = float(sum(pieces)) / 2  # type: ignore[arg-type]
    assert task is not None
    assert whole is not None
    (entry,) = logged(trainer)
    assert entry["alignment_loss"] == pytest.approx(LOOP.weight * expected, rel=1e-4)
    assert entry["loss"] == pytest.approx(float(task) + LOOP.weight * expected, rel=1e-4)
    assert abs(expected - float(whole)) > 100 * 1e-4, "the whole batch's alignment is another number"


def test_mixed_precision_and_checkpointing_are_the_trainers(
    folders: tuple[Path, Path], cache: TeacherCache, loop: Loop, tmp_path: Path
) -> None:
    changes = {"bf16": True, "gradient_checkpointing": True, "max_steps": 1}
    trainer = trainer_of("transformers", folders, cache, tmp_path, heads="matched", settings=changes)
    trainer.train()
    (entry,), (report, *_) = logged(trainer), loop(LOOP, True)[0]
    assert entry["loss"] == pytest.approx(report.loss, rel=0.02)
    assert entry["grad_norm"] == pytest.approx(report.gradient_norm, rel=0.05)
    assert entry["loss"] != pytest.approx(report.loss, rel=1e-6), "bfloat16 it was"


@pytest.mark.parametrize("heads", [None, "matched"], ids=["all of it", "matched heads"])
def test_an_adapters_training_is_aligned(
    heads: Any, folders: tuple[Path, Path], cache: TeacherCache, tmp_path: Path
) -> None:
    """A peft model around the student: at its start the student itself, and only the adapter moves; of the matched
    heads alone, nothing of the merged model outside their slices by a bit."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(plain(folders[0]), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    loss = CircuitAlignmentLoss(model, cache, PAIRS, prompts=BATCH, weight=LOOP.weight)
    trainer = trainer_of("transformers", folders, cache, tmp_path, model=model, alignment=loss, heads=heads)
    trainer.train()
    log = logged(trainer)
    _, alignment, _ = Objective(Student.load(folders[0], check=False), BATCH, cache, PAIRS, LOOP).losses(
        torch.arange(8)
    )
    assert log[0]["alignment_loss"] == pytest.approx(LOOP.weight * float(alignment), rel=1e-4)  # type: ignore[arg-type]
    assert log[0]["alignment_loss"] - log[-1]["alignment_loss"] > 100 * 1e-4
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    start, end = plain(folders[0]), model.merge_and_unload()
    changed = {
        name: before != after for (name, before), after in zip(start.named_parameters(), end.parameters(), strict=True)
    }
    for part in slices_of_heads(PlainHeads(start), HEADS):
        inside = changed[part.parameter][part.index]
        assert bool(inside.any()) == any(kind in part.parameter for kind in ("q_proj", "v_proj", "o_proj"))
        inside[...] = False
    assert any(bool(each.any()) for each in changed.values()) == (heads is None)


def test_a_resumed_training_of_slices_is_the_uninterrupted(
    folders: tuple[Path, Path], cache: TeacherCache, loop: Loop, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_of("transformers", folders, cache, tmp_path, heads="matched", settings=saving).train()
    resumed = trainer_of("transformers", folders, cache, tmp_path, heads="matched", settings=saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    reports, student = loop(LOOP, True)
    assert logged(resumed)[-1]["loss"] == pytest.approx(reports[-1].loss, rel=2e-4)
    assert_same_training(resumed, reports, student, True)


def test_trls_distillation_trainer_on_its_own_generations(
    folders: tuple[Path, Path], cache: TeacherCache, tmp_path: Path
) -> None:
    """It pads on the left and appends what the student generates; at the prompts' tokens the heads are the same."""
    pytest.importorskip("trl", reason="the extra trainers")
    from trl import DistillationConfig, DistillationTrainer

    class AlignedDistiller(CircuitAlignment, DistillationTrainer): ...

    tokenizer = word_tokenizer()
    tokenizer.eos_token = "."  # it generates until there
    texts = task_dataset(EntityTracking(boxes=3), tokenizer, split="train", scenes=8, seed=0)["clean"]
    model = plain(folders[0])
    trainer = AlignedDistiller(
        model=model,
        teacher_model=plain(folders[1]),
        args=DistillationConfig(
            **settings(tmp_path, max_steps=1, gradient_checkpointing=False), max_completion_length=3
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts[:8]]),
        alignment=CircuitAlignmentLoss(model, cache, PAIRS, prompts=BATCH, weight=LOOP.weight),
    )
    trainer.train()
    (entry,) = logged(trainer)
    with torch.no_grad():
        _, alignment, ckas = Objective(Student.load(folders[0], check=False), BATCH, cache, PAIRS, LOOP).losses(
            torch.arange(8)
        )
    assert alignment is not None
    assert entry["alignment_loss"] == pytest.approx(LOOP.weight * float(alignment), rel=1e-3)
    for pair, cka in zip(PAIRS, ckas.tolist(), strict=True):
        assert entry[f"similarity/{pair}"] == pytest.approx(cka, abs=1e-3)


def test_what_does_not_fit_is_refused(folders: tuple[Path, Path], cache: TeacherCache, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a list of heads nor 'matched'"):
        trainer_of("transformers", folders, cache, tmp_path, alignment=None, heads="matched")
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(plain(folders[0]), LoraConfig(r=2, target_modules=["o_proj", "up_proj"]))
    with torch.no_grad():
        adapted.get_base_model().model.layers[1].self_attn.o_proj.lora_B["default"].weight += 1
    with pytest.raises(InputError, match="begin with a fresh one"):
        PlainHeads(adapted).confine_adapter(HEADS)
    with pytest.raises(InputError, match="target_modules"):
        PlainHeads(adapted).head_slices(HEADS[0], ("q", "k"))
    stranger = trainer_of("transformers", folders, cache, tmp_path)
    stranger.train_dataset = training_rows(PROMPTS[8:16])
    with pytest.raises(InputError, match="begin with none of the 8 prompts"):
        stranger.train()
    short = trainer_of("transformers", folders, cache, tmp_path, settings={"per_device_train_batch_size": 7})
    with pytest.raises(InputError, match="dataloader_drop_last=True"):
        short.train()
    mixed = trainer_of("transformers", folders, cache, tmp_path, other_rows="skip", settings={"max_steps": 1})
    mixed.train_dataset = training_rows(PROMPTS[8:16])
    mixed.train()
    assert logged(mixed)[0]["alignment_loss"] == 0
