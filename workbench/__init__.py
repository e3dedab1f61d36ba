"""A workbench for circuit discovery and circuit distillation (arXiv 2509.25002) on TransformerLens.

    import workbench as wb

    teacher = wb.Teacher.load("teacher")
    pairs = wb.task("entity_tracking").pairs(teacher)
    search = wb.find_circuit(teacher, pairs)
    wb.plots.heads(search.scores)

Each name below is imported when it is asked for, so importing the package alone stays quick.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench import plots
    from workbench.circuits.circuit import Circuit
    from workbench.circuits.evaluation import evaluate_circuit
    from workbench.circuits.search import find_circuit
    from workbench.distillation.distill import distill
    from workbench.errors import InputError
    from workbench.experiment.comparison import compare
    from workbench.experiment.road import run_recipe
    from workbench.explorer import explore
    from workbench.matching.head_map import HeadMap
    from workbench.matching.match import match
    from workbench.models.hooked_model import Student, Teacher
    from workbench.patching.ablation import ablate
    from workbench.patching.activation import activation_patch
    from workbench.patching.attribution import attribute_edges as attribute
    from workbench.patching.execution import Execution
    from workbench.patching.path import path_patch
    from workbench.tasks.source import read_pairs, task
    from workbench.values.metrics import Metric
    from workbench.values.refs import Head
    from workbench.values.scores import Scores

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when torch is loaded, so this comes first: threads that wait in a loop take the core from whoever else has work,
# and a training beside one busy process is 20 times slower.

__version__ = "0.2.0"
__all__ = [
    "Circuit",
    "Execution",
    "Head",
    "HeadMap",
    "InputError",
    "Metric",
    "Scores",
    "Student",
    "Teacher",
    "ablate",
    "activation_patch",
    "attribute",
    "compare",
    "distill",
    "evaluate_circuit",
    "explore",
    "find_circuit",
    "match",
    "path_patch",
    "plots",
    "read_pairs",
    "run_recipe",
    "task",
]
_HOMES = {
    "Circuit": "circuits.circuit",
    "Execution": "patching.execution",
    "Head": "values.refs",
    "HeadMap": "matching.head_map",
    "InputError": "errors",
    "Metric": "values.metrics",
    "Scores": "values.scores",
    "Student": "models.hooked_model",
    "Teacher": "models.hooked_model",
    "ablate": "patching.ablation",
    "activation_patch": "patching.activation",
    "attribute": "patching.attribution:attribute_edges",
    "compare": "experiment.comparison",
    "distill": "distillation.distill",
    "evaluate_circuit": "circuits.evaluation",
    "explore": "explorer",
    "find_circuit": "circuits.search",
    "match": "matching.match",
    "path_patch": "patching.path",
    "plots": "plots",
    "read_pairs": "tasks.source",
    "run_recipe": "experiment.road",
    "task": "tasks.source",
}
"""Public name -> the module that holds it, and its name there where that is another (`plots` is a module itself)."""


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for. Errors: `AttributeError` with the nearest known name."""
    if name not in _HOMES:
        from workbench.errors import nearest

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {nearest(name, _HOMES)}")
    home, _, attribute = _HOMES[name].partition(":")
    module = importlib.import_module(f"{__name__}.{home}")
    value = module if name == "plots" else getattr(module, attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
