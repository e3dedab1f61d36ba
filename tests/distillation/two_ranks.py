"""What `test_alignment_processes` runs under `accelerate launch`:
`python -m tests.distillation.two_ranks STUDENT TEACHER OUT`. One step of a transformers model, wrapped by
DDP or sharded by FSDP2, each process with its own, unequal part of the batch."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from tests.distillation.distilling import PAIRS, PROMPTS
from workbench import storage
from workbench.distillation.alignment_loss import CircuitAlignmentLoss
from workbench.models.hooked_model import Teacher

PARTS = (torch.tensor([3, 0, 5, 8]), torch.tensor([13, 2]))


WAYS = ("ddp", "fsdp")


def main(student: str, teacher: str, out: Path) -> None:
    """Both ways, in one launch."""
    state = PartialState(cpu=True)
    for way in WAYS:
        step(state, student, teacher, out, way)
    state.destroy_process_group()


def step(state: PartialState, student: str, teacher: str, out: Path, way: str) -> None:
    """Write the loss, the similarities and (as DDP and FSDP average them) the gradients of each process."""
    plain = AutoModelForCausalLM.from_pretrained(student)
    if way == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (state.num_processes,))
        for block in plain.model.layers:
            fully_shard(block, mesh=mesh)
        model = fully_shard(plain, mesh=mesh)
    else:
        model = DistributedDataParallel(plain)
    loss = CircuitAlignmentLoss(plain, Teacher.load(teacher, check=False), PAIRS, prompts=PROMPTS, weight=0.5)
    rows = PROMPTS.rows(PARTS[state.process_index])
    with loss.recording() as record:
        logits = model(input_ids=rows.clean, attention_mask=rows.mask.long(), use_cache=False).logits
    total, similarities = loss.of_recording(record)
    (total + 0 * logits.sum()).backward()  # a trainer's own loss reaches every block
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in gradients.items()}
    storage.write_tensors(
        out / f"{way}-{state.process_index}.safetensors",
        {"loss": total.detach(), **{f"similarity/{name}": value for name, value in similarities.items()}, **whole},
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
