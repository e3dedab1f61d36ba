"""CKA of all pairs of circuit heads beside its floor: what the pair-by-pair measure says, the laws of CKA, and its
figure before and after."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from tests.conftest import entity_pairs
from tests.plots.plot_results import cka_of, head_map
from workbench.circuits.circuit import Circuit, Member
from workbench.errors import InputError
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.head_similarity import circuit_ckas, head_similarity
from workbench.matching.pair_cka import PairCka, pair_ckas
from workbench.models.hooked_model import Student, Teacher
from workbench.plots.export import to_frame
from workbench.plots.matrices import Grid, cka_change
from workbench.values.refs import Head
from workbench.values.scores import Scores

PROMPTS = entity_pairs(scenes=16)


def circuit(*members: tuple[int, int, str]) -> Circuit:
    return Circuit.of(
        (Member(Head(layer, index), position, position) for layer, index, position in members),
        shape=(3, 4),
        method="test",
    )


OURS = circuit((0, 1, "last"), (1, 2, "earlier_label"), (2, 0, "last"), (2, 3, "earlier_label"))
THEIRS = circuit((0, 0, "earlier_label"), (1, 2, "last"), (2, 1, "last"))


@pytest.mark.parametrize("activation", ["z", "result"])
def test_every_entry_is_the_pairs_own_cka_and_floor(
    activation: str, load_teacher: Callable[..., Teacher], load_student: Callable[..., Student]
) -> None:
    student, teacher = load_student(seed=1), load_teacher(seed=2)
    scores = circuit_ckas(student, teacher, PROMPTS, OURS, THEIRS, activation=activation)  # pyright: ignore[reportArgumentType]
    pairs = [
        AlignedPair(
            student=ours, teacher=theirs, student_positions=OURS.scope[ours], teacher_positions=OURS.scope[ours]
        )
        for ours, theirs in product(OURS.heads, THEIRS.heads)
    ]
    slow = pair_ckas(student, teacher, PROMPTS, pairs, activation=activation)  # pyright: ignore[reportArgumentType]
    grid = Grid.of_scores(scores)
    for field in ("cka", "floor", "floor_high"):
        expected = np.array([getattr(pair, field) for pair in slow]).reshape(len(OURS.heads), len(THEIRS.heads))
        np.testing.assert_allclose(getattr(grid, field), expected, atol=2e-5)
        assert expected.std() > 100 * 2e-5, "the entries differ by far more than the tolerance"
    fast = head_similarity(student, teacher, PROMPTS, OURS, THEIRS, activation=activation)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(scores.values[..., 0], fast.values)


def test_a_model_with_itself_is_1_and_its_floor_is_not(load_teacher: Callable[..., Teacher]) -> None:
    teacher = load_teacher(seed=2)
    scores = circuit_ckas(teacher, teacher, PROMPTS, OURS, OURS)
    torch.testing.assert_close(scores.values[..., 0].diagonal(), torch.ones(len(OURS.heads)), atol=1e-4, rtol=0)
    assert scores.values[..., 1:].abs().mean() < 0.1


def test_a_pairs_cka_comes_back_from_json() -> None:
    pair = cka_of(Head(1, 0), Head(2, 1), 0.5)
    assert PairCka.from_json(pair.to_json()) == pair
    with pytest.raises(InputError, match="workbench match"):
        PairCka.from_json({"student": "L0H0"})


def matrix(matched: float, others: float) -> Scores:
    """All pairs of the figures' heads, 0.1 and 0.2 with prompts shuffled; the order of the heads is not that of the
    layers."""
    ours, theirs = ("L1H1", "L0H1", "L1H0"), ("L2H1", "L1H3", "L0H0")
    pairs = {(str(student), str(teacher)) for student, teacher in head_map().pairs}
    values = [[[matched if (a, b) in pairs else others, 0.1, 0.2] for b in theirs] for a in ours]
    labels = {"student": ours, "teacher": theirs, "draw": ("paired", "shuffled 0", "shuffled 1")}
    return Scores(values=torch.tensor(values), axes=("student", "teacher", "draw"), labels=labels, unit="debiased CKA")


class TestChange:
    """Two matrices on one scale."""

    def test_heads_stand_in_layer_order_with_their_own_values(self) -> None:
        figure = cka_change(matrix(0.5, 0.15), matrix(0.9, 0.3), head_map=head_map())
        frame = to_frame(figure)
        assert len(frame) == 2 * 9
        for when, matched, others in (("before", 0.5, 0.15), ("after", 0.9, 0.3)):
            mine = frame[frame["when"] == when]
            assert sorted(mine["student"].unique()) == list(dict.fromkeys(mine["student"])) == ["L0H1", "L1H0", "L1H1"]
            assert mine[mine["matched"]]["cka"].tolist() == pytest.approx([matched] * 3)
            assert mine[~mine["matched"]]["cka"].tolist() == pytest.approx([others] * 6)
        assert "0.50 before, 0.90 after; of all others 0.15, 0.30" in figure.layout.title.text.replace("<br>", " ")

    def test_crosses_are_the_pairs_at_the_floor_and_frames_the_matches_of_both_panels(self) -> None:
        figure = cka_change(matrix(0.5, 0.15), matrix(0.9, 0.3), head_map=head_map())
        crosses = [trace for trace in figure.data if trace.name == "at the floor"]
        assert [len(trace.x) for trace in crosses] == [6, 0]
        assert sorted({shape.xref for shape in figure.layout.shapes}) == ["x", "x2"]
        assert len(figure.layout.shapes) == 2 * 3
        assert {trace.coloraxis for trace in figure.data if trace.type == "heatmap"} == {"coloraxis"}

    def test_what_does_not_fit_is_refused(self) -> None:
        other = matrix(0.5, 0.1)
        other = replace(other, labels={**other.labels, "teacher": ("L2H0", "L1H3", "L0H0")})
        with pytest.raises(InputError, match="different heads"):
            cka_change(matrix(0.5, 0.1), other)
        with pytest.raises(InputError, match="circuit_ckas"):
            cka_change(other.select(draw="paired"), other)
