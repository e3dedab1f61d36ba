"""Tasks by name, through Python entry points of the group `workbench.tasks`: a package that declares one adds a task,
ours do the same."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from workbench.errors import InputError, nearest
from workbench.storage import read_typed
from workbench.tasks.base import Task

GROUP = "workbench.tasks"


def _require_types(name: str, kind: Any, options: Mapping[str, Any]) -> None:
    """Refuse an option of another type than the task's field says (3.5 boxes); what is unknown is refused later."""
    types = get_type_hints(kind) if is_dataclass(kind) else {}
    for option, value in options.items():
        if option in types:
            what = f"the option {option!r} of the task {name}"
            read_typed(value, types[option], what=what, remedy=f"set {option} to what the task takes")


def task_names() -> list[str]:
    """The names of all installed tasks."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def task_named(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of a name with its options. Errors: `InputError` for an unknown name or option, and for an entry point
    that is no task."""
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        raise InputError(f"no task {name!r} is installed; {nearest(name, task_names())}")
    kind = points[0].load()
    _require_types(name, kind, options or {})
    try:
        task = kind(**(options or {}))
    except TypeError as error:
        raise InputError(f"task {name!r} does not take these options ({error}).") from None
    if not isinstance(task, Task):
        raise InputError(
            f"the entry point {points[0].value} is no task: it needs name, stages, chance and pairs "
            "(workbench.tasks.base.Task)."
        )
    return task
