"""Where two figures differ, as the page carries it: one figure in full, and of its other looks only what is another."""

from typing import Any

Difference = tuple[list[str | int], Any]
"""The keys down to a place, and its other value; None takes it away."""


def differences(before: Any, after: Any) -> list[Difference]:
    """What turns one tree of JSON into another; lists of another length are replaced as a whole."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        pairs = [(key, before.get(key), after.get(key)) for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(place, *both) for place, both in enumerate(zip(before, after, strict=True))]
    else:
        return [] if before == after else [([], after)]
    return [([key, *path], value) for key, old, new in pairs for path, value in differences(old, new)]


def applied(before: Any, changes: list[Difference]) -> Any:
    """The tree with these differences, in place, as the page's own script does it."""
    for path, value in changes:
        place = before
        for key in path[:-1]:
            place = place[key]
        if value is None and isinstance(place, dict):
            del place[path[-1]]
        else:
            place[path[-1]] = value
    return before
