"""Figures say what the data say; the report is one page that fetches nothing."""

import ast
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plotly import graph_objects as go

from workbench import plots
from workbench.alignment import AlignedPair, PairCka
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.curves import FaithfulnessCurve
from workbench.distillation.loop import StepReport
from workbench.errors import InputError
from workbench.matching import HeadMap, Match, random_map
from workbench.plots.curves import faithfulness_figure
from workbench.plots.heads import head_importance
from workbench.plots.matching import matching, shade
from workbench.plots.report import Section, report_html
from workbench.plots.table import TITLES, in_order, results_chart, results_html
from workbench.plots.theme import DARK, LIGHT, Theme
from workbench.plots.training import loss_curves
from workbench.refs import Head
from workbench.scores import Scores
from workbench.study.rows import ConditionResult

UNIT = "change of log probability, path from last to the logits"


def scores_of(layers: int, heads: int, *, examples: int = 6, seed: int = 0) -> Scores:
    """Random effects; the last layer is not measured."""
    values = torch.randn(layers, heads, examples, generator=torch.Generator().manual_seed(seed))
    values[-1] = torch.nan
    return Scores.of_heads(values, unit=UNIT, baseline=-1.0)


def circuit_of(shape: tuple[int, int], roles: dict[str, str]) -> Circuit:
    """`{"L0H1": "A"}` -> a circuit; `A+B` is two roles."""
    return Circuit.of(
        (Member(Head.parse(head), role, "last") for head, both in roles.items() for role in both.split("+")), shape=shape, method="test"
    )


TEACHER = circuit_of((4, 4), {"L0H0": "C", "L1H3": "A", "L2H1": "A+B", "L2H2": "B"})
STUDENT = circuit_of((3, 2), {"L0H1": "C", "L1H0": "A", "L1H1": "B"})


def head_map() -> HeadMap:
    """Three student heads on two teacher heads, with a tie."""
    chosen = {"L0H1": ("L2H1", 0.25, 0.0), "L1H0": ("L1H3", 0.125, 0.5), "L1H1": ("L2H1", 0.0, 0.75)}
    rows = (
        Match(student=Head.parse(ours), teacher=Head.parse(theirs), distance=distance, margin=margin)
        for ours, (theirs, distance, margin) in chosen.items()
    )
    return HeadMap(matches=tuple(rows), rule="paper", one_to_one=False)


def cka_of(student: Head, teacher: Head, value: float) -> PairCka:
    """A pair's CKA; its floor is 0.1, at most 0.2."""
    pair = AlignedPair(student=student, teacher=teacher, student_positions=("last",), teacher_positions=("last",))
    return PairCka(pair=pair, cka=value, floor=0.1, floor_high=0.2, rows=64)


def log_of(task: list[float] | None, alignment: list[float] | None) -> list[StepReport]:
    """Step reports with these losses."""
    count = len(task or alignment or [])
    rows = zip(task or [None] * count, alignment or [None] * count, strict=True)
    return [
        StepReport(step=step, loss=1.0, task_loss=a, alignment_loss=b, ckas={}, gradient_norm=1.0, learning_rate=1e-3)
        for step, (a, b) in enumerate(rows)
    ]


def result_of(condition: str, *, seed: int = 0, full: float = 0.75, circuit: float = 0.5) -> ConditionResult:
    """A row with known intervals."""
    return ConditionResult(
        condition=condition, seed=seed, full_accuracy=full, full_interval=(full - 0.125, full + 0.0625), circuit_accuracy=circuit,
        circuit_interval=(circuit - 0.25, circuit + 0.125), random_circuit_accuracy=0.03125, faithfulness=circuit / full,
        mean_cka=None if condition == "teacher" else 0.625, cka_floor=None if condition == "teacher" else 0.0125, trained_parameters=1234567,
        trained_fraction=0.1254, steps=1500, mcnemar={"full_ce": 0.0004, "circuit_ce": 0.0312},
    )  # fmt: skip


def results() -> list[ConditionResult]:
    """Every condition, in an order that is not the table's."""
    return [result_of(condition, full=0.5 + 0.03 * place) for place, condition in enumerate(sorted(TITLES))]


def figures(theme: Theme = LIGHT) -> dict[str, go.Figure]:
    """One of each."""
    logs = {"circuit_ce_cka": log_of(np.linspace(2, 1, 40).tolist(), np.linspace(4, 2, 40).tolist())}
    return {
        "heads": head_importance(
            {"teacher": scores_of(4, 4), "student": scores_of(3, 2)}, circuits={"teacher": TEACHER, "student": STUDENT}, theme=theme
        ),
        "matching": matching(head_map(), student_circuit=STUDENT, teacher_circuit=TEACHER, theme=theme),
        "losses": loss_curves(logs, theme=theme),
        "results": results_chart(results(), chance=1 / 7, theme=theme),
    }


def traces(figure: go.Figure, **attributes: object) -> list[go.Scatter]:
    """The traces with these attributes."""
    return list(figure.select_traces(attributes))


def everything(figure: go.Figure) -> str:
    """All of a figure as JSON: its words and colours."""
    return figure.to_json() or ""


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
        weak, strong = Scores.of_heads(torch.tensor([[0.5, -0.25]]), unit=UNIT), Scores.of_heads(torch.tensor([[0.25, -3.0]]), unit=UNIT)
        axis = head_importance({"weak": weak, "strong": strong}).layout.coloraxis
        assert (axis.cmin, axis.cmid, axis.cmax) == (-3, 0, 3)
        assert axis.colorscale[3] == (0.5, "#ffffff")
        assert all(trace.coloraxis == "coloraxis" for trace in head_importance({"weak": weak, "strong": strong}).data)

    def test_hover_says_head_mean_interval_rank_and_role(self) -> None:
        scores = scores_of(4, 4)
        texts = traces(head_importance({"teacher": scores}, circuits={"teacher": TEACHER}), name="teacher")[0].hovertext
        low, high = scores.confidence_interval()
        for rank, head in enumerate(scores.ranked(), 1):
            text = texts[head.layer][head.index]
            at = (head.layer, head.index)
            assert text.startswith(f"<b>{head}</b> teacher<br>mean {float(scores.mean()[at]):+.4g}<br>")
            assert f"95 % interval {float(low[at]):+.4g} to {float(high[at]):+.4g}" in text
            assert f"rank {rank} of 12 (lowest first)" in text
            assert ("in the circuit" in text) == (head in TEACHER.heads)
        assert texts[2][1].endswith("in the circuit: A+B")
        assert texts[3] == [f"<b>L3H{index}</b> teacher<br>not measured" for index in range(4)]

    def test_rank_follows_the_sign_that_matters(self) -> None:
        scores = Scores.of_heads(torch.tensor([[0.5, -1.0, 2.0]]), unit=UNIT)
        ranks = {
            by: [re.findall(r"rank (\d)", text)[0] for text in head_importance({"m": scores}, by=by).data[0].hovertext[0]]
            for by in ("lowest", "highest", "magnitude")
        }
        assert ranks == {"lowest": ["2", "1", "3"], "highest": ["2", "3", "1"], "magnitude": ["3", "2", "1"]}
        assert "interval" not in head_importance({"m": scores}).data[0].hovertext[0][0]

    def test_frames_are_exactly_the_circuits_heads_in_their_panels(self) -> None:
        figure = figures()["heads"]
        framed = {
            (shape.xref, shape.yref, Head(round((shape.y0 + shape.y1) / 2), round((shape.x0 + shape.x1) / 2))) for shape in figure.layout.shapes
        }
        assert len(figure.layout.shapes) == len(framed)
        assert framed == {("x", "y", head) for head in TEACHER.heads} | {("x2", "y2", head) for head in STUDENT.heads}
        assert all(0.8 < shape.x1 - shape.x0 < 1 and 0.8 < shape.y1 - shape.y0 < 1 for shape in figure.layout.shapes)
        letters = {note.name: note.text for note in figure.layout.annotations if note.text and not note.text.startswith("<b>")}
        assert letters == {f"teacher {head}": role for head, role in zip(TEACHER.heads, ("C", "A", "AB", "B"), strict=True)} | {
            f"student {head}": role for head, role in zip(STUDENT.heads, ("C", "A", "B"), strict=True)
        }

    def test_unit_and_sign_are_written_on_the_figure(self) -> None:
        scores = scores_of(3, 2)
        assert f"Mean {UNIT}." in head_importance({"m": scores}).layout.title.text
        assert "The most positive head is the most important." in head_importance({"m": scores}, by="highest").layout.title.text
        two = head_importance({"m": scores, "n": replace(scores, unit="fall of accuracy")})
        assert UNIT not in two.layout.title.text
        named = {note.name: note.text.replace("<br>", " ") for note in two.layout.annotations}
        assert UNIT in named["m"] and "fall of accuracy" in named["n"]  # noqa: PT018

    def test_cells_of_all_panels_have_one_size(self) -> None:
        layout = head_importance({"teacher": scores_of(30, 9), "student": scores_of(6, 4)}).layout
        across, up = layout.width - layout.margin.l - layout.margin.r, layout.height - layout.margin.t - layout.margin.b
        for axis, count, pixels in ((layout.xaxis, 9, across), (layout.xaxis2, 4, across), (layout.yaxis, 30, up), (layout.yaxis2, 6, up)):
            assert (axis.domain[1] - axis.domain[0]) * pixels / count >= 15
        assert (layout.xaxis.domain[1] - layout.xaxis.domain[0]) / 9 == pytest.approx((layout.xaxis2.domain[1] - layout.xaxis2.domain[0]) / 4)
        assert (layout.yaxis.domain[1] - layout.yaxis.domain[0]) / 30 == pytest.approx((layout.yaxis2.domain[1] - layout.yaxis2.domain[0]) / 6)

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
        shown = [figure.layout.title.text, figure.layout.annotations[0].text, traces(figure, name="<i>m")[0].hovertext[0][0]]
        assert all("<i>" not in text and "&lt;i&gt;" in text for text in shown)


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
        links = [(ours[line.y[0]].split(" ")[0], theirs[line.y[1]].split(" ")[0]) for line in traces(figure, mode="lines")]
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
            "<b>L0H1 → L2H1</b><br>distance 0.25<br>margin 0: a tie, chosen by order<br>CKA 0.900, floor 0.100 (highest 0.200) with prompts shuffled<br>64 rows"
        )
        assert unknown.hovertext[0] == "<b>L1H0 → L1H3</b><br>distance 0.125<br>margin to the runner-up 0.5<br>CKA not measured"

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


class TestTraining:
    """Loss curves."""

    def test_raw_losses_are_all_there_in_their_panels(self) -> None:
        task, alignment = np.random.default_rng(0).random(50).tolist(), np.random.default_rng(1).random(50).tolist()
        figure = loss_curves({"circuit_ce_cka": log_of(task, alignment), "full_ce": log_of(task[:20], None), "circuit_cka": log_of(None, alignment)})
        raw = {(trace.name, trace.yaxis): trace for trace in traces(figure, meta="step")}
        assert set(raw) == {("circuit / CE + CKA", "y"), ("circuit / CE + CKA", "y2"), ("full / CE", "y"), ("circuit / CKA", "y2")}
        assert raw["circuit / CE + CKA", "y"].y.tolist() == task
        assert raw["circuit / CE + CKA", "y2"].y.tolist() == alignment
        assert raw["full / CE", "y"].x.tolist() == list(range(20))

    def test_the_bold_line_is_the_centred_mean(self) -> None:
        values = np.random.default_rng(0).random(31)
        (bold,) = traces(loss_curves({"full_ce": log_of(values.tolist(), None)}, smoothing=5), meta="mean")
        slow = [float(np.mean([values[step + shift] for shift in range(-2, 3)])) for step in range(2, 29)]
        assert bold.x.tolist() == list(range(2, 29))
        assert bold.y == pytest.approx(slow)

    @pytest.mark.parametrize(("steps", "smoothing"), [(50, 1), (8, 5)])
    def test_no_smoothing_where_none_is_asked_or_fits(self, steps: int, smoothing: int) -> None:
        figure = loss_curves({"full_ce": log_of([1.0] * steps, None)}, smoothing=smoothing)
        assert not traces(figure, meta="mean")
        assert traces(figure, meta="step")[0].showlegend
        assert "Bold" not in figure.layout.title.text

    def test_units_legend_and_seeds(self) -> None:
        losses = log_of([1.0] * 40, [2.0] * 40)
        figure = loss_curves({"circuit_ce_cka-0": losses, "circuit_ce_cka-1": losses, "my run": losses})
        assert figure.layout.yaxis.title.text == "task loss (nats)"
        assert figure.layout.yaxis2.title.text == "sum over pairs of (1 - CKA)"
        assert [trace.name for trace in figure.data if trace.showlegend] == ["circuit / CE + CKA", "my run"]
        assert {trace.line.color for trace in traces(figure, legendgroup="circuit_ce_cka")} == {
            traces(figure, legendgroup="circuit_ce_cka")[0].line.color
        }
        assert "seed 1" in traces(figure, legendgroup="circuit_ce_cka")[-1].hovertemplate

    def test_a_condition_has_one_colour_in_every_figure(self) -> None:
        losses = log_of([1.0] * 3, None)
        both = loss_curves({"full_ce": losses, "circuit_ce": losses})
        alone = loss_curves({"circuit_ce": losses})
        assert traces(both, legendgroup="circuit_ce")[0].line == traces(alone, legendgroup="circuit_ce")[0].line
        assert len({trace.line.color for trace in both.data if trace.legendgroup}) == 2

    def test_an_empty_panel_says_so_and_nothing_is_refused(self) -> None:
        assert "no run here has an alignment loss" in everything(loss_curves({"full_ce": log_of([1.0, 0.5], None)}))
        with pytest.raises(InputError, match="at least one run"):
            loss_curves({"full_ce": []})
        with pytest.raises(InputError, match="odd"):
            loss_curves({"full_ce": log_of([1.0], None)}, smoothing=4)


class TestResults:
    """The results table as a chart and as HTML."""

    def test_dots_intervals_and_ticks(self) -> None:
        rows = in_order(results())
        figure = results_chart(results(), chance=1 / 7)
        (full,), (circuit,), (ticks,) = (traces(figure, name=name) for name in ("full model", "circuit alone", "random circuit"))
        assert list(full.x) == [row.full_accuracy for row in rows]
        assert list(circuit.x) == [row.circuit_accuracy for row in rows]
        assert list(ticks.x) == [0.03125] * len(rows)
        assert full.error_x.arrayminus == pytest.approx([0.125] * len(rows))
        assert full.error_x.array == pytest.approx([0.0625] * len(rows))
        assert circuit.error_x.arrayminus == pytest.approx([0.25] * len(rows))
        assert (full.marker.symbol, circuit.marker.symbol, ticks.marker.symbol) == ("circle", "circle-open", "line-ns")
        assert list(traces(figure, name="chance 0.143")[0].x) == [1 / 7, 1 / 7]
        assert not traces(results_chart(results()), name="chance 0.143")

    def test_conditions_stand_in_the_tables_order_downward(self) -> None:
        axis = results_chart(results()).layout.yaxis
        assert [re.sub("<.*?>", "", text) for text in axis.ticktext] == list(TITLES.values())
        assert list(axis.tickvals) == sorted(axis.tickvals)
        assert axis.range[0] > max(axis.tickvals) > min(axis.tickvals) > axis.range[1]

    def test_seeds_never_overlap(self) -> None:
        rows = [result_of(condition, seed=seed) for condition in ("full_ce", "circuit_ce") for seed in (2, 0, 1)]
        figure = results_chart(rows)
        heights = [y for name in ("full model", "circuit alone") for y in traces(figure, name=name)[0].y]
        assert min(np.diff(sorted(heights))) > 0.5
        assert [re.findall(r"seed (\d)", text)[0] for text in traces(figure, name="full model")[0].hovertext] == ["0", "1", "2"] * 2
        assert len(figure.layout.yaxis.ticktext) == 2

    def test_the_html_table_holds_every_number_once(self) -> None:
        page = results_html([result_of("teacher"), result_of("circuit_ce_cka"), result_of("base")])
        heads = re.findall(r'<th scope="col">(.*?)</th>', page)
        assert heads[:4] == ["Condition", "Seed", "Full accuracy", "Circuit accuracy"]
        assert re.findall(r'<th scope="row">(.*?)</th>', page) == [TITLES["base"], "circuit / CE + CKA", "teacher"]
        (method,) = re.findall(r'<tr class="method">(.*?)</tr>', page)
        assert re.findall(r"<td>(.*?)</td>", method) == [
            "0", "0.750 [0.625, 0.812]", "0.500 [0.250, 0.625]", "0.031", "0.667", "0.625", "0.013", "1,234,567 (12.5 %)", "1,500", "&lt; 0.001", "0.031",
        ]  # fmt: skip
        assert page.count("<td>n/a</td>") == 2
        assert len(heads) == 1 + len(re.findall(r"<td>", method))

    def test_text_is_escaped_and_an_unknown_condition_stands_last(self) -> None:
        page = results_html([result_of("<script>alert(1)</script>"), result_of("teacher")])
        assert "<script" not in page
        assert page.index("teacher") < page.index("&lt;script&gt;")
        with pytest.raises(InputError, match="no results"):
            results_chart([])


@pytest.fixture(scope="module")
def page() -> str:
    """A report with every figure."""
    sections = [Section(heading=f"{name} <b> & more", text="One.\n\nTwo <i>.", figure=figure) for name, figure in figures().items()]
    return report_html("Report </title><script>alert(1)</script>", [*sections, Section(heading="Table", html=results_html(results()))])


class TestReport:
    """One self-contained page."""

    def test_nothing_is_fetched(self, page: str) -> None:
        markup = re.sub(r"<script>.*?</script>", "<script></script>", page, flags=re.DOTALL)
        assert not re.search(r"""(src|href|action|srcset)\s*=|url\(|@import|https?:|<link|<iframe|<img""", markup)
        assert "<script>" in page
        assert not re.search(r"<script\s", page)
        assert "default-src 'none'" in page
        assert '"showSendToCloud": false' in page

    def test_plotly_is_embedded_once_and_only_if_needed(self, page: str) -> None:
        assert len(re.findall(r"plotly\.js v\d", page)) == 1
        assert page.count("Plotly.newPlot(") - page[: page.index("<body>")].count("Plotly.newPlot(") == 4
        assert len(report_html("t", [Section(heading="h", text="x")])) < 10_000

    def test_it_is_small_and_has_print_and_phone_rules(self, page: str) -> None:
        assert len(page.encode()) < 10_000_000
        assert "@media print" in page
        assert '<meta name="viewport"' in page
        widths = [figure.layout.width for figure in figures().values()]
        assert [float(zoom) for zoom in re.findall(r"--printed: ([\d.]+)", page)] == pytest.approx(
            [min(1, 690 / width) for width in widths], abs=1e-3
        )

    def test_callers_text_is_escaped(self, page: str) -> None:
        assert "<title>Report &lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;</title>" in page
        assert "<script>alert(1)" not in page
        assert "<p>One.</p>\n<p>Two &lt;i&gt;.</p>" in page
        assert "<h2>heads &lt;b&gt; &amp; more</h2>" in page
        assert '<div class="part"><table class="results">' in page

    def test_the_same_results_give_the_same_page(self) -> None:
        first, second = (report_html("t", [Section(heading="h", figure=figures()["results"])]) for _ in range(2))
        assert first == second


def test_the_theme_is_an_argument() -> None:
    for name, figure in figures(DARK).items():
        assert figure.layout.template.layout.paper_bgcolor == DARK.background, name
        assert LIGHT.background not in everything(figure).replace('"#ffffff"]', ""), name


def test_no_plot_touches_a_model_a_file_or_the_screen() -> None:
    for file in Path(next(iter(plots.__path__))).glob("*.py"):
        tree = ast.parse(file.read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"workbench.models", "workbench.hooks", "workbench.seeds"}, file
        called = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
        assert not called & {"show", "write_image", "write_html", "manual_seed"}, file


CHROMIUM = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def rendered() -> Iterator[Callable[[go.Figure], bytes]]:
    """Figure -> PNG, all by one browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium to render with")
    kaleido = pytest.importorskip("kaleido")
    kaleido.start_sync_server(path=CHROMIUM, n=1, silence_warnings=True)
    yield lambda figure: kaleido.calc_fig_sync(figure, opts={"format": "png"})
    kaleido.stop_sync_server(silence_warnings=True)


def shades_in(png: bytes) -> int:
    """How many different bytes the scan lines of a PNG hold: about 1 for a blank picture."""
    parts, at = b"", 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        parts += png[at + 8 : at + 8 + length] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + length
    return len(set(zlib.decompress(parts)))


@pytest.mark.slow
def test_rendered_pictures_are_not_blank(rendered: Callable[[go.Figure], bytes]) -> None:
    blank = go.Figure(layout={"xaxis": {"visible": False}, "yaxis": {"visible": False}, "plot_bgcolor": "white"})
    assert shades_in(rendered(blank)) < 5
    for name, figure in figures().items():
        picture = rendered(figure)
        assert picture.startswith(b"\x89PNG"), name
        assert shades_in(picture) > 100, name


def test_a_faithfulness_figure_shows_curve_band_and_areas():
    """The lines are the curve's values; the legend says CPR and CMD with the random ones; labels do not run into each other."""
    curve = FaithfulnessCurve(
        ablation="mean",
        metric="logit difference", sizes=(0, 1, 30, 32), total_heads=32, faithfulness=(0.0, 0.2, 0.9, 1.0), without=(1.0, 0.6, 0.1, 0.0),
        random=((0.0, 0.0, 0.5, 1.0), (0.0, 0.1, 0.7, 1.0)), random_without=((1.0, 0.9, 0.2, 0.0), (1.0, 1.0, 0.4, 0.0)), full=3.0, empty=0.5,
    )  # fmt: skip
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
