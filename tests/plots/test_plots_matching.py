"""Links between the heads of two models."""

import pytest
from plotly import graph_objects as go

from tests.plots.plot_results import STUDENT, TEACHER, circuit_of, cka_of, everything, head_map, traces
from workbench.errors import InputError
from workbench.matching import HeadMap, Match, random_map
from workbench.plots.head_maps import matching, shade
from workbench.plots.theme import LIGHT
from workbench.values.refs import Head


class TestMatching:
    """Links between the heads of two models."""

    def drawn(self, **options: object) -> go.Figure:
        return matching(head_map(), student_circuit=STUDENT, teacher_circuit=TEACHER, **options)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def column(figure: go.Figure, side: str) -> dict[float, str]:
        (nodes,) = traces(figure, name=f"{side} heads")
        return dict(zip(nodes.y, (text.strip() for text in nodes.text), strict=True))

    def test_links_are_the_pairs(self) -> None:
        figure = self.drawn()
        ours, theirs = self.column(figure, "student"), self.column(figure, "teacher")
        links = [
            (ours[line.y[0]].split(" ")[0], theirs[line.y[1]].split(" ")[0]) for line in traces(figure, mode="lines")
        ]
        assert links == [(str(student), str(teacher)) for student, teacher in head_map().pairs]

    def test_columns_hold_all_heads_upward_with_their_roles(self) -> None:
        figure = self.drawn()
        assert [self.column(figure, "teacher")[y] for y in sorted(self.column(figure, "teacher"))] == [
            "L0H0 · C",
            "L1H3 · A",
            "L2H1 · A+B",
            "L2H2 · B",
        ]
        assert list(self.column(figure, "student").values()) == ["L0H1 · C", "L1H0 · A", "L1H1 · B"]

    def test_unmatched_teacher_heads_are_open(self) -> None:
        (nodes,) = traces(self.drawn(), name="teacher heads")
        assert [colour == LIGHT.background for colour in nodes.marker.color] == [True, False, False, True]
        assert [text.endswith(": unmatched") for text in nodes.hovertext] == [True, False, False, True]
        assert "2 of 4 teacher heads in use; 1 tie." in self.drawn().layout.title.text

    def test_colour_is_the_cka_and_dashes_are_the_floor(self) -> None:
        figure = self.drawn(ckas=[cka_of(*head_map().pairs[0], 0.9), cka_of(*head_map().pairs[1], 0.15)])
        lines = {line.name: line.line for line in traces(figure, mode="lines")}
        assert [lines[name].color for name in ("L0H1~L2H1", "L1H0~L1H3", "L1H1~L2H1")] == [
            shade(0.9, LIGHT.sequential),
            shade(0.15, LIGHT.sequential),
            LIGHT.missing,
        ]
        assert [lines[name].dash for name in ("L0H1~L2H1", "L1H0~L1H3", "L1H1~L2H1")] == ["solid", "dash", "solid"]
        (points,) = traces(figure, name="CKA")
        assert list(points.marker.color) == [0.9, 0.15]
        assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)

    def test_hover_says_distance_margin_cka_and_floor(self) -> None:
        figure = self.drawn(ckas=[cka_of(*head_map().pairs[0], 0.9)])
        (known,), (unknown,) = traces(figure, name="CKA"), traces(figure, name="CKA not measured")
        assert known.hovertext[0] == (
            "<b>L0H1 → L2H1</b><br>distance 0.25<br>margin 0: a tie, chosen by order<br>CKA 0.900, floor 0.100 "
            "(highest 0.200) with prompts shuffled<br>64 rows"
        )
        assert (
            unknown.hovertext[0]
            == "<b>L1H0 → L1H3</b><br>distance 0.125<br>margin to the runner-up 0.5<br>CKA not measured"
        )

    def test_points_lie_on_their_links_and_apart(self) -> None:
        crossing = HeadMap(
            matches=(
                Match(student=Head(0, 0), teacher=Head(1, 0), distance=0.0, margin=None),
                Match(student=Head(1, 0), teacher=Head(0, 0), distance=0.0, margin=None),
            ),
            rule="paper",
            one_to_one=True,
        )
        circuit = circuit_of((2, 1), {"L0H0": "A", "L1H0": "A"})
        figure = matching(crossing, student_circuit=circuit, teacher_circuit=circuit)
        (points,) = traces(figure, name="CKA not measured")
        for line, x, y in zip(traces(figure, mode="lines"), points.x, points.y, strict=True):
            assert y == pytest.approx(line.y[0] + (line.y[1] - line.y[0]) * x)
        assert abs(points.x[0] - points.x[1]) > 0.03

    def test_a_control_may_use_heads_outside_the_circuit(self) -> None:
        control = random_map(STUDENT, circuit_of((4, 4), {"L0H0": "C"}), seed=1)
        figure = matching(control, student_circuit=STUDENT, teacher_circuit=circuit_of((4, 4), {"L0H0": "C"}))
        assert "(outside the circuit)" in everything(figure)
        assert "distance not measured (a control)" in traces(figure, name="CKA not measured")[0].hovertext[0]

    def test_cka_of_another_map_is_refused(self) -> None:
        with pytest.raises(InputError, match="L0H0~L0H0"):
            self.drawn(ckas=[cka_of(Head(0, 0), Head(0, 0), 0.5)])

    def test_shades_meet_the_scale_at_its_colours(self) -> None:
        assert [shade(place / 4, LIGHT.sequential) for place in range(5)] == list(LIGHT.sequential)
        assert shade(-0.1, LIGHT.sequential) == LIGHT.sequential[0]
        assert shade(0.5, ("#000000", "#ff8000")) == "#804000"
