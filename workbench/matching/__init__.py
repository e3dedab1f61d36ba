"""Student heads -> teacher heads: the rules, what they give (`HeadMap`), and how far a match can be trusted."""

from workbench.matching.config import Distance, MatchingConfig, Rule, replace_rule
from workbench.matching.head_map import HeadMap, Match
from workbench.matching.influence import CircuitAlignment, circuit_alignment
from workbench.matching.rules import match_heads, random_map, shuffled_map

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
