"""A figure as a table and as a file.

Every figure function puts the numbers that it draws into the figure itself (`with_table`), so `to_frame(figure)` gives
them back, whatever the figure, also after it went through JSON. `save_figure` writes PNG, SVG or PDF through kaleido
and a Chromium of this machine, without network.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from plotly import graph_objects as go

from workbench import storage
from workbench.errors import InputError

FORMATS = ("png", "svg", "pdf")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def with_table(figure: go.Figure, frame: pd.DataFrame) -> go.Figure:
    """The figure with its numbers as columns in `layout.meta` (NaN as null)."""
    columns: dict[Any, list[Any]] = {
        name: [None if pd.isna(cell) else cell for cell in frame[name].tolist()] for name in frame.columns
    }
    return figure.update_layout(meta={"table": columns})


def to_frame(figure: go.Figure) -> pd.DataFrame:
    """What a figure shows, as a table. Errors: `InputError` for a figure that was not made here."""
    meta: Any = figure.to_dict()["layout"].get("meta")
    if not isinstance(meta, dict) or "table" not in meta:
        raise InputError("this figure carries no table; make it with a function of workbench.plots.")
    return pd.DataFrame({name: list(column) for name, column in meta["table"].items()})


def browser() -> str | None:
    """A Chromium to render with: `BROWSER_PATH`, or the first on the search path."""
    return os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)


def save_figure(figure: go.Figure, path: str | Path, *, scale: int | float = 2) -> Path:
    """Write a figure as PNG, SVG or PDF, by the ending of `path`; `scale`: pixels of a PNG per pixel of the layout.

    Errors: `InputError` for another ending, and where kaleido or Chromium is missing, with the command that installs
    it.
    """
    path = Path(path)
    if path.suffix.lstrip(".") not in FORMATS:
        raise InputError(
            f"{path.name} ends in none of {', '.join(FORMATS)}; for a page that one can hover on use "
            "`figure.write_html`."
        )
    storage.write_atomically(
        path, lambda temporary: temporary.write_bytes(rendered(figure, path.suffix.lstrip("."), scale=scale))
    )
    return path


def rendered(figure: go.Figure, form: str, *, scale: int | float = 2) -> bytes:
    """The picture's bytes. Errors: as `save_figure`."""
    executable = browser()
    if find_spec("kaleido") is None:
        raise InputError(
            "pictures are rendered by kaleido, which is not installed: pip install "
            '"circuit-distillation-workbench[figures]".'
        )
    if executable is None:
        raise InputError(
            "pictures are rendered by Chromium, which is not on this machine: apt-get install -y chromium, or set "
            "BROWSER_PATH to one."
        )
    import kaleido

    page = kaleido.PageGenerator(mathjax=False)  # its default asks a content network for it
    options: dict[str, Any] = {"path": executable, "page_generator": page, "n": 1}
    return kaleido.calc_fig_sync(figure, opts={"format": form, "scale": scale}, kopts=options)
