"""Student heads -> teacher heads: the rules, what they give (`HeadMap`), and how far a match can be trusted."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.matching.config import Distance, MatchingConfig, Rule, replace_rule
    from workbench.matching.head_map import HeadMap, Match
    from workbench.matching.influence import CircuitAlignment, circuit_alignment
    from workbench.matching.rules import match_heads, random_map, shuffled_map
_HOMES = {
    "CircuitAlignment": "workbench.matching.influence",
    "Distance": "workbench.matching.config",
    "HeadMap": "workbench.matching.head_map",
    "Match": "workbench.matching.head_map",
    "MatchingConfig": "workbench.matching.config",
    "Rule": "workbench.matching.config",
    "circuit_alignment": "workbench.matching.influence",
    "match_heads": "workbench.matching.rules",
    "random_map": "workbench.matching.rules",
    "replace_rule": "workbench.matching.config",
    "shuffled_map": "workbench.matching.rules",
}
"""Name -> the file of this room that holds it; it is imported when the name is asked for."""
__all__ = [
    "CircuitAlignment",
    "Distance",
    "HeadMap",
    "Match",
    "MatchingConfig",
    "Rule",
    "circuit_alignment",
    "match_heads",
    "random_map",
    "replace_rule",
    "shuffled_map",
]


def __getattr__(name: str) -> Any:
    """A name of `__all__`: importing this room alone, or one of its light files, loads no model code."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
