"""Entity tracking as a lesson: two boxes first, then one more at each level, up to the task's own number."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from workbench.pretraining.lessons.exercise import Exercise, Look, Mark, cut
from workbench.tasks.entity_tracking import context, draw_scene
from workbench.values.refs import Head

CLAUSE = 7
"""Tokens of one clause of a context: `the apple is in Box F ,`; the object is the second, the label the sixth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxesLesson:
    """Which object is in the queried box? Queries are drawn with replacement: without it, later answers are guessed by
    elimination."""

    boxes: int = 7
    queries: int = 8

    name: ClassVar[str] = "entity_tracking"
    probe_layers: ClassVar[Mapping[str, int]] = MappingProxyType(
        {"bound_object": 2, "own_label": 2, "queried_label": 2}
    )
    """Each label of the context is asked for its object and itself, the last token of a query for its label."""
    looking: ClassVar[Mapping[str, Head]] = MappingProxyType({"fetch": Head(2, 0)})
    """The last token of a query looks at the queried label in the context."""

    @property
    def levels(self) -> int:
        """2 to `boxes` boxes."""
        return self.boxes - 1

    def exercise(self, draw: random.Random, level: int) -> Exercise:
        """A scene of the train split and its queries."""
        scene = draw_scene(draw, level + 2, "train")
        words = cut(context(scene))
        bound = tuple(Mark(at=CLAUSE * box + 5, word=thing) for box, (thing, _) in enumerate(scene))
        own = tuple(Mark(at=CLAUSE * box + 5, word=label) for box, (_, label) in enumerate(scene))
        answers, labels, looks = [], [], []
        for _ in range(self.queries):
            box = draw.randrange(len(scene))
            thing, label = scene[box]
            words += ["Box", label, "contains", "the", thing, "."]
            answers.append(Mark(at=len(words) - 3, word=thing))
            labels.append(Mark(at=len(words) - 3, word=label))
            looks.append(Look(at=len(words) - 3, to=CLAUSE * box + 5))
        probes = {"bound_object": bound, "own_label": own, "queried_label": tuple(labels)}
        return Exercise(words=tuple(words), answers=tuple(answers), probes=probes, looks={"fetch": tuple(looks)})
