"""The committed studies: what each is called on the site, and which of them are of one task."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A study as tables and figures call it."""

    words: str
    students: str
    short: str = ""
    """Where there is little room."""


LINEAGES = "shared and unrelated lineage"
STUDIES: Mapping[str, Mapping[str, Shown]] = {
    "entity tracking": {
        "entity": Shown(words="every scene asked at all its boxes", students=LINEAGES, short="all boxes asked"),
        "lineage": Shown(words="lineage", students="five", short="lineage"),
        "lineage_data": Shown(words="lineage, more data", students=LINEAGES, short="lineage, more data"),
        "scenes": Shown(words="one query a scene", students="one", short="one query"),
        "few_heads": Shown(words="six heads trained", students="one", short="six heads train"),
        "quarter": Shown(words="sixteen heads trained", students="one", short="sixteen heads"),
        "methods": Shown(words="one choice changed at a time", students="one, ten variants of the method"),
        "thin": Shown(words="thin heads", students=LINEAGES, short="thin heads"),
    },
    "theory of mind": {
        "mind": Shown(words="theory of mind", students=LINEAGES, short="strongest ablations"),
        "mind_whole": Shown(words="theory of mind, whole circuits", students=LINEAGES, short="whole circuits"),
        "mind_family": Shown(
            words="theory of mind, the family of alignments",
            students="one, five kinds of alignment",
            short="the family",
        ),
        "mind_sizes": Shown(words="theory of mind, changes at every token", students=LINEAGES, short="changes aligned"),
    },
    "boxes, SmolLM2-135M": {
        "smollm2": Shown(words="SmolLM2-135M, boxes", students="one", short="by elimination"),
        "smollm2_positions": Shown(
            words="SmolLM2-135M, heads at positions", students="one", short="heads at positions"
        ),
        "smollm2_paths": Shown(words="SmolLM2-135M, path patching", students="one", short="path patching"),
    },
}
"""Task -> the studies of it, by what stands behind `study_` in their names."""
OF_ONE_TASK = {task: tuple(f"study_{name}" for name in shown) for task, shown in STUDIES.items()}
"""Task -> the names of its studies."""
