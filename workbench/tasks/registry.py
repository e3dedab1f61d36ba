"""Tasks by name, through Python entry points of the group `workbench.tasks`: a package that declares one adds a task,
ours do the same."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from workbench.errors import InputError, nearest
from workbench.tasks.base import Task

GROUP = "workbench.tasks"


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
