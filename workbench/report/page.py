"""One self-contained HTML page of results: plotly.js inside, once, and nothing fetched from anywhere.

Every figure is in the page once, with what differs in the dark and on a narrow screen (`variants`); the page draws what
the system's colours and the room ask for, and prints in light.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from workbench.plots.narrow import narrow
from workbench.plots.theme import DARK, LIGHT, Theme, untitled
from workbench.report.variants import differences

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action "
    "'none'; base-uri 'none'"
)
"""The browser itself refuses every request."""
CONFIG = {"displaylogo": False, "showSendToCloud": False, "responsive": False}
"""Of plotly.js: no button that leads or sends anything elsewhere."""
PRINTED_WIDTH = 690
"""Pixels of text across an A4 or letter page with margins of 12 mm."""


def _variables(theme: Theme, wash: str) -> str:
    return (
        f"--background: {theme.background}; --ink: {theme.ink}; --muted: {theme.muted}; --grid: {theme.grid}; "
        f"--link: {theme.categories[0]}; --wash: {wash};"
    )


STYLE = (
    f"""
:root {{ color-scheme: light; {_variables(LIGHT, "#fdf1e3")} }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ color-scheme: dark; {_variables(DARK, "#33241a")} }}
}}
"""
    + """
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 84rem; color: var(--ink);
  background: var(--background); font: 1rem/1.55 "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0.5rem 0 1.5rem; overflow-wrap: break-word; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; padding-top: 1rem; border-top: 1px solid var(--grid);
  overflow-wrap: break-word; }
p { max-width: 46rem; margin: 0.5rem 0; overflow-wrap: break-word; white-space: pre-line; }
.opening p { font-size: 1.1rem; max-width: 54rem; margin: 0.75rem 0; }
nav ul { margin: 1.5rem 0 0; padding: 0; list-style: none; columns: 17rem; max-width: 60rem; }
nav li { break-inside: avoid; padding: 0.15rem 0; }
a { color: var(--link); }
figure { margin: 1rem 0; }
.switch { margin: 0 0 0.6rem; display: flex; flex-wrap: wrap; gap: 0.4rem; }
.switch button { font: inherit; color: var(--ink); background: var(--background); border: 1px solid var(--muted);
  border-radius: 0.3rem; padding: 0.25rem 0.7rem; min-height: 2rem; cursor: pointer; }
.switch button[aria-pressed="true"] { background: var(--ink); color: var(--background); border-color: var(--ink); }
.switch button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
figcaption p { margin: 0; }
figcaption { color: var(--muted); font-size: 0.85rem; line-height: 1.45; max-width: 46rem; margin: 0.5rem 0; }
.part { margin: 1rem 0; overflow-x: auto; }
caption { text-align: left; color: var(--muted); padding: 0 0 0.5rem 0.55rem; }
table { border-collapse: collapse; font-size: 0.82rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; }
th, td { padding: 0.35rem 0.55rem; text-align: right; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--muted); }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; }
.words { min-width: 44rem; }
tbody th { white-space: nowrap; font-weight: 400; }
tr.method { background: var(--wash); }
tr.method th { font-weight: 600; }
@media screen and (min-width: 1280px) {
  figure { display: grid; grid-template-columns: max-content minmax(12rem, 22rem); gap: 1.5rem; align-items: start; }
}
@media print {
  @page { margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .switch { display: none; }
  h2, p { break-after: avoid; }
  p { break-inside: avoid; }
  .part { overflow: visible; }
  figure, tr { break-inside: avoid; }
  figure > div { zoom: var(--printed); }
  table { font-size: 6pt; }
  .words { min-width: 0; }
  th, td { padding: 0.15rem 0.22rem; }
  tr.method { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .modebar { display: none !important; }
}
"""
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Switch:
    """A second look of a section's figure, and what the reader chooses between: the first look's name, the second's."""

    names: tuple[str, str]
    figure: Callable[[Theme], go.Figure]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Section:
    """A heading, text (a blank line starts a paragraph), and perhaps a figure and a piece of HTML, in this order."""

    heading: str
    text: str = ""
    figure: go.Figure | Callable[[Theme], go.Figure] | None = None
    """A function of the theme is drawn light or dark as the reader's system has it, a bare figure always as it is."""
    switch: Switch | None = None
    html: str | None = None
    """Put in as it is: only HTML that was made and escaped by this program, such as `results_html`."""


DRAW = """
function library() {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = document.getElementById("plotly").textContent;
  document.head.append(script);
}
const dark = matchMedia("(prefers-color-scheme: dark)");
const figures = [...document.querySelectorAll("figure")];
const waiting = [...figures];
function changed(tree, differences) {
  for (const [path, value] of differences) {
    const last = path[path.length - 1];
    let place = tree;
    for (const key of path.slice(0, -1)) place = place[key];
    if (value === null && !Array.isArray(place)) delete place[last]; else place[last] = value;
  }
}
function drawn(figure, paper = false) {
  library();
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const tree = {data: spec.data, layout: spec.layout};
  const night = dark.matches && !paper;
  if (night) changed(tree, spec.dark);
  if (figure.dataset.look === "1") changed(tree, night ? spec.other.dark : spec.other.light);
  const room = figure.parentElement.clientWidth;
  if (!paper && room < tree.layout.width) {
    changed(tree, spec.narrow);
    tree.layout.width = room;
  }
  const place = figure.querySelector("div");
  place.style.width = `${tree.layout.width}px`;
  place.style.height = `${tree.layout.height}px`;
  Plotly.react(place, tree.data, tree.layout, spec.config);
}
function next() {
  if (!waiting.length) { document.documentElement.dataset.drawn = "all"; return; }
  drawn(waiting.shift());
  setTimeout(next);
}
function again(paper = false) {
  waiting.length = 0;
  for (const figure of figures) drawn(figure, paper);
  document.documentElement.dataset.drawn = "all";
}
for (const button of document.querySelectorAll(".switch button")) button.addEventListener("click", () => {
  const figure = button.closest("figure");
  figure.dataset.look = button.value;
  for (const each of figure.querySelectorAll(".switch button")) each.ariaPressed = String(each === button);
  for (const caption of figure.querySelectorAll("figcaption p")) caption.hidden = caption.dataset.look !== button.value;
  if (!waiting.includes(figure)) drawn(figure);
});
let width = innerWidth, soon;
addEventListener("resize", () => {
  clearTimeout(soon);
  soon = setTimeout(() => { if (innerWidth !== width && !waiting.length) { width = innerWidth; again(); } }, 200);
});
dark.addEventListener("change", () => { if (!waiting.length && !matchMedia("print").matches) again(); });
addEventListener("beforeprint", () => again(true));
addEventListener("afterprint", () => again());
addEventListener("load", () => setTimeout(next));
"""
"""Starts plotly.js once the page can be read, and draws the figures one after another, in the system's colours and as
wide as there is room; all at once, light and wide, before the page is printed."""


def report_html(title: str, sections: Sequence[Section], *, opening: Sequence[str] = ()) -> str:
    """The page: title, what was found (`opening`, a paragraph each), contents, sections. Title, headings and text are
    escaped; plotly.js only if there is a figure."""
    figures = any(section.figure is not None for section in sections)
    library = f'<script type="text/plain" id="plotly">{get_plotlyjs()}</script>' if figures else ""
    drawing = f"<script>{DRAW}</script>" if figures else ""
    body = "\n".join(_section(section, place) for place, section in enumerate(sections, 1))
    paragraphs = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in opening)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{f'<div class="opening">{paragraphs}</div>' if paragraphs else ""}
{_contents(sections)}
{body}
</main>
{library}
{drawing}
</body>
</html>
"""


def _contents(sections: Sequence[Section]) -> str:
    """A link to every section, where there are several."""
    if len(sections) < 2:
        return ""
    links = "\n".join(
        f'<li><a href="#{anchor(section.heading, place)}">{escape(section.heading)}</a></li>'
        for place, section in enumerate(sections, 1)
    )
    return f'<nav aria-label="Contents">\n<ul>\n{links}\n</ul>\n</nav>'


def anchor(heading: str, place: int) -> str:
    """The name that a link to a section has: its heading in plain letters, and its number where that says nothing."""
    words = "-".join(re.findall(r"[a-z0-9]+", heading.lower()))
    return f"{place}-{words}" if words else str(place)


def _section(section: Section, place: int) -> str:
    paragraphs = [f"<p>{escape(part.strip())}</p>" for part in section.text.split("\n\n") if part.strip()]
    figure = [_figure(section, section.figure, place)] if section.figure is not None else []
    part = [f'<div class="part" tabindex="0">{section.html}</div>'] if section.html is not None else []
    opening = f'<section>\n<h2 id="{anchor(section.heading, place)}">{escape(section.heading)}</h2>'
    return "\n".join([opening, *paragraphs, *figure, *part, "</section>"])


def _figure(section: Section, drawn: go.Figure | Callable[[Theme], go.Figure], place: int) -> str:
    """The figure as data beside the place that it is drawn in, which has its size already; its remarks are the page's
    text, its title is the section's."""
    light = drawn if isinstance(drawn, go.Figure) else drawn(LIGHT)
    figure, remarks = untitled(light)
    dark = figure if isinstance(drawn, go.Figure) else untitled(drawn(DARK))[0]
    tree, night, captions = _tree(figure), _tree(dark), [remarks]
    looks: dict[str, object] = {"dark": differences(tree, night), "narrow": differences(tree, _tree(narrow(figure)))}
    if section.switch is not None:
        (other, words), (other_dark, _) = (untitled(section.switch.figure(theme)) for theme in (LIGHT, DARK))
        looks["other"] = {"light": differences(tree, _tree(other)), "dark": differences(night, _tree(other_dark))}
        captions.append(words)
    data = json.dumps({**tree, **looks, "config": CONFIG}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # cannot end the script
    width, height = figure.layout.width or PRINTED_WIDTH, figure.layout.height or 450
    zoom = min(1.0, PRINTED_WIDTH / width)
    return (
        f'<figure aria-label="{escape(section.heading)}" style="--printed: {zoom:.3f}"><div id="figure-{place}" '
        f'style="width: min({width}px, 100%); height: {height}px"></div>{_caption(captions, section.switch)}'
        f'<script type="application/json">{data}</script></figure>'
    )


def _caption(captions: Sequence[Sequence[str]], switch: Switch | None) -> str:
    """What chooses the look, and each look's remarks."""
    remarks = "".join(
        f'<p data-look="{look}"{" hidden" if look else ""}>{"<br>".join(map(escape, words))}</p>'
        for look, words in enumerate(captions)
        if words
    )
    return f"<figcaption>{_buttons(switch)}{remarks}</figcaption>" if remarks or switch else ""


def _buttons(switch: Switch | None) -> str:
    """One for each look, the first of them pressed."""
    if switch is None:
        return ""
    buttons = "".join(
        f'<button type="button" value="{look}" aria-pressed="{"false" if look else "true"}">{escape(name)}</button>'
        for look, name in enumerate(switch.names)
    )
    return f'<div class="switch" role="group" aria-label="Look of the figure">{buttons}</div>'


def _tree(figure: go.Figure) -> dict[str, object]:
    """What plotly.js draws: without the table of `to_frame`, which says the same numbers again."""
    parts = json.loads(figure.to_json() or "{}")
    return {
        "data": parts["data"],
        "layout": {name: value for name, value in parts["layout"].items() if name != "meta"},
    }
