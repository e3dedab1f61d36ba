"""The report in a real browser: readable before its figures are drawn, all of them drawn in the end and before it is
printed, nothing fetched."""

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from browser_pages import Watched, headless_chromium, watched_page
from plotly import graph_objects as go

from tests.plots.plot_results import figures, results
from workbench.cli import main
from workbench.plots.table import results_html
from workbench.plots.theme import DARK, LIGHT
from workbench.report.page import Section, report_html

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1200)]
chromium = pytest.fixture(headless_chromium, scope="module", name="chromium")
watched = pytest.fixture(watched_page, name="watched")
DRAWN = "document.querySelectorAll('figure .main-svg').length"
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"


def test_the_report_of_a_run(
    watched: Watched, model_folder: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "teacher": model_folder("llama", seed=1),
        "student": model_folder("llama", seed=2, layers=2),
        "data.boxes": 3,
        "data.reference_scenes": 4,
        "data.discovery_scenes": 4,
        "data.train_scenes": 6,
        "data.test_scenes": 5,
        "discovery.heads": 2,
        "discovery.least_effect": 0.0,
        "training.steps": 4,
        "training.batch": 6,
        "conditions": "[base,circuit_ce,circuit_ce_cka]",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert main(["demo", "--recipe", "demo", "--out", str(tmp_path / "run"), *words]) == 0
    page = watched.page
    page.goto((tmp_path / "run" / "report.html").as_uri())
    assert page.locator("h2").first.is_visible()
    seconds = page.evaluate(LOADED)
    page.wait_for_selector('html[data-drawn="all"]', state="attached")
    figures = page.locator("figure").count()
    assert figures >= 6
    assert page.locator("figure:has(.main-svg)").count() == figures
    switched = page.locator("figure:has(.switch)").first
    ends = "figure => ['', 2].map(each => figure.querySelector('.js-plotly-plot').layout[`coloraxis${each}`].cmax)"
    assert len(set(switched.evaluate(ends))) == 2
    switched.get_by_role("button", name="Both on one scale").press("Enter")
    assert len(set(switched.evaluate(ends))) == 1
    assert switched.locator("figcaption p:visible").count() == 1
    with capsys.disabled():
        sys.stdout.write(f"\nreport of {figures} figures: loaded after {seconds:.2f} s\n")
    assert watched.errors == []
    assert watched.left_loopback() == [(tmp_path / "run" / "report.html").as_uri()], "the file itself"


def test_printing_draws_what_is_still_waiting(watched: Watched, tmp_path: Path) -> None:
    """The page is held before its first figure by printing in the load event itself."""
    sections = [Section(heading=f"Figure {place}", figure=go.Figure(go.Scatter(y=[1, 3, place]))) for place in range(4)]
    html = report_html("Report", sections)
    early = (
        "<script>addEventListener('load', () => { dispatchEvent(new Event('beforeprint')); window.early = "
        "document.querySelectorAll('figure .main-svg').length; })</script>"
    )
    (tmp_path / "report.html").write_text(html.replace("<main>", early + "<main>"))
    page = watched.page
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("window.early") >= 4, "all are there before the browser prints"
    page.wait_for_selector('html[data-drawn="all"]', state="attached")
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") + printed.count(b"/Type/Page") >= 1
    assert page.evaluate(DRAWN) >= 4
    assert watched.errors == []


@pytest.mark.parametrize("scheme", ["dark", pytest.param("light", marks=pytest.mark.lengthy)])
def test_a_phone_shows_every_figure_whole(watched: Watched, tmp_path: Path, scheme: Any) -> None:
    """Nothing is wider than the screen, the page has the system's colours, and a wider window draws them wide again."""
    drawn = cache(figures)
    sections = [
        Section(
            heading=name,
            figure=partial(lambda theme, name: drawn(theme)[name], name=name),
            html=results_html(results()),
        )
        for name in ("heads", "results", "matching change", "CKA change")
    ]
    (tmp_path / "report.html").write_text(report_html("Report", sections, opening=["Found."]))
    page = watched.page
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector('html[data-drawn="all"]', state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    rights = "[...document.querySelectorAll('figure text')].map(each => each.getBoundingClientRect().right)"
    assert max(page.evaluate(rights)) <= 390
    theme = {"light": LIGHT, "dark": DARK}[scheme]
    red, green, blue = (int(theme.background[at : at + 2], 16) for at in (1, 3, 5))
    papers = "[document.body, ...document.querySelectorAll('figure .main-svg:first-child')]"
    painted = page.evaluate(f"{papers}.map(each => getComputedStyle(each).backgroundColor)")
    assert set(painted) == {f"rgb({red}, {green}, {blue})"}
    page.set_viewport_size({"width": 1440, "height": 900})
    for _ in range(100):  # the page's own policy forbids the evaluation that `wait_for_function` needs
        if page.evaluate("document.querySelector('figure .main-svg').clientWidth") > 390:
            break
        page.wait_for_timeout(100)
    assert page.evaluate("document.querySelector('figure .main-svg').clientWidth") > 390
    assert watched.errors == []
