"""One self-contained HTML page of results: plotly.js inside, once, and nothing fetched from anywhere."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action "
    "'none'; base-uri 'none'"
)
"""The browser itself refuses every request."""
CONFIG = {"displaylogo": False, "showSendToCloud": False, "responsive": False}
"""Of plotly.js: no button that leads or sends anything elsewhere."""
PRINTED_WIDTH = 690
"""Pixels of text across an A4 or letter page with margins of 12 mm."""
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem; color: #1a1c1f; background: #fff;
  font: 1rem/1.55 "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0.5rem 0 1.5rem; overflow-wrap: break-word; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; padding-top: 1rem; border-top: 1px solid #e3e6ea;
  overflow-wrap: break-word; }
p { max-width: 46rem; margin: 0.5rem 0; overflow-wrap: break-word; white-space: pre-line; }
figure, .part { margin: 1rem 0; overflow-x: auto; }
caption { text-align: left; color: #6b7178; padding: 0 0 0.5rem 0.55rem; }
table { border-collapse: collapse; font-size: 0.82rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; }
th, td { padding: 0.35rem 0.55rem; text-align: right; border-bottom: 1px solid #e3e6ea; }
th { font-weight: 600; }
thead th { vertical-align: bottom; border-bottom: 2px solid #6b7178; }
th:first-child, td:first-child { text-align: left; }
tbody th { white-space: nowrap; font-weight: 400; }
tr.method { background: #fdf1e3; }
tr.method th { font-weight: 600; }
@media print {
  @page { margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2, p { break-after: avoid; }
  p { break-inside: avoid; }
  figure, .part { overflow: visible; }
  figure, tr { break-inside: avoid; }
  figure > div { zoom: var(--printed); }
  table { font-size: 6pt; }
  th, td { padding: 0.15rem 0.22rem; }
  tr.method { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .modebar { display: none !important; }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Section:
    """A heading, text (a blank line starts a paragraph), and perhaps a figure and a piece of HTML, in this order."""

    heading: str
    text: str = ""
    figure: go.Figure | None = None
    html: str | None = None
    """Put in as it is: only HTML that was made and escaped by this program, such as `results_html`."""


DRAW = """
function library() {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = document.getElementById("plotly").textContent;
  document.head.append(script);
}
const waiting = [...document.querySelectorAll("figure")];
function drawn(figure) {
  library();
  const {data, layout, config} = JSON.parse(figure.querySelector("script").textContent);
  Plotly.newPlot(figure.querySelector("div"), data, layout, config);
}
function next() {
  if (!waiting.length) { document.documentElement.dataset.drawn = "all"; return; }
  drawn(waiting.shift());
  setTimeout(next);
}
addEventListener("beforeprint", () => { while (waiting.length) drawn(waiting.shift()); });
addEventListener("load", () => setTimeout(next));
"""
"""Starts plotly.js once the page can be read, and draws the figures one after another; all at once before the page is
printed."""


def report_html(title: str, sections: Sequence[Section]) -> str:
    """The page. Title, headings and text are escaped; figures keep their own size and scroll on a narrow screen;
    plotly.js only if there is a figure."""
    figures = any(section.figure is not None for section in sections)
    library = f'<script type="text/plain" id="plotly">{get_plotlyjs()}</script>' if figures else ""
    drawing = f"<script>{DRAW}</script>" if figures else ""
    body = "\n".join(_section(section, place) for place, section in enumerate(sections, 1))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
{library}
{drawing}
</body>
</html>
"""


def _section(section: Section, place: int) -> str:
    paragraphs = [f"<p>{escape(part.strip())}</p>" for part in section.text.split("\n\n") if part.strip()]
    figure = [_figure(section.figure, section.heading, place)] if section.figure is not None else []
    part = [f'<div class="part">{section.html}</div>'] if section.html is not None else []
    return "\n".join([f"<section>\n<h2>{escape(section.heading)}</h2>", *paragraphs, *figure, *part, "</section>"])


def _figure(figure: go.Figure, heading: str, place: int) -> str:
    """The figure as data beside the place that it is drawn in, which has its size already."""
    parts = json.loads(figure.to_json() or "{}")
    data = json.dumps({"data": parts["data"], "layout": parts["layout"], "config": CONFIG}).replace(
        "<", "\\u003c"
    )  # cannot end the script
    width, height = figure.layout.width or PRINTED_WIDTH, figure.layout.height or 450
    zoom = min(1.0, PRINTED_WIDTH / width)
    return (
        f'<figure aria-label="{escape(heading)}" style="--printed: {zoom:.3f}"><div id="figure-{place}" style="width: '
        f'{width}px; height: {height}px"></div>'
        f'<script type="application/json">{data}</script></figure>'
    )
