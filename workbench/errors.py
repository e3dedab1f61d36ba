"""The one exception for bad input: its message says what is wrong and names the remedy."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the caller (a model, a prompt, a recipe); the message names the remedy."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """`did you mean ...?` for an unknown name, or the start of the known ones when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(map(repr, close))}?"
    return f"known: {', '.join(map(repr, names[:12]))}{', ...' if len(names) > 12 else ''}"
