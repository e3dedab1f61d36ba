"""Alignment by the corrupt prompts: what differences ignore, what an interchange is, and what trains through either."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import with_counterparts
from tests.distillation.distilling import CONFIG, HEADS, PAIRS, PROMPTS, aligning, inside, trained
from workbench import seeds
from workbench.distillation import losses
from workbench.distillation.backward import backward
from workbench.distillation.config import LATER, AlignmentConfig, TrainingConfig
from workbench.distillation.counterfactual import sites_of, teacher_alignment_outputs
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_heads
from workbench.distillation.processes import launched
from workbench.distillation.teacher_cache import computed
from workbench.errors import InputError
from workbench.matching.aligned_pairs import AlignedPair, aligned_pairs, weighted_by_impact
from workbench.models import hooks
from workbench.models.hooked_model import Student, Teacher
from workbench.patching.interchange import interchanged_logits
from workbench.values.refs import Head
from workbench.values.scores import Scores

INDEX = torch.tensor([3, 0, 7, 12, 21, 22, 5, 9])
ALIKE = replace(PROMPTS, corrupt=PROMPTS.clean)
"""Every prompt is its own counterpart."""
Load = Callable[..., Any]


def outputs(teacher: Teacher, config: TrainingConfig, prompts: Any = PROMPTS, pairs: Any = PAIRS) -> Any:
    return teacher_alignment_outputs(partial(computed, teacher), teacher, prompts, pairs, config.alignment)


def training(
    student: Student, teacher: Teacher, config: TrainingConfig, *, prompts: Any = PROMPTS, pairs: Any = PAIRS
) -> Distillation:
    slices = TrainedSlices(student, slices_of_heads(student, [pair.student for pair in pairs]))
    return Distillation(student, slices, prompts, outputs(teacher, config, prompts, pairs), pairs, config, seed=0)


@pytest.fixture
def models(load_student: Load, load_teacher: Load) -> tuple[Student, Teacher]:
    return load_student("llama", seed=1), load_teacher("llama")


def test_differences_ignore_what_the_two_prompts_share(models: tuple[Student, Teacher]) -> None:
    """A vector for each prompt, added to the heads' outputs on the clean and on the corrupt prompt alike."""
    student, teacher = models
    shared = torch.randn(len(INDEX), 1, 1, 8, generator=seeds.generator(0, "shared"))
    plain, added = {}, {}
    for compared in ("differences", "activations"):
        objective = training(student, teacher, aligning(compared=compared)).objective
        ours, theirs = objective.task_and_rows(INDEX)[1], objective.teacher_rows(INDEX)
        plain[compared] = objective.alignment(ours, theirs)[1]
        edits = {hooks.z(layer): lambda z: z + shared[..., : z.shape[-1]] for layer in (2,)}
        with hooks.edit(student.model, edits):
            added[compared] = objective.alignment(objective.task_and_rows(INDEX)[1], theirs)[1]
    moved = {name: float((plain[name] - added[name]).abs().max()) for name in plain}
    assert moved["differences"] < 1e-4
    assert moved["activations"] > 1e-2


def test_rows_of_differences_are_clean_minus_corrupt_on_both_sides(models: tuple[Student, Teacher]) -> None:
    student, teacher = models
    objective = training(student, teacher, aligning(compared="differences")).objective
    swapped = training(student, teacher, aligning(compared="differences"), prompts=PROMPTS.swapped()).objective
    clean, corrupt = (
        training(student, teacher, CONFIG, prompts=prompts).objective for prompts in (PROMPTS, PROMPTS.swapped())
    )
    for side in (lambda o: o.task_and_rows(INDEX)[1], lambda o: o.teacher_rows(INDEX), lambda o: o.rows_alone(INDEX)):
        for got, back, ours, others in zip(*map(side, (objective, swapped, clean, corrupt)), strict=True):
            torch.testing.assert_close(got, ours - others)
            torch.testing.assert_close(back, -got)
            assert got.abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{"compared": "differences"}, {"loss": "both", "weight": 1.0}])
def test_prompts_of_unequal_length_train_as_their_tokens_belong_together(
    models: tuple[Student, Teacher], settings: dict[str, Any]
) -> None:
    """The same pairs with a layout of their own for the corrupt prompts; where a pair's position has no counterpart,
    nothing begins."""
    student, teacher = models
    config, named = aligning(**settings), with_counterparts(PROMPTS)
    expected, found = (
        training(student, teacher, config, prompts=prompts).objective.losses(INDEX) for prompts in (PROMPTS, named)
    )
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other)
    other = named.counterparts
    assert other is not None
    lacking = replace(other, index=torch.where(named.positions["labels"], -1, other.index))
    with pytest.raises(InputError, match=r"differ in length.*positions"):
        outputs(teacher, config, replace(named, counterparts=lacking))


def test_an_interchange_of_a_prompt_with_itself_is_the_plain_loss(models: tuple[Student, Teacher]) -> None:
    student, teacher = models
    alone = aligning(loss="interchange", weight=1.0)
    same = training(student, teacher, alone, prompts=ALIKE).objective
    plain = training(student, teacher, replace(CONFIG, task_loss="kl_teacher", alignment=None)).objective
    expected = plain.losses(INDEX)[0]
    assert expected is not None
    torch.testing.assert_close(same.losses(INDEX)[1], expected)
    other = training(student, teacher, alone).objective.losses(INDEX)[1]
    assert other is not None
    assert abs(float((other - expected).detach())) > 1e-3


@pytest.mark.parametrize("interchanged", ["all", "one"])
def test_interchanged_outputs_are_those_of_a_slow_loop_over_prompts(
    models: tuple[Student, Teacher], interchanged: Any
) -> None:
    student, teacher = models
    settings = AlignmentConfig(loss="interchange", interchanged=interchanged)
    for model, side in ((student, "student"), (teacher, "teacher")):
        index = INDEX[:3]
        prompts = PROMPTS.rows(index)
        fast = interchanged_logits(model, prompts, sites_of(PAIRS, side, prompts, index, settings))
        untouched = model.final_logits(prompts.clean, prompts.mask)
        for row, number in enumerate(index.tolist()):
            one = prompts.rows(torch.tensor([row]))
            pairs = PAIRS if interchanged == "all" else [PAIRS[number % len(PAIRS)]]
            slow = _by_hand(model, one, [(getattr(p, side), getattr(p, f"{side}_positions")) for p in pairs])
            torch.testing.assert_close(fast[row], slow, atol=1e-5, rtol=1e-4)
        assert (fast - untouched).abs().max() > 1e-2


@torch.no_grad()
def _by_hand(model: Any, prompt: Any, sites: Any) -> Tensor:
    """One prompt, one site after another, by TransformerLens's own hooks."""
    found = {}
    for head, _ in sites:
        name = hooks.z(head.layer)
        found[name] = model.activations(prompt.corrupt, prompt.mask, [name])[1][name]

    def change(z: Tensor, hook: Any, head: Head, positions: Any) -> Tensor:
        changed = z.clone()
        for position in positions:
            for token in prompt.position(position)[0].nonzero()[:, 0].tolist():
                changed[0, token, head.index] = found[hooks.z(head.layer)][0, token, head.index]
        return changed

    edits = [(hooks.z(head.layer), partial(change, head=head, positions=positions)) for head, positions in sites]
    with model.model.hooks(fwd_hooks=edits):
        return model.final_logits(prompt.clean, prompt.mask)[0]


def test_gradients_reach_the_student_through_the_source_values_too(models: tuple[Student, Teacher]) -> None:
    """A head that is interchanged at every token takes nothing from its own run on the clean prompt: its queries have a
    gradient by way of the source alone, and W_O, behind the interchanged value, either way."""
    student, teacher = models
    pair = AlignedPair(student=Head(1, 2), teacher=Head(1, 1), student_positions=("all",), teacher_positions=("all",))
    run = training(student, teacher, aligning(loss="interchange"), pairs=(pair,))
    prompts = PROMPTS.rows(INDEX)

    def largest(matrix: Any, values: Any) -> float:
        run.objective.interchange_loss(INDEX, values).backward(retain_graph=True)
        (part,) = student.head_slices(Head(1, 2), (matrix,))
        gradient = student.parameters()[part.parameter].grad
        value = 0.0 if gradient is None else float(gradient[part.index].abs().max())
        for parameter in student.parameters().values():
            parameter.grad = None
        return value

    with run.slices.gradients():
        source = student.activations(prompts.corrupt, prompts.mask, [hooks.z(1)], gradients=True)[1]
        stopped = {name: value.detach() for name, value in source.items()}
        assert largest("q", stopped) == 0
        assert min(largest("q", source), largest("o", source), largest("o", stopped)) > 1e-6


SETTINGS: list[dict[str, Any]] = [
    {"loss": "interchange"},
    {"loss": "both", "compared": "differences", "interchanged": "one"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_trains_the_matched_heads_and_nothing_else(
    models: tuple[Student, Teacher], settings: dict[str, Any], tmp_path: Any
) -> None:
    student, teacher = models
    config = replace(aligning(weight=1.0, **settings), task_loss="none", steps=5, batch=12, weight_decay=0.0, clip=10)
    before = {name: value.detach().clone() for name, value in student.parameters().items()}
    reports = trained(student, outputs(teacher, config), config, tmp_path)
    first, last = reports[0].alignment_loss, reports[-1].alignment_loss
    assert last < 0.99 * first
    assert bool(reports[0].ckas) == (settings.get("loss") != "interchange")
    masks = inside(student, HEADS)
    for name, value in student.parameters().items():
        assert torch.equal(value[~masks[name]], before[name][~masks[name]])
    assert any(bool((value != before[name]).any()) for name, value in student.parameters().items())


def test_both_is_similarity_plus_its_share_of_the_interchange(models: tuple[Student, Teacher]) -> None:
    student, teacher = models
    kinds: list[dict[str, Any]] = [{}, {"loss": "interchange"}, {"loss": "both", "interchange_weight": 3.0}]
    parts = [training(student, teacher, aligning(**kind)).objective.losses(INDEX)[1] for kind in kinds]
    similarity, interchange, both = (float(part.detach()) for part in parts if part is not None)
    assert both == pytest.approx(similarity + 3 * interchange, rel=1e-5)


@pytest.mark.parametrize("settings", [{"loss": "interchange"}, {"compared": "differences"}], ids=str)
def test_a_batch_in_pieces_gives_the_whole_batchs_gradient(
    models: tuple[Student, Teacher], settings: dict[str, Any]
) -> None:
    student, teacher = models
    gradients = []
    for accumulate in (1, 2):
        run = training(student, teacher, replace(aligning(**settings), accumulate=accumulate))
        with run.slices.gradients():
            backward(run.objective, INDEX, 0.5, launched(student.device), lambda *_: seeds.local(0))
            run.slices.collect_gradients()
            gradients.append(torch.cat([leaf.grad.flatten() for leaf in run.slices.leaves.values()]))  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)
    assert gradients[0].abs().max() > 1e-4


def test_pairs_are_weighted_by_the_impact_of_the_students_head(models: tuple[Student, Teacher]) -> None:
    impacts = torch.zeros(3, 4, 5)
    for size, head in zip((1.0, -3.0, 2.0), HEADS, strict=True):
        impacts[head.layer, head.index] = size
    scores = Scores.of_heads(impacts, unit="x")
    weighted = weighted_by_impact(PAIRS, scores)
    assert [pair.weight for pair in weighted] == pytest.approx([0.5, 1.5, 1.0])
    student, teacher = models
    plain, other = (training(student, teacher, CONFIG, pairs=pairs) for pairs in (PAIRS, weighted))
    (_, alignment, ckas), (_, changed, _) = (run.objective.losses(INDEX) for run in (plain, other))
    assert alignment is not None
    assert changed is not None
    assert float(changed.detach()) == pytest.approx(float(((1 - ckas) * torch.tensor([0.5, 1.5, 1.0])).sum()), rel=1e-5)
    assert plain.identity["pairs"] != other.identity["pairs"]
    assert weighted_by_impact(PAIRS, Scores.of_heads(torch.zeros(3, 4, 5), unit="x")) == PAIRS
    with pytest.raises(InputError, match="profile every matched head"):
        weighted_by_impact(PAIRS, Scores.of_heads(torch.full((3, 4, 5), torch.nan), unit="x"))


def test_a_training_of_before_has_the_identity_that_it_had(models: tuple[Student, Teacher]) -> None:
    from workbench.distillation.loop import _stated

    stated = _stated(CONFIG)["alignment"]
    assert not set(LATER) & set(stated)
    assert _stated(aligning(compared="differences"))["alignment"]["compared"] == "differences"


def test_what_cannot_be_trained_is_refused_with_the_remedy(models: tuple[Student, Teacher]) -> None:
    student, teacher = models
    slices, alone = TrainedSlices(student, slices_of_heads(student, HEADS)), outputs(teacher, CONFIG)
    with pytest.raises(InputError, match="teacher_alignment_outputs"):
        Distillation(student, slices, PROMPTS, alone, PAIRS, aligning(compared="differences"), seed=0)
    with pytest.raises(InputError, match="alignment_batch: micro"):
        training(student, teacher, replace(aligning(loss="both"), accumulate=2))
    with pytest.raises(InputError, match="a difference of two is none"):
        training(
            student,
            teacher,
            aligning(compared="differences", activation="pattern", measure="attention_kl"),
        )


def test_own_and_last_together() -> None:
    from workbench.circuits.circuit import Circuit, Member
    from workbench.matching.head_map import HeadMap, Match

    members = [Member(Head(1, 0), "A", "labels"), Member(Head(2, 1), "A", "last")]
    circuit = Circuit.of(members, shape=(3, 4), method="all")
    matches = tuple(Match(student=h, teacher=h, distance=None, margin=None) for h in (Head(1, 0), Head(2, 1)))
    head_map = HeadMap(matches=matches, rule="paper", one_to_one=False)
    own, both = (aligned_pairs(head_map, circuit, circuit, PROMPTS, positions=where) for where in ("own", "own+last"))
    assert [pair.student_positions for pair in own] == [("labels",), ("last",)]
    assert [pair.teacher_positions for pair in both] == [("labels", "last"), ("last",)]


def test_weights_of_the_loss_by_hand() -> None:
    draw = seeds.generator(0, "rows")
    rows = [(torch.randn(12, 3, generator=draw), torch.randn(12, 4, generator=draw)) for _ in range(3)]
    total, values = losses.alignment_loss(rows, estimator="biased", weights=[2.0, 0.5, 0.0])
    assert float(total) == pytest.approx(float(2 * (1 - values[0]) + 0.5 * (1 - values[1])), rel=1e-6)
