"""Two processes with unequal parts of a batch align the whole of it, under DDP and FSDP2 (gloo)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distillation.distilling import PAIRS, PROMPTS
from tests.distillation.test_distributed import launch
from tests.distillation.two_ranks import PARTS, WAYS
from workbench import storage
from workbench.distillation.alignment_loss import CircuitAlignmentLoss
from workbench.models.hooked_model import Teacher


@pytest.mark.slow
def test_two_processes_align_the_whole_batch(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    student, teacher = model_folder("llama", seed=0), model_folder("llama", seed=1)
    done = launch("-m", "tests.distillation.two_ranks", student, teacher, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForCausalLM.from_pretrained(student)
    loss = CircuitAlignmentLoss(model, Teacher.load(teacher, check=False), PAIRS, weight=0.5)

    def of(index: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        rows = PROMPTS.rows(index)
        total, _ = loss(rows.clean, rows.mask, rows.positions)
        model.zero_grad()
        total.backward()
        return float(total.detach()), {
            name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
        }

    (total, expected), (alone, _) = of(torch.cat(PARTS)), of(PARTS[0])
    assert abs(alone - total) > 100 * 1e-4, "a process by itself would see another loss"
    largest = max(float(value.abs().max()) for value in expected.values())
    for way in WAYS:
        for process in range(2):
            found, _ = storage.read_tensors(tmp_path / f"{way}-{process}.safetensors")
            assert float(found.pop("loss")) == pytest.approx(total, rel=1e-4)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3 * largest)
