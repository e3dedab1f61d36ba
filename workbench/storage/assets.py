"""What comes with the workbench: the bundled models and the recorded results, wherever it is installed.

They lie under `assets/` in the source tree and inside the package in a wheel, so a bundled model's name and a path that
begins with `assets/` mean the same from any working directory.
"""

import functools
import logging
from pathlib import Path

log = logging.getLogger("workbench")
PACKAGE = Path(__file__).parents[1]
ASSETS = next(
    (place for place in (PACKAGE / "assets", PACKAGE.parent / "assets") if place.is_dir()), PACKAGE / "assets"
)
"""Inside an installed package, else beside it in the source tree."""
MODELS = (
    "teacher",
    "student",
    "unrelated-student",
    "thin-teacher",
    "thin-student",
    "thin-unrelated-student",
    "mixture-teacher",
    "mixture-student",
    "mixture-unrelated-student",
)
"""The names of the bundled models."""


def located(name: str | Path) -> str:
    """Where a model, file or folder lies: a bundled model by its name, or what is under `assets/`; anything else as it
    is.

    A bundled model's name means that model from every folder, also beside a folder of the same name, which is given as
    a path: `./teacher`, or a `Path`. A path under `assets/` is the working directory's own where there is one.
    """
    if isinstance(name, str) and name in MODELS:
        _warn_of_namesake(name, Path.cwd())
        return str(ASSETS / "models" / name)
    parts = Path(name).parts
    inside = ASSETS.joinpath(*parts[1:])
    if parts[:1] == ("assets",) and not Path(name).exists() and inside.exists():
        return str(inside)
    return str(name)


def short_name(name: str) -> str:
    """A bundled model's name, also for the path that stood in its place before; any other name as it is."""
    short = name.removeprefix("assets/models/").rstrip("/")
    return short if short in MODELS else name


@functools.cache
def _warn_of_namesake(name: str, folder: Path) -> None:
    if (folder / name).is_dir():
        log.warning("%s is the bundled model, not the folder of that name here; for that one give ./%s", name, name)
