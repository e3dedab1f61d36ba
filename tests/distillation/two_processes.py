"""What `test_distributed` runs, by itself and under `accelerate launch`:
`python -m tests.distillation.two_processes TEACHER STUDENT OUT`. After the loop's own cases, one step of a transformers
model under DDP and under FSDP2, each process with its own, unequal part of the batch."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from tests.distillation.distilling import CONFIG, HEADS, PAIRS, PROMPTS, aligning
from workbench import storage
from workbench.distillation.alignment_loss import CircuitAlignmentLoss
from workbench.distillation.config import TrainingConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_heads
from workbench.distillation.processes import launched
from workbench.distillation.teacher_shards import teacher_shards
from workbench.matching.head_rows import hook_names
from workbench.models.hooked_model import Student, Teacher

WAYS = ("ddp", "fsdp")
PARTS = (torch.tensor([3, 0, 5, 8]), torch.tensor([13, 2]))
VALIDATION = PROMPTS.rows(slice(0, 6))
BASE = aligning(replace(CONFIG, batch=8, steps=4), weight=2.0)
CASES: dict[str, TrainingConfig] = {
    "plain": replace(BASE, alignment=None),
    "aligned": BASE,
    "accumulated": replace(
        aligning(BASE, activation="result"),
        accumulate=2,
        weight_schedule="linear_decay",
        task_loss="jsd_teacher",
        evaluate_every=1,
        restore_best=True,
    ),
    "alignment only": aligning(replace(BASE, task_loss="none", batch=16), estimator="debiased"),
    "micro": replace(BASE, alignment_batch="micro"),
}
"""All but the last have the same trajectory on any number of processes."""


def main(teacher: str, student: str, out: Path) -> None:
    """Train every case; the main process writes the logs, and the trained slices at the end."""
    names = hook_names([pair.teacher for pair in PAIRS])
    processes = launched()
    with processes.main_first():
        outputs = teacher_shards(Teacher.load(teacher, check=False), PROMPTS.rows(slice(6, None)), names, out / "cache")
    for name, config in CASES.items():
        if processes.shards and config.task_loss == "none":
            continue  # refused
        if processes.shards and config.activation == "result":
            config = aligning(config, activation="z")
        model = Student.load(student, check=False)
        slices = TrainedSlices(model, slices_of_heads(model, HEADS))
        pairs = PAIRS if config.weight else ()
        validation = VALIDATION if config.evaluate_every else None
        Distillation(
            model,
            slices,
            PROMPTS.rows(slice(6, None)),
            outputs,
            pairs,
            config,
            seed=3,
            validation=validation,
        ).run(out / name)
        storage.write_tensors(out / name / f"process-{processes.index}.safetensors", dict(slices.leaves))
    if processes.count > 1:
        if not processes.shards:
            for way in WAYS:
                step(way, teacher, student, out)
        PartialState().destroy_process_group()


def step(way: str, teacher: str, student: str, out: Path) -> None:
    """Write the loss, the similarities and (as DDP and FSDP average them) the gradients of each process."""
    plain, state = AutoModelForCausalLM.from_pretrained(student), PartialState()
    if way == "fsdp":
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
