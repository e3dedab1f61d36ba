"""What comes with the workbench: the bundled models and the recorded results, wherever it is installed."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""What holds `assets/` in the source tree."""


def located(name: str) -> str:
    """A relative path of the working directory, else of the project's root; anything else as it is."""
    inside = ROOT / name
    return str(inside) if not Path(name).exists() and inside.exists() else name
