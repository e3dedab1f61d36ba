"""A workbench for circuit discovery and circuit distillation (arXiv 2509.25002) on TransformerLens."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.explorer import explore

__version__ = "0.2.0"
__all__ = ["explore"]


def __getattr__(name: str) -> Any:
    """`workbench.explore`, imported when it is asked for: importing the package alone stays quick."""
    if name == "explore":
        from workbench.explorer import explore

        return explore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
