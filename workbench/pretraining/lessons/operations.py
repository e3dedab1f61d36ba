"""Entity tracking with operations as a lesson: few boxes and no operation first, then more and more operations.

The answer is decided by the latest sentence that names the queried box, so each mention of a box is asked by a probe
for what is in the box once that sentence is done.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from workbench.pretraining.lessons.exercise import Exercise, Look, Mark, cut
from workbench.tasks.entity_operations import NOTHING, QUESTION, EntityOperations, history, scene_words
from workbench.tasks.entity_tracking import LABELS, OBJECTS
from workbench.tasks.wording import fill
from workbench.values.refs import Head

LEVELS = ((3, 0), (4, 1), (5, 2), (5, 4), (5, 8), (5, 12))
"""(boxes, most operations) of each level; the last is the task's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationsLesson:
    """What is in the queried box after all operations?"""

    queries: int = 6

    name: ClassVar[str] = "entity_operations"
    probe_layers: ClassVar[Mapping[str, int]] = MappingProxyType({"content": 2, "own_label": 2, "asked_label": 2})
    """Each mention of a box is asked for the box's content after that sentence and for its label, the last token of a
    question for the label."""

    looking: ClassVar[Mapping[str, Head]] = MappingProxyType({"fetch": Head(2, 0)})
    """The last token of a question looks at the latest mention of the queried box."""

    @property
    def levels(self) -> int:
        """Of `LEVELS`."""
        return len(LEVELS)

    def exercise(self, draw: random.Random, level: int) -> Exercise:
        """A history of the train split and its questions."""
        boxes, most = LEVELS[level]
        scene = history(draw, boxes, draw.randint(0, most))
        named = scene_words(draw, scene, "train", OBJECTS, LABELS)
        text, _ = fill(scene.template, **named)
        words = cut(text)
        content, latest = _contents(words), {word: at for at, word in enumerate(words) if words[at - 1] == "Box"}
        own = tuple(Mark(at=at, word=words[at]) for at in range(len(words)) if words[at - 1] == "Box")
        answers, labels, looks = [], [], []
        for _ in range(self.queries):
            box = EntityOperations().asked(draw, scene.contents)
            thing = scene.contents[box]
            answer = NOTHING if thing is None else named[f"o{thing}"]
            words += cut(QUESTION.format(query=named[f"b{box}"]))
            answers.append(Mark(at=len(words) - 1, word=answer))
            labels.append(Mark(at=len(words) - 1, word=named[f"b{box}"]))
            looks.append(Look(at=len(words) - 1, to=latest[named[f"b{box}"]]))
            words.append(answer)
        probes = {"content": content, "own_label": own, "asked_label": tuple(labels)}
        return Exercise(words=tuple(words), answers=tuple(answers), probes=probes, looks={"fetch": tuple(looks)})


def _contents(words: list[str]) -> tuple[Mark, ...]:
    """What is in each named box once its sentence is done, read off the words before its label."""
    marks = []
    for at, word in enumerate(words):
        if at >= 2 and words[at - 1] == "Box" and word in LABELS:
            match words[at - 2]:
                case "in":  # the apple is in Box F
                    marks.append(Mark(at=at, word=words[at - 4]))
                case "into":  # the apple into Box F
                    marks.append(Mark(at=at, word=words[at - 3]))
                case "to":  # the apple from Box F to Box Q
                    marks.append(Mark(at=at, word=words[at - 6]))
                case "from":
                    marks.append(Mark(at=at, word=NOTHING))
                case _:  # Box Q is empty: said after the label
                    pass
    return tuple(marks)
