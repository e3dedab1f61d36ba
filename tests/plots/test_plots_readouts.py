"""Figures of what heads look at, write and compute: attention, circuit graph, attribution, lens, CKA, impacts, accuracy
by count."""

import numpy as np
import pytest
import torch
from scipy import stats

from tests.plots.plot_results import (
    EDGES,
    STUDENT,
    TEACHER,
    attribution,
    cka_of,
    counted,
    edges_of,
    everything,
    head_map,
    impacts_of,
    lens,
    patterns,
    traces,
)
from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.plots.export import to_frame
from workbench.plots.graph import circuit_graph
from workbench.plots.lens import lens_curves, lens_figure
from workbench.plots.logit_attribution import attribution_figure
from workbench.plots.operations import operations_figure
from workbench.plots.patterns import attention_maps, attention_text
from workbench.plots.similarity import cka_matrix, impact_scatter
from workbench.plots.theme import LIGHT
from workbench.readouts.counts import AccuracyByCount
from workbench.readouts.patterns import WEIGHTED
from workbench.values.refs import Head
from workbench.values.scores import Scores, wilson_interval


class TestAttention:
    """Maps and text."""

    def test_cells_are_the_weights_on_one_scale_and_the_future_is_empty(self) -> None:
        shown = patterns(7)
        figure = attention_maps(shown)
        for place, head in enumerate(("L0H1", "L2H2")):
            (cells,) = traces(figure, name=head)
            drawn = torch.tensor([[torch.nan if value is None else value for value in row] for row in cells.z])
            assert torch.equal(drawn.isnan(), torch.ones(7, 7).triu(1).bool())
            assert torch.allclose(drawn.nan_to_num(0.0), shown.weights[place])
            assert list(cells.customdata[5][2]) == [head, 5, 2]
            assert cells.hovertext[5][2].startswith(
                f"<b>{head}</b><br> w5 (5) looks at  w2 (2)<br>{shown.weights[place, 5, 2]:.3f}"
            )
        assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (
            0,
            pytest.approx(float(shown.weights.max())),
        )

    @pytest.mark.parametrize(("length", "heads"), [(9, 1), (30, 2), (80, 6), (150, 12)])
    def test_labels_never_run_into_each_other_and_panels_stay_inside(self, length: int, heads: int) -> None:
        figure = attention_maps(patterns(length, tuple(f"L0H{index}" for index in range(heads))))
        layout = figure.layout
        height = layout.height - layout.margin.t - layout.margin.b
        for axis in figure.select_yaxes():
            pixels = (axis.domain[1] - axis.domain[0]) * height / length * np.diff(axis.tickvals).min()
            assert pixels >= 9.5
        domains = [axis.domain for axis in (*figure.select_xaxes(), *figure.select_yaxes())]
        assert len(domains) == 2 * heads
        assert all(0 <= low < high <= 1 for low, high in domains)
        assert ("is named" in layout.title.text) == (len(figure.layout.xaxis.tickvals) < length)

    def test_a_long_prompt_is_all_there_as_text(self) -> None:
        """200 tokens wrap: none is left out, none overlaps another or leaves the figure, and the shade is the weight of
        the query's row."""
        shown = patterns(200, unit=WEIGHTED)
        figure = attention_text(shown, query=150)
        for place, head in enumerate(("L0H1", "L2H2")):
            (bars,) = traces(figure, name=head)
            assert list(bars.text) == [f"w{at}" for at in range(200)]
            assert bars.marker.color == pytest.approx(shown.weights[place, 150].tolist())
            assert [at for at, width in enumerate(bars.marker.line.width) if width] == [150]
            ends = [left + width for left, width in zip(bars.base, bars.x, strict=True)]
            assert max(ends) <= figure.layout.xaxis.range[1]
            for at in range(199):
                assert bars.y[at + 1] > bars.y[at] or bars.base[at + 1] >= ends[at]
            assert bars.insidetextfont.color[199] == LIGHT.muted  # comes after the query
            assert list(bars.customdata[3]) == [head, 150, 3]
        both = [traces(figure, name=head)[0].y for head in ("L0H1", "L2H2")]
        assert max(both[0]) < min(both[1])
        assert "norm of the value" in figure.layout.title.text
        assert len(to_frame(figure)) == 2 * 151

    def test_a_position_outside_is_refused(self) -> None:
        with pytest.raises(InputError, match="outside a prompt of 9"):
            attention_text(patterns(), query=9)


class TestCircuitGraph:
    """Heads and paths."""

    def test_heads_stand_at_their_layers_in_the_column_of_their_position(self) -> None:
        figure = circuit_graph(TEACHER, edges_of(EDGES))
        spots = {
            name: (x, y)
            for trace in traces(figure, mode="markers+text")
            for name, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
        }
        assert {name: round(y) for name, (_, y) in spots.items()} == {"L0H0": 0, "L1H3": 1, "L2H1": 2, "L2H2": 2}
        assert {trace.name for trace in traces(figure, mode="markers+text")} == {"A", "B", "C", "A+B"}
        assert any("last" in note.text for note in figure.layout.annotations)
        assert len({trace.marker.line.color for trace in traces(figure, mode="markers+text")}) == 4

    def test_width_and_colour_are_the_strongest_effect(self) -> None:
        """L2H1 reads at q under its own name, L1H3 at k under its group's first head; weak paths are left out and
        counted."""
        figure = circuit_graph(TEACHER, edges_of(EDGES))
        lines = {line.name: line.line for line in traces(figure, mode="lines")}
        assert set(lines) == {"L0H0~L1H3", "L0H0~logits", "L1H3~L2H1", "L1H3~L2H2", "L2H1~logits"}
        widths = {name: line.width - 0.8 for name, line in lines.items()}
        assert widths["L2H1~logits"] / widths["L1H3~L2H1"] == pytest.approx(3 / 4)
        assert widths["L0H0~L1H3"] / widths["L1H3~L2H1"] == pytest.approx(2 / 4)  # k, +2, not q of another head, -0.5
        red, green, blue = (int(LIGHT.helps[at : at + 2], 16) for at in (1, 3, 5))
        assert lines["L0H0~L1H3"].color.startswith(f"rgba({red},{green},{blue}")
        assert not lines["L2H1~logits"].color.startswith(f"rgba({red},{green},{blue}")
        assert "5 of 6 paths" in figure.layout.title.text
        assert {"from": "L2H1", "to": "logits", "input": "logits", "effect": -3.0, "from_group": "A+B"} in to_frame(
            figure
        ).to_dict("records")

    def test_without_edges_the_heads_alone(self) -> None:
        figure = circuit_graph(TEACHER)
        assert not traces(figure, mode="lines")
        assert len(to_frame(figure)) == len(TEACHER.members)

    def test_bad_input_is_refused(self) -> None:
        with pytest.raises(InputError, match="no heads to draw"):
            circuit_graph(Circuit.of((), shape=(2, 2), method="none"))
        with pytest.raises(InputError, match="acts at last too"):
            circuit_graph(TEACHER, positions=["first"])
        with pytest.raises(InputError, match="sender, receiver"):
            circuit_graph(TEACHER, impacts_of((4, 4), 0))


class TestAttribution:
    """Shares of the logit difference."""

    def test_map_bars_and_total(self) -> None:
        parts = attribution()
        figure = attribution_figure(parts, bars=5)
        (cells,), (bars,) = traces(figure, name="parts"), traces(figure, name="largest parts")
        assert [row[4] for row in cells.z] == [None] * 3
        assert torch.allclose(torch.tensor([row[:4] for row in cells.z]), parts.heads.mean())
        assert [row[5] for row in cells.z] == pytest.approx(parts.mlps.mean().tolist())
        frame = parts.to_frame()
        assert list(bars.y)[::-1] == frame["part"].head(5).tolist()
        left = float(parts.total.mean()) - frame["mean"].head(5).sum()
        assert (
            f"All parts sum to {float(parts.total.mean()):.2f} logits; those without a bar to {left:+.2f}."
            in figure.layout.title.text
        )
        axis = figure.layout.coloraxis
        assert axis.cmin == -axis.cmax


class TestLens:
    """Stages by positions."""

    def test_cells_words_and_frames(self) -> None:
        seen = lens(20)
        figure = lens_figure(seen)
        (cells,) = traces(figure, name="lens")
        assert torch.allclose(torch.tensor(cells.z), seen.of_answer[:, -16:])
        assert [(shape.x0 + shape.x1, shape.y0 + shape.y1) for shape in figure.layout.shapes] == [
            (30, 4)
        ]  # the last column of the last stage
        assert "The last 16 of 20 tokens." in figure.layout.title.text
        assert len(traces(lens_figure(seen, positions=(2, 6)), name="lens")[0].z[0]) == 4
        with pytest.raises(InputError, match="outside a prompt of 20"):
            lens_figure(seen, positions=(3, 30))

    def test_curves_are_means_with_t_intervals_over_depth(self) -> None:
        values = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
        scores = Scores(
            values=values,
            axes=("stage", "example"),
            labels={"stage": ("embed", "L0", "L1", "L2", "L3")},
            unit="probability",
        )
        figure = lens_curves({"m": scores})
        (line,), (band,) = traces(figure, name="m"), traces(figure, name="m: interval")
        assert (
            line.x.tolist() == [0, 0.25, 0.5, 0.75, 1]
            if hasattr(line.x, "tolist")
            else list(line.x) == [0, 0.25, 0.5, 0.75, 1]
        )
        assert list(line.y) == pytest.approx(values.mean(1).tolist())
        low, high = stats.t.interval(0.95, 7, loc=values[0].mean(), scale=stats.sem(values[0].numpy()))
        assert (band.y[0], band.y[-1]) == (pytest.approx(high, abs=1e-5), pytest.approx(low, abs=1e-5))
        with pytest.raises(InputError, match="stage, example"):
            lens_curves({"m": impacts_of((2, 2), 0)})


class TestSimilarity:
    """CKA of all pairs, impacts of the matched."""

    def test_cells_crosses_and_frames(self) -> None:
        ours, theirs = (Head(0, 1), Head(1, 0)), (Head(1, 3), Head(2, 1))
        ckas = [cka_of(ours[0], theirs[0], 0.9), cka_of(ours[0], theirs[1], 0.15), cka_of(ours[1], theirs[1], 0.5)]
        figure = cka_matrix(ckas, head_map=head_map())
        assert [list(row) for row in traces(figure, name="CKA")[0].z] == [[0.9, 0.15], [None, 0.5]]
        (crosses,) = traces(figure, name="at the floor")
        assert (list(crosses.x), list(crosses.y)) == ([1], [0])
        assert {shape.name for shape in figure.layout.shapes} == {"L0H1~L2H1", "L1H0~L1H3"}
        assert "Floor, with prompts shuffled: mean 0.10, highest 0.20" in figure.layout.title.text
        with pytest.raises(InputError, match="once"):
            cka_matrix([ckas[0], ckas[0]])

    def test_points_are_the_mean_impacts_with_their_intervals(self) -> None:
        student, teacher = impacts_of((3, 2), 0), impacts_of((4, 4), 1)
        figure = impact_scatter(head_map(), student=student, teacher=teacher, student_circuit=STUDENT)
        frame = to_frame(figure)
        for row, (ours, theirs) in zip(frame.to_dict("records"), head_map().pairs, strict=True):
            assert row["student_impact"] == pytest.approx(float(student.at(ours).mean()), abs=1e-6)
            low, high = stats.t.interval(
                0.95, 5, loc=teacher.at(theirs).mean(), scale=stats.sem(teacher.at(theirs).numpy())
            )
            assert (row["teacher_low"], row["teacher_high"]) == (
                pytest.approx(low, abs=1e-5),
                pytest.approx(high, abs=1e-5),
            )
            (cloud,) = traces(figure, name=STUDENT.role_of(ours))
            at = [text.split("<br>")[0] for text in cloud.hovertext].index(f"<b>{ours} → {theirs}</b>")
            assert (cloud.x[at], cloud.y[at]) == (row["teacher_impact"], row["student_impact"])
            assert cloud.x[at] + cloud.error_x.array[at] == pytest.approx(high, abs=1e-5)
        (line,) = traces(figure, name="equal impact")
        assert list(line.x) == list(line.y)
        assert len({trace.marker.symbol for trace in traces(figure, mode="markers+text")}) == 3

    def test_bad_input_is_refused(self) -> None:
        from dataclasses import replace

        student, teacher = impacts_of((3, 2), 0), impacts_of((4, 4), 1)
        with pytest.raises(InputError, match="measure both alike"):
            impact_scatter(head_map(), student=replace(student, unit="other"), teacher=teacher)
        with pytest.raises(InputError, match="no measured impact"):
            impact_scatter(head_map(), student=replace(student, values=student.values * torch.nan), teacher=teacher)


def test_accuracy_by_count_is_shares_with_wilson_intervals() -> None:
    result = counted()
    assert (result.counts, result.accuracy, result.prompts) == ((0, 2), (0.75, 0.25), (4, 4))
    assert result.intervals == (wilson_interval(3, 4), wilson_interval(1, 4))
    figure = operations_figure({"a": result, "b": result}, chance=0.25)
    first, second = figure.data
    assert list(first.y) == list(second.y) == [0.75, 0.25]
    assert first.x[0] < second.x[0]  # apart, so that the intervals do not hide each other
    assert first.y[0] + first.error_y.array[0] == pytest.approx(wilson_interval(3, 4)[1])
    assert "chance, 0.250" in everything(figure)
    with pytest.raises(InputError, match="at least one"):
        AccuracyByCount(counts=(), accuracy=(), intervals=(), prompts=())
    with pytest.raises(InputError, match="no accuracy by count"):
        operations_figure({})
