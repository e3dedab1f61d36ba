"""The training loop's settings: schedules of lambda, split batches, evaluation and early stopping, autocast."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import entity_pairs
from tests.distillation.distilling import CONFIG, HEADS, PAIRS, PLAIN, PROMPTS, aligning, furthest, trained, values
from workbench import seeds, storage
from workbench.distillation import losses, schedules, teacher_cache
from workbench.distillation.backward import backward
from workbench.distillation.config import LATER, AlignmentConfig, TrainingConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_heads
from workbench.distillation.processes import Processes
from workbench.distillation.reports import StepReport, best_evaluation, exhausted, read_log, steps_to_reach
from workbench.errors import InputError
from workbench.matching.head_rows import hook_names
from workbench.models.hooked_model import Student

Loader = Callable[..., Any]
VALIDATION = entity_pairs(split="calibration", scenes=4)


def outputs_of(load_teacher: Loader, architecture: str) -> teacher_cache.TeacherCache:
    return teacher_cache.computed(
        load_teacher(architecture, seed=1), PROMPTS, hook_names([pair.teacher for pair in PAIRS])
    )


def run_of(student: Student, outputs: Any, config: TrainingConfig, **given: Any) -> Distillation:
    return Distillation(
        student,
        TrainedSlices(student, slices_of_heads(student, HEADS)),
        PROMPTS,
        outputs,
        PAIRS,
        config,
        seed=3,
        **given,
    )


# Schedules of lambda


def lambdas(config: TrainingConfig) -> list[float]:
    return [schedules.alignment_weight(config, step) for step in range(config.steps)]


def test_schedules_of_lambda() -> None:
    plain = TrainingConfig(steps=8, alignment=AlignmentConfig(weight=2.0))
    assert lambdas(plain) == [2.0] * 8
    assert lambdas(replace(plain, weight_schedule="linear_warmup", weight_steps=4)) == pytest.approx(
        [0, 0.5, 1, 1.5, 2, 2, 2, 2]
    )
    assert lambdas(replace(plain, weight_schedule="linear_decay")) == pytest.approx([2 - step / 4 for step in range(8)])
    for shape in ("linear", "cosine"):
        up, down = (
            lambdas(replace(plain, weight_schedule=f"{shape}_{way}", weight_steps=5)) for way in ("warmup", "decay")
        )
        assert [a + b for a, b in zip(up, down, strict=True)] == pytest.approx([2.0] * 8), (
            "one is the other upside down"
        )
        assert up == sorted(up)
        assert up[0] == 0
        assert up[5:] == pytest.approx([2.0] * 3)
    cosine = lambdas(replace(plain, weight_schedule="cosine_warmup", weight_steps=4))
    assert cosine[1] == pytest.approx(1 - math.cos(math.pi / 4)), "slower than the line at first"
    assert cosine[2] == pytest.approx(1.0)


def test_the_schedule_is_in_the_loss_and_in_the_log(load_student: Loader, load_teacher: Loader, tmp_path: Path) -> None:
    config = replace(CONFIG, weight_schedule="cosine_decay", weight_steps=4)
    reports = trained(load_student(), outputs_of(load_teacher, "llama"), config, tmp_path)
    assert [report.weight for report in reports] == pytest.approx(lambdas(config))
    for report in read_log(tmp_path / "log.jsonl"):
        assert report.loss == pytest.approx(report.task_loss + report.weight * report.alignment_loss, rel=1e-5)


def test_lambda_that_is_always_0_equals_plain(load_student: Loader, load_teacher: Loader, tmp_path: Path) -> None:
    """A warm-up so long that lambda stays at rounding: the trajectory is that of lambda = 0, which aligns nothing."""
    outputs, students = outputs_of(load_teacher, "llama"), [load_student() for _ in range(3)]
    start = values(students[0])
    schedule = replace(CONFIG, weight_schedule="linear_warmup", weight_steps=10**9)
    for number, (student, config) in enumerate(zip(students, (schedule, PLAIN, CONFIG), strict=True)):
        trained(student, outputs, config, tmp_path / str(number))
    risen, plain, aligned = map(values, students)
    assert furthest(risen, plain) < 1e-5
    assert furthest(aligned, plain) > 100 * 1e-5
    assert furthest(start, plain) > 100 * 1e-5


# Split batches


def gradients_of(student: Student, outputs: Any, config: TrainingConfig) -> tuple[dict[str, Tensor], Any]:
    run = run_of(student, outputs, config)
    with run.slices.gradients(), student.training():
        found = backward(
            run.objective,
            run.batch_index(0),
            config.weight,
            Processes(),
            lambda *piece: seeds.local(3, "dropout", *piece),
        )
        run.slices.collect_gradients()
    return {key: leaf.grad for key, leaf in run.slices.leaves.items() if leaf.grad is not None}, found


@pytest.mark.parametrize("architecture", ["llama", "neox"])
@pytest.mark.parametrize("activation", ["z", "result"])
@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_split_equals_whole(
    load_student: Loader, load_teacher: Loader, architecture: str, activation: Any, pieces: int
) -> None:
    """Losses, CKAs and gradients of both terms to rounding, for positions of one token and of several."""
    outputs, student = outputs_of(load_teacher, architecture), load_student(architecture)
    config = aligning(replace(CONFIG, batch=16), activation=activation, estimator="debiased")
    whole, expected = gradients_of(student, outputs, config)
    split, found = gradients_of(student, outputs, replace(config, accumulate=pieces))
    scale = max(float(gradient.abs().max()) for gradient in whole.values())
    assert furthest(split, whole) < 1e-4 * scale
    for name in ("total", "task", "alignment", "ckas"):
        torch.testing.assert_close(
            getattr(found, name).detach(), getattr(expected, name).detach(), rtol=1e-4, atol=1e-5
        )
    alone, _ = gradients_of(student, outputs, aligning(config, weight=1e-9))
    assert furthest(alone, whole) > 100 * 1e-4 * scale, (
        "the alignment is a part of this gradient that a mistake would show"
    )


def test_micro_alignment_is_another_objective(load_student: Loader, load_teacher: Loader) -> None:
    """The mean of the pieces' own losses, by hand; the biased CKA of fewer rows is higher."""
    outputs, student = outputs_of(load_teacher, "llama"), load_student()
    config = replace(CONFIG, batch=16, accumulate=4, alignment_batch="micro")
    whole, (_, found) = (
        gradients_of(student, outputs, replace(config, accumulate=1))[1],
        gradients_of(student, outputs, config),
    )
    run = run_of(student, outputs, config)
    pieces = [run.losses(piece) for piece in run.batch_index(0).chunk(4)]
    assert float(found.alignment) == pytest.approx(
        sum(float(alignment.detach()) for _, alignment, _ in pieces) / 4, rel=1e-5
    )
    assert float(found.task) == pytest.approx(float(whole.task), rel=1e-5), "the task loss is the batch's all the same"
    assert float(found.ckas.mean()) > float(whole.ckas.mean()) + 0.05


def test_split_with_dropout_equals_one_graph_over_the_pieces(load_student: Loader, load_teacher: Loader) -> None:
    """The slow reference: every piece with its dropout, all rows in one graph, one backward. GPT-2 has dropout of
    0.1."""
    outputs, student = outputs_of(load_teacher, "gpt2"), load_student("gpt2")
    config = replace(CONFIG, batch=16, accumulate=4)
    split, found = gradients_of(student, outputs, config)
    run = run_of(student, outputs, config)
    with run.slices.gradients(), student.training():
        tasks, rows = [], []
        for number, piece in enumerate(run.batch_index(0).chunk(4)):
            with seeds.local(3, "dropout", number):
                task, mine = run.objective.task_and_rows(piece)
            tasks.append(task)
            rows.append(mine)
        joined = [torch.cat(list(parts)) for parts in zip(*rows, strict=True)]
        alignment, _ = losses.alignment_loss(
            list(zip(joined, run.objective.teacher_rows(run.batch_index(0)), strict=True)), estimator="biased"
        )
        (torch.stack(tasks).mean() + config.weight * alignment).backward()
        run.slices.collect_gradients()
    expected = {key: leaf.grad for key, leaf in run.slices.leaves.items() if leaf.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert furthest(split, expected) < 1e-4 * scale
    assert float(found.alignment) == pytest.approx(float(alignment.detach()), rel=1e-4)
    undisturbed, _ = gradients_of(load_student("gpt2"), outputs, replace(config, accumulate=1))
    assert furthest(undisturbed, expected) > 100 * 1e-4 * scale, "dropout is at work"


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_trajectory_2_x_4_accumulated_equals_8(
    load_student: Loader, load_teacher: Loader, tmp_path: Path, weight: float
) -> None:
    outputs, whole, split = outputs_of(load_teacher, "llama"), load_student(), load_student()
    start = values(whole)
    expected = trained(whole, outputs, aligning(weight=weight), tmp_path / "whole")
    found = trained(split, outputs, aligning(replace(CONFIG, accumulate=2), weight=weight), tmp_path / "split")
    assert [report.loss for report in found] == pytest.approx([report.loss for report in expected], rel=1e-4)
    assert furthest(values(split), values(whole)) < 1e-4
    assert furthest(start, values(whole)) > 100 * 1e-4
    assert len({round(report.loss, 2) for report in expected}) > 1


def test_a_batch_that_does_not_split_is_refused(load_student: Loader, load_teacher: Loader) -> None:
    with pytest.raises(InputError, match="multiple of 3"):
        run_of(load_student(), outputs_of(load_teacher, "llama"), replace(CONFIG, accumulate=3))


# Evaluation and early stopping


def report(step: int, accuracy: float | None) -> StepReport:
    return StepReport(
        step=step,
        loss=1.0,
        task_loss=1.0,
        alignment_loss=None,
        ckas={},
        gradient_norm=1.0,
        learning_rate=0.1,
        accuracy=accuracy,
    )


def test_what_the_log_says_of_evaluations() -> None:
    log = [
        report(step, accuracy) for step, accuracy in enumerate([None, 0.2, None, 0.5, None, 0.4, None, 0.5, None, 0.1])
    ]
    assert best_evaluation(log) == (4, 0.5), "the earlier of equals"
    assert [exhausted(log[:length], 2) for length in range(0, 11, 2)] == [False, False, False, False, True, True]
    assert not exhausted(log, None)
    assert not exhausted([report(0, None)], 1)
    assert best_evaluation([]) is None
    assert [steps_to_reach(log, accuracy) for accuracy in (0.1, 0.2, 0.3, 0.5, 0.51)] == [2, 2, 4, 4, None]


def test_evaluation_changes_nothing_and_is_the_accuracy(
    load_student: Loader, load_teacher: Loader, tmp_path: Path
) -> None:
    """GPT-2 has dropout: an evaluation in training mode, or one that draws random numbers, would show."""
    outputs, plain, evaluated = outputs_of(load_teacher, "gpt2"), load_student("gpt2"), load_student("gpt2")
    expected = trained(plain, outputs, CONFIG, tmp_path / "plain")
    found = trained(
        evaluated, outputs, replace(CONFIG, evaluate_every=2), tmp_path / "evaluated", validation=VALIDATION
    )
    assert [replace(report, accuracy=None) for report in found] == expected
    assert [report.step + 1 for report in found if report.accuracy is not None] == [2, 4, 6]
    right = evaluated.final_logits(VALIDATION.clean, VALIDATION.mask).argmax(-1) == VALIDATION.answers
    assert found[-1].accuracy == pytest.approx(float(right.float().mean()))
    assert read_log(tmp_path / "evaluated" / "log.jsonl") == found


class Scripted:
    """A validation that gives scripted accuracies, and keeps the student's weights at each."""

    def __init__(self, *script: float) -> None:
        self.script, self.seen = list(script), list[dict[str, Tensor]]()

    def __call__(self, student: Student) -> float:
        assert not student.model.training
        assert not torch.is_grad_enabled()
        self.seen.append(values(student))
        return self.script[len(self.seen) - 1]


STOPPING = replace(CONFIG, steps=20, evaluate_every=2, patience=2, checkpoint_every=3)


def test_early_stopping_and_the_best_weights(load_student: Loader, load_teacher: Loader, tmp_path: Path) -> None:
    outputs, script = outputs_of(load_teacher, "llama"), (0.1, 0.4, 0.4, 0.3, 0.9)
    last, best = (Scripted(*script) for _ in range(2))
    stopped, restored = load_student(), load_student()
    reports = trained(stopped, outputs, STOPPING, tmp_path / "last", validation=last)
    assert len(reports) == 8, "two evaluations after the best, which is the first of equals"
    assert furthest(values(stopped), last.seen[3]) == 0
    trained(restored, outputs, replace(STOPPING, restore_best=True), tmp_path / "best", validation=best)
    assert furthest(values(restored), best.seen[1]) == 0
    assert furthest(values(restored), values(stopped)) > 1e-3
    again = load_student()
    assert trained(again, outputs, STOPPING, tmp_path / "last", validation=Scripted(), resume=True) == reports, (
        "a stopped run stays stopped"
    )
    assert furthest(values(again), values(stopped)) == 0


@pytest.mark.parametrize("dies", [4, 5, 7])
def test_killed_and_resumed_with_everything_that_has_state(
    load_student: Loader, load_teacher: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: int
) -> None:
    """Accumulation, dropout, lambda's and the rate's schedules, patience, best weights: to the same bits."""
    outputs, script = outputs_of(load_teacher, "gpt2"), {2: 0.1, 4: 0.6, 6: 0.3, 8: 0.5}
    config = replace(
        STOPPING,
        accumulate=2,
        weight_schedule="cosine_warmup",
        weight_steps=5,
        schedule="cosine",
        warmup=2,
        restore_best=True,
        task_loss="jsd_teacher",
    )
    step = Distillation.step

    def run(name: str, *, dies: int | None = None, resume: bool = False) -> tuple[Any, Student]:
        taken = [0]

        def counted(self: Distillation, number: int) -> Any:
            if number == dies:
                raise KeyboardInterrupt
            taken[0] = number + 1
            return step(self, number)

        monkeypatch.setattr(Distillation, "step", counted)
        student = load_student("gpt2")
        return trained(
            student, outputs, config, tmp_path / name, validation=lambda _: script[taken[0]], resume=resume
        ), student

    reports, whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", dies=dies)
    resumed, again = run("killed", resume=True)
    assert resumed == reports
    assert len(reports) == 8
    assert read_log(tmp_path / "killed" / "log.jsonl") == reports
    assert furthest(values(again), values(whole)) == 0


def test_evaluation_refusals(load_student: Loader, load_teacher: Loader) -> None:
    outputs, student = outputs_of(load_teacher, "llama"), load_student()
    with pytest.raises(InputError, match="need evaluations"):
        run_of(student, outputs, replace(CONFIG, patience=2))
    with pytest.raises(InputError, match="no validation prompts"):
        run_of(student, outputs, replace(CONFIG, evaluate_every=2))
    with pytest.raises(InputError, match="there are 6 steps"):
        run_of(student, outputs, replace(CONFIG, evaluate_every=7), validation=VALIDATION)
    with pytest.raises(InputError, match="3 of the 3 validation prompts are also training prompts"):
        run_of(student, outputs, replace(CONFIG, evaluate_every=2), validation=PROMPTS.rows(slice(0, 3)))
    with pytest.raises(InputError, match="no validation prompts"):
        run_of(student, outputs, replace(CONFIG, evaluate_every=2), validation=VALIDATION.rows(slice(0, 0)))


# Precision


def test_bf16_computes_the_forward_in_bfloat16_and_the_losses_in_float32(
    load_student: Loader, load_teacher: Loader, tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, full, half = outputs_of(load_teacher, architecture), load_student(architecture), load_student(architecture)
    seen: list[torch.dtype] = []
    inside = losses.alignment_loss

    def watching(rows: Any, **settings: Any) -> Any:
        seen.extend(side.dtype for pair in rows for side in pair)
        assert not torch.is_autocast_enabled("cpu")
        return inside(rows, **settings)

    monkeypatch.setattr(losses, "alignment_loss", watching)
    expected = trained(full, outputs, CONFIG, tmp_path / "full")
    found = trained(half, outputs, aligning(replace(CONFIG, precision="bf16"), activation="result"), tmp_path / "half")
    assert set(seen) == {torch.float32}
    assert {parameter.dtype for parameter in half.parameters().values()} == {torch.float32}
    run = run_of(half, outputs, replace(CONFIG, precision="bf16"))
    with run.objective._autocast(), torch.no_grad():
        assert half.final_logits(PROMPTS.clean[:2], PROMPTS.mask[:2]).dtype == torch.bfloat16
    assert found[0].task_loss != expected[0].task_loss
    assert found[0].task_loss == pytest.approx(expected[0].task_loss, rel=0.05), "as near as bfloat16 comes"
    assert all(math.isfinite(report.loss) for report in found)
    assert found[-1].alignment_loss < found[0].alignment_loss


def test_attention_in_one_kernel_trains_alike(load_student: Loader, load_teacher: Loader, tmp_path: Path) -> None:
    """Steps to float32 rounding, far below what the training does; GPT-2's split projections and patterns are
    refused; and checkpoints of the two forms are not each other's, while those from before there was a choice are."""
    outputs, fused = outputs_of(load_teacher, "llama"), replace(CONFIG, attention="sdpa")
    expected, fast = (
        trained(load_student("llama"), outputs, config, tmp_path / config.attention) for config in (CONFIG, fused)
    )
    for one, other in zip(expected, fast, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert list(other.ckas.values()) == pytest.approx(list(one.ckas.values()), rel=1e-4)
    assert abs(expected[-1].loss - expected[0].loss) > 1e-3 * expected[0].loss, "the training does much more"
    one, other = (run_of(load_student("llama"), outputs, config) for config in (CONFIG, fused))
    assert one.identity["configuration"] != other.identity["configuration"]
    before = {
        key: value for key, value in asdict(CONFIG).items() if key not in ("attention", "answers", "shared_prefixes")
    }
    before["alignment"] = {key: value for key, value in before["alignment"].items() if key not in LATER}
    assert one.identity["configuration"] == storage.digest(json.dumps(before, sort_keys=True))
    gpt2 = load_student("gpt2")
    with pytest.raises(InputError, match="leave `attention: eager`"):
        trained(gpt2, outputs_of(load_teacher, "gpt2"), fused, tmp_path / "gpt2")
    assert "forward" not in gpt2.model.blocks[0].attn.__dict__, "as it was"
    with pytest.raises(InputError, match="sdpa shows no attention probabilities"):
        run_of(load_student("llama"), outputs, aligning(fused, activation="pattern", measure="attention_kl"))


# Trackers


def test_the_log_also_goes_to_tensorboard(load_student: Loader, load_teacher: Loader, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reports = trained(
        load_student(), outputs_of(load_teacher, "llama"), replace(CONFIG, trackers=("tensorboard",)), tmp_path
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    assert read_log(tmp_path / "log.jsonl") == reports, "JSONL in any case"
    written = EventAccumulator(str(tmp_path / "circuit-distillation"))
    written.Reload()
    for name, expected in {
        "loss": [report.loss for report in reports],
        "weight": [0.5] * 6,
        f"cka/{PAIRS[1]}": [report.ckas[str(PAIRS[1])] for report in reports],
    }.items():
        events = written.Scalars(name)
        assert [event.step for event in events] == list(range(6))
        assert [event.value for event in events] == pytest.approx(expected, rel=1e-6)
    assert "accuracy" not in written.Tags()["scalars"], "what the run leaves out is not logged"


def test_a_missing_tracker_is_refused_before_training(
    load_student: Loader, load_teacher: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"tracker 'trackio' needs its package: pip install"):
        run_of(load_student(), outputs_of(load_teacher, "llama"), replace(CONFIG, trackers=("trackio",)))
