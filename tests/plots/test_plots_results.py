"""The results table as a chart and as HTML; the report is one page that fetches nothing."""

import re

import numpy as np
import pytest

from tests.plots.plot_results import figures, result_of, results, traces
from workbench.errors import InputError
from workbench.plots.table import TITLES, in_order, results_chart, results_html
from workbench.report.page import Section, report_html


class TestResults:
    """The results table as a chart and as HTML."""

    def test_dots_intervals_and_ticks(self) -> None:
        rows = in_order(results())
        figure = results_chart(results(), chance=1 / 7)
        (full,), (circuit,), (ticks,) = (
            traces(figure, name=name) for name in ("full model", "circuit alone", "random circuit")
        )
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
        assert [re.findall(r"seed (\d)", text)[0] for text in traces(figure, name="full model")[0].hovertext] == [
            "0",
            "1",
            "2",
        ] * 2
        assert len(figure.layout.yaxis.ticktext) == 2

    def test_the_html_table_holds_every_number_once(self) -> None:
        page = results_html([result_of("teacher"), result_of("circuit_ce_cka"), result_of("base")])
        heads = re.findall(r'<th scope="col">(.*?)</th>', page)
        assert heads[:4] == ["Condition", "Seed", "Full accuracy", "Circuit accuracy"]
        assert re.findall(r'<th scope="row">(.*?)</th>', page) == [TITLES["base"], "circuit / CE + CKA", "teacher"]
        (method,) = re.findall(r'<tr class="method">(.*?)</tr>', page)
        assert re.findall(r"<td>(.*?)</td>", method) == [
            "0",
            "0.750 [0.625, 0.812]",
            "0.500 [0.250, 0.625]",
            "0.031",
            "0.667",
            "0.625",
            "0.013",
            "1,234,567 (12.5 %)",
            "1,500",
            "&lt; 0.001",
            "0.031",
        ]
        assert page.count("<td>n/a</td>") == 2
        assert len(heads) == 1 + len(re.findall(r"<td>", method))

    def test_an_unknown_condition_is_refused_and_the_teacher_stands_last(self) -> None:
        with pytest.raises(InputError, match="no condition that is known"):
            result_of("<script>alert(1)</script>")
        page = results_html([result_of("teacher"), result_of("base")])
        assert page.index("base") < page.index(">teacher")
        with pytest.raises(InputError, match="no results"):
            results_chart([])


@pytest.fixture(scope="module")
def page() -> str:
    """A report with every figure."""
    sections = [
        Section(heading=f"{name} <b> & more", text="One.\n\nTwo <i>.", figure=figure)
        for name, figure in figures().items()
    ]
    return report_html(
        "Report </title><script>alert(1)</script>", [*sections, Section(heading="Table", html=results_html(results()))]
    )


class TestReport:
    """One self-contained page."""

    def test_nothing_is_fetched(self, page: str) -> None:
        markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", page, flags=re.DOTALL)
        assert set(re.findall(r'href="(.)', markup)) == {"#"}, "links lead to sections of this page alone"
        assert not re.search(
            r"""(src|href(?!="#)|action|srcset)\s*=|url\(|@import|https?:|<link|<iframe|<img""", markup
        )
        assert "<script>" in page
        assert not re.search(r"""<script\s(?!type="application/json">|type="text/plain" id="plotly">)""", markup), (
            "scripts are in the page, or data"
        )
        assert "default-src 'none'" in page
        assert '"showSendToCloud": false' in page

    def test_plotly_is_embedded_once_and_only_if_needed(self, page: str) -> None:
        assert len(re.findall(r"plotly\.js v\d", page)) == 1
        assert page.count('<script type="application/json">') == len(figures())
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
        assert ">heads &lt;b&gt; &amp; more</h2>" in page
        assert '<div class="part" tabindex="0"><table class="results">' in page

    def test_the_same_results_give_the_same_page(self) -> None:
        first, second = (report_html("t", [Section(heading="h", figure=figures()["results"])]) for _ in range(2))
        assert first == second
