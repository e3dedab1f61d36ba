"""The site as its readers meet it, in headless Chromium, from a server and from the disk: the search leads to guides
and public names, no page scrolls sideways at the width of a telephone, in light and dark."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.browser_pages import Watched, headless_chromium, watched_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]
chromium = pytest.fixture(headless_chromium, scope="module")
page = pytest.fixture(watched_page)
searched = pytest.fixture(watched_page, scope="module")
"""The page of all questions: it makes its index once."""
PAGES = ("index", "start", "guides/patching", "results/index", "results/scenes", "concepts/glossary", "architecture")
WIDE = ("results/methods", "results/lineage", "guides/train_at_length", "reference/by-name/patching-and-ablation")
"""Pages whose tables or code are wider than a telephone."""
QUESTIONS = {
    "how do I patch a head's path to the logits": ("guides/patching", "reference/by-name/patching-and-ablation"),
    "ablate a head": ("guides/patching", "reference/by-name/patching-and-ablation"),
    "path_patch": ("guides/patching", "reference/by-name/patching-and-ablation"),
    "find a circuit": ("guides/find_a_circuit", "reference/by-name/circuits"),
    "how do I distil a student?": ("guides/match_and_distil", "reference/by-name/matching-and-distillation"),
    "load a GGUF file": ("guides/your_own_model", "reference/by-name/models"),
    "a task of my own": ("guides/your_own_task", "reference/by-name/prompts"),
    "what does a run cost": ("guides/what_a_run_costs",),
    "what is a receiver": ("concepts/glossary", "guides/patching"),
    "replay": ("concepts/glossary", "guides/patching", "reference/by-name/patching-and-ablation"),
}
"""What somebody asks -> the pages of which one must come first."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Without a line for each request."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


RESULT = ".md-search-result__item a.md-search-result__link"


def first_result(page: Any, question: str) -> str:
    """The address of what the search puts first."""
    page.evaluate("document.querySelectorAll('.md-search-result__item').forEach(each => each.remove())")
    page.fill("input.md-search__input", question)
    page.press("input.md-search__input", "End")  # the page listens to keys
    page.wait_for_selector(RESULT, state="attached")
    page.wait_for_timeout(500)  # the list is drawn anew while words arrive
    return page.query_selector(RESULT).evaluate("link => link.href")


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_search_leads_to_guides_and_public_names(searched: Watched, address: str, question: str) -> None:
    if not searched.requests:
        searched.page.goto(f"{address}index.html")
    found = first_result(searched.page, question)
    assert found.split("?")[0].removeprefix(address).removesuffix(".html") in QUESTIONS[question]
    assert not searched.errors
    assert not searched.left_loopback()


def test_the_search_works_from_the_disk(page: Watched, site: Path) -> None:
    question = next(iter(QUESTIONS))
    page.page.goto(f"file://{site}/index.html")
    found = first_result(page.page, question)
    assert found.split("?")[0].removeprefix(f"file://{site}/").removesuffix(".html") in QUESTIONS[question]
    assert not [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_scrolls_sideways(page: Watched, address: str, scheme: str) -> None:
    page.page.emulate_media(color_scheme=scheme)
    for name in (*PAGES, *WIDE):
        for width in (1440, 390):
            page.page.set_viewport_size({"width": width, "height": 900})
            if width == 1440:
                page.page.goto(f"{address}{name}.html")
            extra = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.page.evaluate("innerWidth") == width
            assert page.page.evaluate(extra) <= 0, f"{name} scrolls sideways at {width} pixels"
        shown = page.page.evaluate("document.body.getAttribute('data-md-color-scheme')")
        assert shown == ("slate" if scheme == "dark" else "default")
    assert not page.errors
    assert not page.left_loopback()


def test_a_wide_table_scrolls_inside_itself(page: Watched, address: str) -> None:
    page.page.set_viewport_size({"width": 390, "height": 900})
    page.page.goto(f"{address}results/methods.html")
    inside = "box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX == 'auto'"
    assert page.page.evaluate(f"[...document.querySelectorAll('table')].some(box => {inside})")
