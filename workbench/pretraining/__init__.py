"""How the bundled models are made: lessons, one file for each family of tasks, a curriculum, pruning, and the bundles
themselves."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.pretraining.entity_bundle import BundleConfig, pretrain, word_tokenizer
_HOMES = {
    "BundleConfig": "workbench.pretraining.entity_bundle",
    "pretrain": "workbench.pretraining.entity_bundle",
    "word_tokenizer": "workbench.pretraining.entity_bundle",
}
"""Name -> the file that holds it; it is imported when the name is asked for."""
__all__ = ["BundleConfig", "pretrain", "word_tokenizer"]


def __getattr__(name: str) -> Any:
    """A name of `__all__`: importing this room alone, or one of its light files, loads no model code."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
