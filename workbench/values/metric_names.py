"""The names of metrics: ours, and those that installed packages add as entry points of the group `workbench.metrics`.

Apart from the metrics themselves (`workbench.values.metrics`), so that reading a recipe need not load torch.
"""

from importlib.metadata import entry_points

from workbench.errors import InputError, nearest

GROUP = "workbench.metrics"
OURS = ("log_probability", "probability", "logit_difference", "probability_difference", "accuracy")


def metric_names() -> list[str]:
    """The names of all metrics."""
    return [*OURS, *sorted({point.name for point in entry_points(group=GROUP)} - set(OURS))]


def require_metric(name: str) -> None:
    """Refuse an unknown metric. Errors: `InputError` with the nearest name."""
    if name not in OURS and name not in (names := metric_names()):
        raise InputError(f"no metric {name!r}; {nearest(str(name), names)}")
