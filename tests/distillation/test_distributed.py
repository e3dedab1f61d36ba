"""Two processes under `accelerate launch` on CPUs (gloo) against one: the same trajectory, aligned on the global
batch."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distillation.distilling import PAIRS, PROMPTS
from tests.distillation.two_processes import CASES, PARTS, WAYS, main
from workbench import storage
from workbench.distillation.alignment_loss import CircuitAlignmentLoss
from workbench.distillation.processes import launched
from workbench.distillation.reports import StepReport, read_log
from workbench.errors import InputError
from workbench.models.hooked_model import Teacher

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EQUAL = [name for name in CASES if name != "micro"]
Runs = tuple[Path, Path]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(*words: Any, processes: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch`, one thread each. `--multi_gpu` is its word for several processes; the students are on the
    CPU, so it is gloo."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        processes,
        "--num_machines",
        1,
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port(), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **variables}
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def runs(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(one process, two processes): every case, trained."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    folder, models = tmp_path_factory.mktemp("processes"), [str(model_folder("llama", seed=seed)) for seed in (1, 0)]
    done = launch("-m", "tests.distillation.two_processes", *models, folder / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    main(*models, folder / "one")
    return folder / "one", folder / "two"


SHARDED = ("plain", "aligned")


@pytest.fixture(scope="module")
def sharded(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes with the student's weights sharded over them."""
    folder, models = tmp_path_factory.mktemp("sharded"), [str(model_folder("llama", seed=seed)) for seed in (1, 0)]
    done = launch(
        "-m", "tests.distillation.two_processes", *models, folder, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.lengthy
@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_of_sharded_weights_equal_one(runs: Runs, sharded: Path, name: str) -> None:
    """FSDP2: the same losses, the same slices at the end, on both processes."""
    one, two = read_log(runs[0] / name / "log.jsonl"), read_log(sharded / name / "log.jsonl")
    assert len(one) == len(two) == CASES[name].steps
    for first, second in zip(one, two, strict=True):
        assert second.loss == pytest.approx(first.loss, rel=1e-4)
        assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-3)
        assert second.ckas == pytest.approx(first.ckas, rel=1e-3, abs=1e-4)
    ends = [
        storage.read_tensors(run / name / f"process-{index}.safetensors")[0]
        for run, index in ((runs[0], 0), (sharded, 0), (sharded, 1))
    ]
    assert all(torch.equal(value, ends[2][key]) for key, value in ends[1].items())
    assert max(float((value - ends[1][key]).abs().max()) for key, value in ends[0].items()) < 1e-4
    plain = storage.read_tensors(runs[0] / ("aligned" if name == "plain" else "plain") / "process-0.safetensors")[0]
    assert max(float((value - ends[1][key]).abs().max()) for key, value in plain.items()) > 100 * 1e-4


@pytest.mark.lengthy
def test_a_split_batch_of_a_sharded_student(runs: Runs, sharded: Path) -> None:
    """Micro-batches, evaluation between steps and the best weights restored; aligned on `z` here, as W_O is sharded."""
    reports = read_log(sharded / "accumulated" / "log.jsonl")
    assert len(reports) == CASES["accumulated"].steps
    assert all(report.accuracy is not None for report in reports)
    first = read_log(runs[0] / "accumulated" / "log.jsonl")[0]
    assert reports[0].task_loss == pytest.approx(first.task_loss, rel=1e-4), (
        "the task loss of the first step knows nothing of the alignment"
    )


def logs(runs: Runs, name: str) -> tuple[list[StepReport], list[StepReport]]:
    return read_log(runs[0] / name / "log.jsonl"), read_log(runs[1] / name / "log.jsonl")


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_equal_one(runs: Runs, name: str) -> None:
    one, two = logs(runs, name)
    assert len(one) == len(two) == CASES[name].steps
    for first, second in zip(one, two, strict=True):
        assert first.learning_rate == second.learning_rate
        assert first.accuracy == second.accuracy
        assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-3)
        for field in ("loss", "task_loss", "alignment_loss"):
            assert getattr(second, field) == (
                None if getattr(first, field) is None else pytest.approx(getattr(first, field), rel=1e-4)
            ), field
        assert second.ckas == pytest.approx(first.ckas, rel=1e-3, abs=1e-4)
    weights = [storage.read_tensors(run / name / "process-0.safetensors")[0] for run in runs]
    other = storage.read_tensors(runs[1] / name / "process-1.safetensors")[0]
    assert all(torch.equal(value, other[key]) for key, value in weights[1].items()), (
        "both processes end with the same bits"
    )
    assert max(float((value - weights[1][key]).abs().max()) for key, value in weights[0].items()) < 1e-4
    plain = storage.read_tensors(runs[0] / ("aligned" if name == "plain" else "plain") / "process-0.safetensors")[0]
    assert max(float((value - weights[1][key]).abs().max()) for key, value in plain.items()) > 100 * 1e-4, (
        "another run ends elsewhere"
    )


def test_the_alignment_sees_the_global_batch(runs: Runs) -> None:
    """Each process by itself would see half the rows, whose biased CKA is higher: that is what `micro` logs."""
    (one, two), (_, micro) = logs(runs, "aligned"), logs(runs, "micro")
    mean = [sum(report.ckas.values()) / 3 for report in (one[0], two[0], micro[0])]
    assert mean[1] == pytest.approx(mean[0], rel=1e-4)
    assert mean[2] > mean[0] * (1 + 100 * 1e-4)


def test_the_alignment_in_any_loop_sees_the_global_batch(runs: Runs, model_folder: Callable[..., Path]) -> None:
    """A plain transformers model under DDP and under FSDP2, with unequal parts of a batch: loss and gradients of the
    whole of it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama", seed=0))
    teacher = Teacher.load(model_folder("llama", seed=1), check=False)
    loss = CircuitAlignmentLoss(model, teacher, PAIRS, weight=0.5)

    def of(index: torch.Tensor) -> torch.Tensor:
        rows = PROMPTS.rows(index)
        return loss(rows.clean, rows.mask, rows.positions)[0]

    total, alone = of(torch.cat(PARTS)), float(of(PARTS[0]).detach())
    total.backward()
    assert abs(alone - float(total.detach())) > 100 * 1e-4, "a process by itself would see another loss"
    expected = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    largest = max(float(value.abs().max()) for value in expected.values())
    for way in WAYS:
        for process in range(2):
            written, _ = storage.read_tensors(runs[1] / f"{way}-{process}.safetensors")
            assert float(written.pop("loss")) == pytest.approx(float(total.detach()), rel=1e-4)
            for name, value in expected.items():
                torch.testing.assert_close(written[name], value, rtol=0, atol=1e-3 * largest)


def test_one_log_and_one_checkpoint(runs: Runs) -> None:
    assert sorted(path.name for path in (runs[1] / "accumulated").iterdir()) == sorted(
        ["best.safetensors", "checkpoint.safetensors", "log.jsonl", "process-0.safetensors", "process-1.safetensors"]
    )


def test_launching_is_recognised_and_flattening_fsdp_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched().count == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="fsdp_version: 2"):
        launched()


@pytest.mark.parametrize(("name", "kind"), [("multi_gpu", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_accelerate_reads_the_bundled_configurations(name: str, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "workbench" / "recipes" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert name != "fsdp" or config.fsdp_config["fsdp_version"] == 2
    assert config.mixed_precision == "no", "the recipe's `precision` alone says what is computed in bfloat16"
