"""Maps of head scores, and faithfulness over size."""

import re
from dataclasses import replace

import pytest
import torch

from tests.plots.plot_results import STUDENT, TEACHER, UNIT, everything, figures, scores_of, traces
from workbench.circuits.curves import FaithfulnessCurve
from workbench.errors import InputError
from workbench.plots.curves import faithfulness_figure
from workbench.plots.importance import head_importance, scale_of
from workbench.plots.theme import LIGHT
from workbench.values.refs import Head
from workbench.values.scores import Scores


class TestHeads:
    """Maps of head scores."""

    @pytest.mark.parametrize("shape", [(3, 2), (4, 4), (30, 9), (32, 32)])
    def test_cells_are_the_means_and_nan_is_a_gap(self, shape: tuple[int, int]) -> None:
        scores = scores_of(*shape)
        figure = head_importance({"m": scores})
        (cells,), (missing,) = traces(figure, name="m"), traces(figure, name="m: not measured")
        drawn = torch.tensor([[torch.nan if value is None else value for value in row] for row in cells.z])
        assert torch.allclose(drawn, scores.mean(), equal_nan=True)
        assert [[value is not None for value in row] for row in missing.z] == scores.mean().isnan().tolist()
        assert missing.colorscale[0][1] == LIGHT.missing
        assert "Grey x: not measured" in everything(figure)

    def test_without_nan_nothing_is_called_missing(self) -> None:
        figure = head_importance({"m": Scores.of_heads(torch.ones(2, 3), unit=UNIT)})
        assert "not measured" not in everything(figure)
        assert [len(row) for row in traces(figure, name="m")[0].z] == [3, 3]

    def test_one_scale_for_all_panels_symmetric_around_a_neutral_zero(self) -> None:
        weak, strong = (
            Scores.of_heads(torch.tensor([[0.5, -0.25]]), unit=UNIT),
            Scores.of_heads(torch.tensor([[0.25, -3.0]]), unit=UNIT),
        )
        layout = head_importance({"weak": weak, "strong": strong}).layout
        for axis in (layout.coloraxis, layout.coloraxis2):
            assert (axis.cmin, axis.cmid, axis.cmax) == (-3, 0, 3)
            assert axis.colorscale[3] == (0.5, "#ffffff")
        assert layout.coloraxis.colorbar.ticktext is None

    def test_a_scale_of_its_own_for_each_panel_says_where_it_ends(self) -> None:
        weak, strong = (
            Scores.of_heads(torch.tensor([[0.5, -0.25]]), unit=UNIT),
            Scores.of_heads(torch.tensor([[0.25, -3.0]]), unit=UNIT),
        )
        figure = head_importance({"weak": weak, "strong": strong}, scale="own")
        assert [trace.coloraxis for trace in figure.data] == ["coloraxis", "coloraxis2"]
        assert (figure.layout.coloraxis.cmax, figure.layout.coloraxis2.cmax) == (0.5, 3)
        assert list(figure.layout.coloraxis.colorbar.tickvals) == [-0.5, -0.25, 0, 0.25, 0.5]
        assert "1 is 0.5 in weak, 3 in strong" in everything(figure).replace("<br>", " ")
        alone = head_importance({"weak": weak}, scale="own")
        assert alone.layout.coloraxis.colorbar.ticktext is None, "a single map has the unit's own numbers"

    def test_a_few_far_heads_are_marked_and_leave_the_scale_to_the_others(self) -> None:
        values = torch.linspace(0.1, 1.0, 32).reshape(4, 8)
        values[0, 3], values[2, 1] = 9.0, -6.0
        figure = head_importance({"m": Scores.of_heads(values, unit=UNIT)})
        assert figure.layout.coloraxis.cmax == pytest.approx(1.0)
        (marks,) = traces(figure, name="m: beyond the scale")
        assert [(round(y), round(x)) for x, y in zip(marks.x, marks.y, strict=True)] == [(0, 3), (2, 1)]
        text = everything(figure).replace("<br>", " ")
        assert "The scale ends at 1" in text
        assert "L0H3 (+9), L2H1 (-6)" in text

    def test_a_scale_that_the_heads_share_ends_at_the_largest(self) -> None:
        values = torch.linspace(0.1, 1.0, 32).reshape(4, 8)
        assert scale_of({"m": Scores.of_heads(values, unit=UNIT)}) == pytest.approx(1.0)
        values[0, :3] = 9.0  # more than one in 16
        assert scale_of({"m": Scores.of_heads(values, unit=UNIT)}) == pytest.approx(9.0)
        assert scale_of({"m": Scores.of_heads(torch.zeros(2, 2), unit=UNIT)}) == 1.0

    def test_hover_says_head_mean_interval_rank_and_role(self) -> None:
        scores = scores_of(4, 4)
        texts = traces(head_importance({"teacher": scores}, circuits={"teacher": TEACHER}), name="teacher")[0].hovertext
        low, high = scores.confidence_interval()
        for rank, head in enumerate(scores.ranked(), 1):
            text = texts[head.layer][head.index]
            at = (head.layer, head.index)
            assert text.startswith(f"<b>{head}</b> teacher<br>mean {float(scores.mean()[at]):+.4g}<br>")
            assert f"95 % interval {float(low[at]):+.4g} to {float(high[at]):+.4g}" in text
            assert f"rank {rank} of 12 (highest first)" in text
            assert ("in the circuit" in text) == (head in TEACHER.heads)
        assert texts[2][1].endswith("in the circuit: A+B")
        assert texts[3] == [f"<b>L3H{index}</b> teacher<br>not measured" for index in range(4)]

    def test_rank_follows_the_sign_that_matters(self) -> None:
        scores = Scores.of_heads(torch.tensor([[0.5, -1.0, 2.0]]), unit=UNIT)
        ranks = {
            by: [
                re.findall(r"rank (\d)", text)[0] for text in head_importance({"m": scores}, by=by).data[0].hovertext[0]
            ]
            for by in ("lowest", "highest", "magnitude")
        }
        assert ranks == {"lowest": ["2", "1", "3"], "highest": ["2", "3", "1"], "magnitude": ["3", "2", "1"]}
        assert "interval" not in head_importance({"m": scores}).data[0].hovertext[0][0]

    def test_frames_are_exactly_the_circuits_heads_in_their_panels(self) -> None:
        figure = figures()["heads"]
        framed = {
            (shape.xref, shape.yref, Head(round((shape.y0 + shape.y1) / 2), round((shape.x0 + shape.x1) / 2)))
            for shape in figure.layout.shapes
        }
        assert len(figure.layout.shapes) == len(framed)
        assert framed == {("x", "y", head) for head in TEACHER.heads} | {("x2", "y2", head) for head in STUDENT.heads}
        assert all(0.8 < shape.x1 - shape.x0 < 1 and 0.8 < shape.y1 - shape.y0 < 1 for shape in figure.layout.shapes)
        letters = {
            note.name: note.text for note in figure.layout.annotations if note.text and not note.text.startswith("<b>")
        }
        assert letters == {
            f"teacher {head}": role for head, role in zip(TEACHER.heads, ("C", "A", "AB", "B"), strict=True)
        } | {f"student {head}": role for head, role in zip(STUDENT.heads, ("C", "A", "B"), strict=True)}

    def test_unit_and_sign_are_written_on_the_figure(self) -> None:
        scores = scores_of(3, 2)
        assert f"Mean {UNIT}." in head_importance({"m": scores}).layout.title.text
        assert (
            "Positive (orange): the head helps; ranked by how much."
            in head_importance({"m": scores}, by="highest").layout.title.text
        )
        two = head_importance({"m": scores, "n": replace(scores, unit="fall of accuracy")})
        assert UNIT not in two.layout.title.text
        named = {note.name: note.text.replace("<br>", " ") for note in two.layout.annotations}
        assert UNIT in named["m"]
        assert "fall of accuracy" in named["n"]

    def test_cells_of_all_panels_have_one_size(self) -> None:
        layout = head_importance({"teacher": scores_of(30, 9), "student": scores_of(6, 4)}).layout
        across, up = layout.width - layout.margin.l - layout.margin.r, layout.height - layout.margin.t - layout.margin.b
        for axis, count, pixels in (
            (layout.xaxis, 9, across),
            (layout.xaxis2, 4, across),
            (layout.yaxis, 30, up),
            (layout.yaxis2, 6, up),
        ):
            assert (axis.domain[1] - axis.domain[0]) * pixels / count >= 15
        assert (layout.xaxis.domain[1] - layout.xaxis.domain[0]) / 9 == pytest.approx(
            (layout.xaxis2.domain[1] - layout.xaxis2.domain[0]) / 4
        )
        assert (layout.yaxis.domain[1] - layout.yaxis.domain[0]) / 30 == pytest.approx(
            (layout.yaxis2.domain[1] - layout.yaxis2.domain[0]) / 6
        )

    def test_bad_input_is_refused(self) -> None:
        scores = scores_of(3, 2)
        with pytest.raises(InputError, match="no scores"):
            head_importance({})
        with pytest.raises(InputError, match=r"no scores for 'studen'.*did you mean 'student'"):
            head_importance({"student": scores}, circuits={"studen": STUDENT})
        with pytest.raises(InputError, match=r"shape \(4, 4\)"):
            head_importance({"student": scores}, circuits={"student": TEACHER})
        with pytest.raises(InputError, match="over \\('head',"):
            head_importance({"student": scores.select(layer="L0")})

    def test_names_are_text_not_markup(self) -> None:
        figure = head_importance({"<i>m": scores_of(3, 2)}, title="<i>t")
        shown = [
            figure.layout.title.text,
            figure.layout.annotations[0].text,
            traces(figure, name="<i>m")[0].hovertext[0][0],
        ]
        assert all("<i>" not in text and "&lt;i&gt;" in text for text in shown)


def test_a_faithfulness_figure_shows_curve_band_and_areas():
    """The lines are the curve's values; the legend says CPR and CMD with the random ones; labels do not run into each
    other."""
    curve = FaithfulnessCurve(
        ablation="mean",
        metric="logit difference",
        sizes=(0, 1, 30, 32),
        total_heads=32,
        faithfulness=(0.0, 0.2, 0.9, 1.0),
        without=(1.0, 0.6, 0.1, 0.0),
        random=((0.0, 0.0, 0.5, 1.0), (0.0, 0.1, 0.7, 1.0)),
        random_without=((1.0, 0.9, 0.2, 0.0), (1.0, 1.0, 0.4, 0.0)),
        full=3.0,
        empty=0.5,
    )
    figure = faithfulness_figure({"a": curve})
    alone, without = (trace for trace in figure.data if trace.mode == "lines+markers")
    assert list(alone.y) == list(curve.faithfulness)
    assert list(without.y) == list(curve.without)
    assert f"CPR {curve.cpr:.2f} (random {curve.random_cpr[0]:.2f})" in alone.name
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "32"]
    edges = [list(trace.y) for trace in figure.data if trace.mode == "lines" and trace.xaxis == "x"]
    assert edges == [[0.0, 0.1, 0.7, 1.0], [0.0, 0.0, 0.5, 1.0]]
    with pytest.raises(InputError, match="at least one curve"):
        faithfulness_figure({})
