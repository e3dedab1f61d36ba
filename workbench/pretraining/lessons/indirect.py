"""Indirect object identification as a lesson: one level, the task itself."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from workbench.pretraining.lessons.exercise import Exercise, Mark, cut
from workbench.tasks.ioi import NAMES, PLACES, TEMPLATES, THINGS, split_of
from workbench.values.refs import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class IndirectLesson:
    """Who receives the thing? One question for each sentence, as the answer ends it."""

    name: ClassVar[str] = "ioi"
    probe_layers: ClassVar[Mapping[str, int]] = MappingProxyType({"subject": 1})
    """The last token is asked for the name that acts."""

    looking: ClassVar[Mapping[str, Head]] = MappingProxyType({})

    @property
    def levels(self) -> int:
        """The task itself."""
        return 1

    def exercise(self, draw: random.Random, level: int) -> Exercise:
        """A sentence of the train split."""
        while True:
            subject, recipient = draw.sample(NAMES, 2)
            if split_of((subject, recipient)) == "train":
                break
        first, second = draw.choice(((subject, recipient), (recipient, subject)))
        words = cut(
            draw.choice(TEMPLATES).format(
                first=first, second=second, subject=subject, place=draw.choice(PLACES), thing=draw.choice(THINGS)
            )
        )
        last = len(words) - 1
        return Exercise(
            words=(*words, recipient, "."),
            answers=(Mark(at=last, word=recipient),),
            probes={"subject": (Mark(at=last, word=subject),)},
            looks={},
        )
