"""The page around the sections: what differs in the dark and on a phone, links, roles."""

import json
import re
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from plotly import graph_objects as go

from tests.plots.plot_results import STUDENT, TEACHER, figures, looks, results
from workbench.plots.importance import Scale, head_importance
from workbench.plots.narrow import WIDTH, narrow
from workbench.plots.table import results_chart
from workbench.plots.theme import DARK, LIGHT, Theme, untitled
from workbench.report.page import Section, Switch, report_html
from workbench.report.roles import Roles
from workbench.report.study_findings import cell_html, study_opening
from workbench.report.variants import applied, differences
from workbench.study.written import read_summary
from workbench.values.scores import Scores

RESULTS = Path(__file__).parents[2] / "assets/results"
DRAWN = figures()
STAGES = (
    {"name": "A", "title": "value fetcher", "position": "last", "into": None, "composition": None},
    {"name": "B", "title": "position <transmitter>", "position": "query_label", "into": "A", "composition": "q"},
)


def test_differences_turn_one_tree_into_the_other() -> None:
    before = {"a": [1, {"b": 2, "gone": 3}], "same": [None], "list": [1, 2]}
    after = {"a": [1, {"b": None, "new": {"x": 1}}], "same": [4], "list": [1]}
    changes = differences(before, after)
    assert applied(deepcopy(before), changes) == {"a": [1, {"new": {"x": 1}}], "same": [4], "list": [1]}
    assert differences(before, before) == []
    assert all(path[0] != "a" or len(path) == 3 for path, _ in changes), "only what is another"


def specification(page: str) -> dict[str, Any]:
    """The data of the page's only figure."""
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page)
    return json.loads(text)


def test_a_figure_of_the_theme_has_its_dark_colours_and_no_other_numbers() -> None:
    page = report_html("t", [Section(heading="h", figure=lambda theme: results_chart(results(), theme=theme))])
    spec = specification(page)
    dark = applied({"data": deepcopy(spec["data"]), "layout": deepcopy(spec["layout"])}, spec["dark"])
    assert spec["layout"]["template"]["layout"]["paper_bgcolor"] == LIGHT.background
    assert dark["layout"]["template"]["layout"]["paper_bgcolor"] == DARK.background
    assert [trace["x"] for trace in dark["data"]] == [trace["x"] for trace in spec["data"]]
    assert all(path[0] != "data" or isinstance(value, str) for path, value in spec["dark"]), "colours alone"
    assert specification(report_html("t", [Section(heading="h", figure=DRAWN["results"])]))["dark"] == []


def test_a_switch_turns_a_figure_into_its_other_look_in_both_themes() -> None:
    weak, strong = (Scores.of_heads(scale * torch.ones(2, 3), unit="u") for scale in (0.1, 1.0))

    def drawn(theme: Theme, scale: Scale = "own") -> go.Figure:
        return head_importance({"weak": weak, "strong": strong}, scale=scale, theme=theme)

    switch = Switch(names=("Each", "<Both>"), figure=partial(drawn, scale="common"))
    page = report_html("t", [Section(heading="h", figure=drawn, switch=switch)])
    spec = specification(page)
    first, looks = {"data": spec["data"], "layout": spec["layout"]}, spec["other"]
    assert [first["layout"][axis]["cmax"] for axis in ("coloraxis", "coloraxis2")] == [pytest.approx(0.1), 1.0]
    light = applied(deepcopy(first), looks["light"])
    dark = applied(applied(deepcopy(first), spec["dark"]), looks["dark"])
    for look, theme in ((light, LIGHT), (dark, DARK)):
        assert [look["layout"][axis]["cmax"] for axis in ("coloraxis", "coloraxis2")] == [1.0, 1.0]
        assert look["layout"]["template"]["layout"]["paper_bgcolor"] == theme.background
        assert "ticktext" not in look["layout"]["coloraxis"]["colorbar"]
    assert page.count("<button") == 2
    assert "&lt;Both&gt;" in page
    assert re.search(r'data-look="1" hidden>(?!.*1 is 0.1)', page), "each look has its own remarks"


def test_a_study_opens_with_its_gains_its_control_and_whether_they_could_be_known() -> None:
    summary = read_summary(RESULTS / "study_mind_whole" / "summary.json")
    gain, control, foresight = study_opening(summary)
    assert "sibling, 300 scenes: full model +0.010 [-0.009, +0.029], which could be none" in gain
    assert "circuit alone +0.025 [+0.003, +0.047], a gain" in gain
    assert "random CKA" in control
    assert "0.38 over 30 trainings" in foresight
    many, *_ = study_opening(read_summary(RESULTS / "study_entity" / "summary.json"))
    assert "full model, 2 gains and 1 loss in 3 cells (from -0.064 [-0.086, -0.041] in unrelated, 10 scenes" in many
    html = cell_html(summary["cells"][0])
    assert html.count("<tr") == 1 + len(summary["cells"][0]["conditions"])
    assert "+0.025 [+0.003, +0.047]" in html


def test_the_page_opens_with_what_was_found_and_links_to_each_section() -> None:
    sections = [Section(heading="One & two"), Section(heading="One & two"), Section(heading="<i>")]
    page = report_html("t", sections, opening=["It <b>gained</b>.", "Nothing is undecided."])
    assert page.index("It &lt;b&gt;gained") < page.index("<nav") < page.index("<section>")
    links = re.findall(r'href="#([^"]+)"', page)
    assert links == re.findall(r'<h2 id="([^"]+)"', page)
    assert len(set(links)) == 3
    assert "<nav" not in report_html("t", sections[:1])


@pytest.mark.parametrize("name", ["heads", "matching change", "CKA change", "results", "circuit", "faithfulness"])
def test_a_narrow_figure_keeps_its_numbers_and_stacks_its_panels(name: str) -> None:
    wide, _ = untitled(DRAWN[name])
    slim = narrow(wide)
    assert slim.layout.width == WIDTH
    assert [trace.type for trace in slim.data] == [trace.type for trace in wide.data]
    assert [trace.x for trace in slim.data] == [trace.x for trace in wide.data]
    domains = [axis.domain for axis in slim.select_yaxes() if axis.domain]
    if len({axis.domain for axis in wide.select_xaxes()}) > 1:
        assert {axis.domain for axis in slim.select_xaxes()} == {(0, 1)}
        assert all(low[0] > high[1] for low, high in pairwise(domains)), "below one another"
        assert slim.layout.height > wide.layout.height


def test_a_title_is_the_sections_and_remarks_are_text() -> None:
    plain, remarks = untitled(DRAWN["heads"])
    assert plain.layout.title.text is None
    assert plain.layout.height < DRAWN["heads"].layout.height
    assert "".join(remarks).count("Positive (orange): the head helps") == 1
    assert all("<" not in remark for remark in remarks)
    assert untitled(go.Figure())[1] == []


class TestRoles:
    """Roles by their names."""

    def test_letters_become_names_and_unknown_roles_stay(self) -> None:
        roles = Roles(stages=STAGES)
        renamed = roles.renamed(TEACHER)
        assert renamed.role_of("L2H1") == "position <transmitter>+value fetcher"
        assert renamed.role_of("L0H0") == "C"
        assert renamed.heads == TEACHER.heads
        assert roles.relabelled(looks()).labels["member"][0] == "L0H1 value fetcher, at last"

    def test_they_are_explained_once_with_their_heads(self) -> None:
        section = Roles(stages=STAGES).section({"teacher": TEACHER, "student": STUDENT})
        assert section is not None
        assert section.html is not None
        assert "L1H3 L2H1" in section.html
        assert "the query of a value fetcher" in section.html
        assert "position &lt;transmitter&gt;" in section.html
        assert Roles(stages=()).section({"teacher": TEACHER}) is None
