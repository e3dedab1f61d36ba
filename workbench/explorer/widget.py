"""The session in Jupyter: an anywidget whose messages are the session's commands and views."""

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from workbench.circuits.circuit import Circuit
from workbench.explorer.session import Session
from workbench.explorer.state import Side
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head
from workbench.values.scores import Scores

STATIC = Path(__file__).parent / "static"


class Explorer(anywidget.AnyWidget):
    """The explorer in a notebook. What a click does, a method does too (`pick`, `choose`, `select`, `toggle`, `clear`,
    `compare`): each returns the view once everything in it is there, and the page follows. What is in view can be had
    as `pairs`, `scores`, `circuit` and `code`. Errors of the methods: `InputError` with what the page would be told."""

    _esm = (STATIC / "explorer.js").read_text(encoding="utf-8")
    _css = (STATIC / "explorer.css").read_text(encoding="utf-8")
    theme = traitlets.Enum(("auto", "light", "dark"), default_value="auto").tag(sync=True)

    def __init__(self, session: Session, *, theme: str = "auto") -> None:
        super().__init__(theme=theme)
        self.session = session
        self.on_msg(_answer)

    def pick(self, index: int) -> dict[str, Any]:
        """Put a pair of the list in view, by its number from 0."""
        return self._do("pick", index=index)

    def choose(self, **settings: Any) -> dict[str, Any]:
        """Change settings of the view: `method`, `metric`, `position`, `average`, `outside`, `weighted`."""
        return self._do("set", **settings)

    def select(self, head: Head | str, *, side: Side = "teacher") -> dict[str, Any]:
        """Put a head in view."""
        return self._do("select", side=side, head=str(head))

    def toggle(self, head: Head | str, *, side: Side = "teacher") -> dict[str, Any]:
        """Add a head to its model's circuit, or drop it from there."""
        return self._do("toggle", side=side, head=str(head))

    def clear(self, *, side: Side = "teacher") -> dict[str, Any]:
        """Empty a model's circuit."""
        return self._do("clear", side=side)

    def compare(self) -> dict[str, Any]:
        """Set the circuits beside random ones of equal size."""
        return self._do("compare")

    def _do(self, name: str, **fields: Any) -> dict[str, Any]:
        view = self.session.do(name, **fields)
        self.send({"id": None, "view": view})
        return view

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

    def scores_of(self, side: Side) -> Scores | None:
        """The heat map of a model; None while it is being computed."""
        return self.session.scores(side)

    @property
    def pairs(self) -> PromptPairs:
        """The pair of prompts in view, in the tokens of the model in view."""
        state = self.session.state
        return self.session.subjects[state.side].pair(state.pair)

    @property
    def code(self) -> str:
        """The Python lines that reproduce the view."""
        return str(self.session.view()["code"])


def _answer(widget: Any, content: Any, buffers: Any) -> None:
    """A command of the page -> its view, with the page's own number of the command."""
    widget.send({"id": content.get("id"), "view": widget.session.handle(content.get("command") or {})})
