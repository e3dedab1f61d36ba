"""A training step with alignment against the same step without: student of 6 layers, d_model 256, 8 heads; 32 prompts
of 54 tokens; 12 pairs.

The arithmetic: forward and backward of the student are 6 * (parameters of its blocks) * 32 * 54 operations; CKA of a
pair at one token is three products of [32 x 32] features, twelve pairs together less than a millionth of that. What is
left is the capture of the heads' outputs, and gathering the rows. With the teacher live, its forward comes on top, and
nothing else.

`sdpa_ratio`: how many times longer the same step takes with attention step by step than in one kernel.

Medians of interleaved steps on one thread, every step on the next batch, in seconds of processor time: on one thread
that is the wall clock's without what other work on the machine takes away.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.subjects import llama, random_pairs
from benchmarks.timing import medians
from workbench.distillation.config import AlignmentConfig, TrainingConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_heads
from workbench.distillation.teacher_cache import LiveTeacher, TeacherOutputs, computed
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.head_rows import hook_names
from workbench.models.fused import attention
from workbench.models.hooked_model import Student, Teacher
from workbench.models.names import Attention
from workbench.values.refs import Head

PROMPTS, TOKENS, BATCH = 96, 54, 32
PAIRS = tuple(
    AlignedPair(
        student=Head(place // 2, 3 * place % 8),
        teacher=Head(place, place % 12),
        student_positions=("last",),
        teacher_positions=("last",),
    )
    for place in range(12)
)
"""Two heads in each layer of the student, one in each of the teacher's twelve."""


def run(*, repeats: int = 15) -> dict[str, Any]:
    """One result: the ratio with cached teacher activations, and what a live teacher adds as a multiple of its
    forward."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(repeats)
    finally:
        torch.set_num_threads(threads)


def _measured(repeats: int) -> dict[str, Any]:
    prompts = random_pairs(PROMPTS, TOKENS)
    teacher = llama(layers=12, heads=12, kv_heads=12, d_model=384, d_head=32)
    names = hook_names([pair.teacher for pair in PAIRS])
    cache = computed(teacher, prompts, names)
    plain, aligned, live = (
        _steps(teacher_outputs, weight)
        for teacher_outputs, weight in ((cache, 0.0), (cache, 0.5), (LiveTeacher(teacher, prompts, names), 0.5))
    )
    forward, fused = _forwards(teacher), _steps(cache, 0.5, kind="sdpa")
    without, cached, with_teacher, in_one_kernel, alone = medians(
        plain, aligned, live, fused, forward, repeats=repeats, clock=time.process_time
    )
    return {
        "name": "distill-step",
        "ratio": round(cached / without, 3),
        "live_overhead_in_teacher_forwards": round((with_teacher - cached) / alone, 3),
        "cpu_seconds_without": round(without, 4),
        "cpu_seconds_cached": round(cached, 4),
        "cpu_seconds_live": round(with_teacher, 4),
        "cpu_seconds_teacher_forward": round(alone, 4),
        "sdpa_ratio": round(cached / in_one_kernel, 3),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def _steps(outputs: TeacherOutputs, weight: float, kind: Attention = "eager") -> Callable[[], object]:
    """The next step of a run of its own, on the same prompts and heads."""
    student = Student(llama(layers=6, heads=8, kv_heads=8, d_model=256, d_head=32).model)
    slices = TrainedSlices(student, slices_of_heads(student, [pair.student for pair in PAIRS]))
    config = TrainingConfig(batch=BATCH, alignment=AlignmentConfig(weight=weight), steps=100_000)
    training = Distillation(
        student, slices, random_pairs(PROMPTS, TOKENS), outputs, PAIRS if weight else (), config, seed=0
    )
    numbers = iter(range(config.steps))

    def step() -> object:
        with attention(student, kind), slices.gradients(), student.training():
            return training.step(next(numbers))

    return step


def _forwards(teacher: Teacher) -> Callable[[], object]:
    prompts = random_pairs(BATCH, TOKENS)

    def forward() -> object:
        with torch.no_grad():
            return teacher.final_logits(prompts.clean, prompts.mask)

    return forward
