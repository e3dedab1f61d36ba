"""The interactive explorer: one session (pure Python), two thin transports (a Jupyter widget, a loopback page), one
page."""

from workbench.explorer.api import explore, forget
from workbench.explorer.session import Session

__all__ = ["Session", "explore", "forget"]
