"""The one progress bar of all that takes long."""

import os
import sys
from typing import Any

from tqdm.asyncio import tqdm_asyncio as PlainBar
from tqdm.auto import tqdm


def bar(*items: Any, shown: bool = True, **settings: Any) -> "tqdm[Any]":
    """A bar on a terminal or in a notebook, gone when it is done; none is drawn into a pipe or a file, nor where
    TQDM_DISABLE is set (`--quiet` sets it)."""
    return tqdm(*items, leave=False, disable=not (shown and _has_eyes()), **settings)


def _has_eyes() -> bool:
    """Whether anybody sees a bar: a notebook draws its own, elsewhere it goes to standard error."""
    if os.environ.get("TQDM_DISABLE"):
        return False
    return tqdm is not PlainBar or bool(sys.stderr and sys.stderr.isatty())
