"""The interactive explorer: one session (pure Python), two thin transports (a Jupyter widget, a loopback page), one
page."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.explorer.api import explore, forget
    from workbench.explorer.session import Session
_HOMES = {
    "Session": "workbench.explorer.session",
    "explore": "workbench.explorer.api",
    "forget": "workbench.explorer.api",
}
"""Name -> the file that holds it; it is imported when the name is asked for."""
__all__ = ["Session", "explore", "forget"]


def __getattr__(name: str) -> Any:
    """A name of `__all__`: importing this room alone, or one of its light files, loads no model code."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
