"""The road, stage by stage: discover in teacher and student, match, distil under a condition, evaluate.

A `Run` is a recipe at work in a run folder; each stage is a function on it, in a file of its name (`discover.py`,
`match.py`, `distill.py`, `evaluate.py`), writes into the folder and is skipped when its files are there. `arms.py`
walks all of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.experiment.conditions import CONDITIONS, Condition
    from workbench.experiment.prompts import Prompts
    from workbench.experiment.run import Run
    from workbench.storage.assets import located
_HOMES = {
    "CONDITIONS": "workbench.experiment.conditions",
    "Condition": "workbench.experiment.conditions",
    "Prompts": "workbench.experiment.prompts",
    "Run": "workbench.experiment.run",
    "located": "workbench.storage.assets",
}
"""Name -> the file that holds it; it is imported when the name is asked for."""
__all__ = ["CONDITIONS", "Condition", "Prompts", "Run", "located"]


def __getattr__(name: str) -> Any:
    """A name of `__all__`: importing this room alone, or one of its light files, loads no model code."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
