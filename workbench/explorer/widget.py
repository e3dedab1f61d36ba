"""The session in Jupyter: an anywidget whose messages are the session's commands and views."""

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from workbench.circuits.circuit import Circuit
from workbench.explorer.session import Session
from workbench.explorer.state import Side
from workbench.values.scores import Scores

STATIC = Path(__file__).parent / "static"


class Explorer(anywidget.AnyWidget):
    """The explorer in a notebook. Everything that it shows can also be had in Python: `circuit`, `scores`, `code`,
    `session`."""

    _esm = (STATIC / "explorer.js").read_text(encoding="utf-8")
    _css = (STATIC / "explorer.css").read_text(encoding="utf-8")
    theme = traitlets.Enum(("auto", "light", "dark"), default_value="auto").tag(sync=True)

    def __init__(self, session: Session, *, theme: str = "auto") -> None:
        super().__init__(theme=theme)
        self.session = session
        self.on_msg(_answer)

    @property
    def circuit(self) -> Circuit:
        """The circuit of the model in view, as it stands."""
        return self.session.state.circuits[self.session.state.side]

    def circuit_of(self, side: Side) -> Circuit:
        """The circuit of a model."""
        return self.session.state.circuits[side]

    @property
    def scores(self) -> Scores | None:
        """The heat map of the model in view; None while it is being computed."""
        return self.session.scores(self.session.state.side)

    @property
    def code(self) -> str:
        """The Python lines that reproduce the view."""
        return str(self.session.view()["code"])


def _answer(widget: Any, content: Any, buffers: Any) -> None:
    """A command of the page -> its view, with the page's own number of the command."""
    widget.send({"id": content.get("id"), "view": widget.session.handle(content.get("command") or {})})
