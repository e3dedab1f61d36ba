"""What comes with the workbench: the bundled models and the recorded results, wherever it is installed."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""What holds `assets/` in the source tree."""


def located(name: str) -> str:
    """A relative path of the working directory, else of the project's root; anything else as it is."""
    inside = next((each for each in (ROOT / name, ROOT / "assets" / "models" / name) if each.exists()), None)
    return name if Path(name).exists() or inside is None else str(inside)
