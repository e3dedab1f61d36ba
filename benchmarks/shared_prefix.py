"""The seven questions of a scene as one prefix and seven continuations, against seven prompts: a model's accuracy, and
a circuit alone (scope `everywhere`), on the bundled student.

A prompt has 53 tokens of which a scene's seven share 50: 50 + 7 * 3 = 71 in place of 371, a fifth. What is left beside
the tokens is who sees whom in a row, and the last tokens' logits.
"""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import subjects
from benchmarks.timing import medians
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.evaluation import circuit_logits, correct
from workbench.models.hooked_model import Student
from workbench.patching.ablation import plain_logits, reference_means
from workbench.patching.shared import shared_prefixes

SCENES = 60
"""As many prompts as `study_scenes` would evaluate on with `queries: 7` in a seventh of its scenes."""


def run(*, scenes: int = SCENES, repeats: int = 3) -> dict[str, Any]:
    """One result: how many times less processor time, and by how much the logits differ."""
    model, pairs = Student.load("student"), subjects.entity_pairs(7 * scenes)
    means = reference_means(model, pairs.swapped(), per_position=False)
    members = [Member(head, "drawn", "all") for head in model.heads[::3]]
    circuit = Circuit.of(members, shape=(model.n_layers, model.n_heads), method="benchmark")
    results: dict[str, Any] = {"name": "shared-prefix", "prompts": len(pairs), "tokens": pairs.clean.shape[1]}

    def whole() -> Tensor:
        return plain_logits(model, pairs)

    def alone() -> Tensor:
        return circuit_logits(model, pairs, circuit, means, scope="everywhere")

    for name, plain in (("ratio", whole), ("circuit_ratio", alone)):

        def shared(plain: Any = plain) -> Tensor:
            with shared_prefixes():
                return plain()

        expected, actual = plain(), shared()
        assert bool((correct(actual, pairs) == correct(expected, pairs)).all()), "the same answers"
        fast, slow = medians(shared, plain, repeats=repeats, warm=True, clock=time.process_time)
        results[name] = round(slow / fast, 2)
        results["max_abs_difference"] = max(
            results.get("max_abs_difference", 0.0), float((actual - expected).abs().max())
        )
        results["effect"] = round(float(expected.abs().max()), 2)
    return results | {"threads": torch.get_num_threads()}
