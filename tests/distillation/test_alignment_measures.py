"""Training by any measure: the loss by hand, what it trains and what not, and the default as it always was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from scipy import special

from tests.conftest import entity_pairs
from tests.distillation.distilling import aligning
from workbench import seeds
from workbench.distillation import losses, teacher_cache
from workbench.distillation.config import AlignmentConfig, TrainingConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_everything, slices_of_heads
from workbench.errors import InputError
from workbench.experiment.recipe import parse_recipe
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.head_rows import hook_names
from workbench.models import hooks
from workbench.models.hooked_model import Student
from workbench.similarity.cka import linear_cka
from workbench.similarity.measures import MEASURES, Measure, similarity
from workbench.values.refs import Head

PROMPTS = entity_pairs(split="train", scenes=8)
PAIRS = tuple(
    AlignedPair(
        student=Head(*student), teacher=Head(*teacher), student_positions=(position,), teacher_positions=(position,)
    )
    for student, teacher, position in [((1, 0), (2, 1), "last"), ((2, 3), (1, 2), "labels")]
)
CONFIG = TrainingConfig(
    task_loss="none",
    alignment=AlignmentConfig(),
    steps=12,
    batch=24,
    learning_rate=1e-2,
    weight_decay=0.0,
    clip=10.0,
)
Loader = Callable[..., Any]


def distillation(student: Student, teacher: Any, config: TrainingConfig, *, everything: bool = False) -> Distillation:
    slices = TrainedSlices(
        student,
        slices_of_everything(student) if everything else slices_of_heads(student, [pair.student for pair in PAIRS]),
    )
    cache = teacher_cache.computed(teacher, PROMPTS, hook_names([pair.teacher for pair in PAIRS], config.activation))
    return Distillation(student, slices, PROMPTS, cache, PAIRS, config, seed=0)


def rows(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = seeds.generator(0, "rows")
    pairs = [(torch.randn(20, 5, generator=draw), torch.randn(20, 4, generator=draw)) for _ in range(count)]
    return [(x, y + x[:, :4]) for x, y in pairs]


def test_the_default_loss_is_the_papers_to_the_bit() -> None:
    given = rows(3)
    total, values = losses.alignment_loss(given, estimator="biased")
    expected = linear_cka(torch.stack([x for x, _ in given]), torch.stack([y for _, y in given]), estimator="biased")
    assert torch.equal(values, expected)
    assert torch.equal(total, (1 - expected).sum())


@pytest.mark.parametrize("measure", sorted(set(MEASURES) - {"attention_kl"}))
def test_sum_and_mean_over_pairs_by_hand(measure: Any) -> None:
    given = [*rows(3), (torch.randn(20, 3, generator=seeds.generator(1)), rows(1)[0][1])]
    by_hand = torch.stack([similarity(x, y, measure=measure) for x, y in given])
    total, values = losses.alignment_loss(given, estimator="biased", measure=measure)
    mean, _ = losses.alignment_loss(given, estimator="biased", measure=measure, pairs="mean")
    torch.testing.assert_close(values, by_hand)
    assert float(total) == pytest.approx(float((1 - by_hand).sum()), rel=1e-5)
    assert float(mean) == pytest.approx(float(total) / 4, rel=1e-6)


def test_options_reach_the_measure() -> None:
    narrow, wide = (
        losses.alignment_loss(rows(2), estimator="biased", measure="rbf_cka", options={"fraction": f})[0]
        for f in (0.2, 2.0)
    )
    assert abs(float(narrow - wide)) > 0.1


@pytest.mark.parametrize("measure", get_args(Measure))
def test_training_by_a_measure_raises_it(
    load_student: Loader, load_teacher: Loader, tmp_path: Path, measure: Any
) -> None:
    config = aligning(CONFIG, measure=measure, activation="pattern" if measure == "attention_kl" else "z")
    reports = distillation(load_student("llama"), load_teacher("llama", seed=1), config).run(tmp_path)
    assert reports[-1].loss < reports[0].loss - 0.02
    assert all(reports[-1].ckas[str(pair)] > reports[0].ckas[str(pair)] for pair in PAIRS), (
        "each pair, not only their sum"
    )


def test_attention_kl_by_hand_and_trains_queries_and_keys_only(
    load_student: Loader, load_teacher: Loader, architecture: str
) -> None:
    student, teacher = load_student(architecture), load_teacher(architecture, seed=1)
    run = distillation(
        student, teacher, aligning(CONFIG, measure="attention_kl", activation="pattern"), everything=True
    )
    with run.slices.gradients():
        _, alignment, values = run.losses(torch.arange(24))
        assert alignment is not None
        alignment.backward()
        head = PAIRS[1].student
        for matrix, trained in (("q", True), ("k", True), ("v", False), ("o", False)):
            for part in student.head_slices(head, (matrix,)):
                gradient = student.parameters()[part.parameter].grad
                if part.parameter.endswith("weight") or "W_" in part.parameter:
                    assert (gradient is not None and bool(gradient[part.index].norm() > 1e-7)) == trained, (
                        part.parameter
                    )
    expected = []
    for pair in PAIRS:
        found = []
        for model, each in ((student, pair.student), (teacher, pair.teacher)):
            pattern = model.activations(PROMPTS.clean, PROMPTS.mask, [hooks.pattern(each.layer)])[1][
                hooks.pattern(each.layer)
            ]
            found.append(pattern[:, each.index][PROMPTS.position(pair.student_positions[0])].double().numpy())
        expected.append(1 - special.rel_entr(found[1], found[0]).sum(-1).mean())
    assert values.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 0.999


def test_refusals_come_before_training(load_student: Loader, load_teacher: Loader) -> None:
    with pytest.raises(InputError, match="activation: pattern"):
        distillation(load_student("llama"), load_teacher("llama"), aligning(CONFIG, measure="attention_kl"))
    with pytest.raises(InputError, match="fraction"):
        distillation(
            load_student("llama"),
            load_teacher("llama"),
            aligning(CONFIG, measure="rbf_cka", options={"width": 1.0}),
        )
    with pytest.raises(InputError, match=r"alignment\.measure"):
        parse_recipe({"teacher": "x", "alignment": {"measure": "cka"}})
    recipe = parse_recipe(
        {"teacher": "x", "alignment": {"measure": "rbf_cka", "options": {"fraction": 0.2}, "pairs": "mean"}}
    )
    assert recipe.alignment.options == {"fraction": 0.2}
