"""Theory of mind as a lesson: everybody sees everything first (what is in the container?), then all visibilities."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from workbench.pretraining.lessons.exercise import Exercise, Look, Mark, cut, token_at
from workbench.tasks.ioi import NAMES
from workbench.tasks.stories import CONTAINERS, CONTENTS, SETTINGS, UNKNOWN, VISIBILITY, VisibilityStory, can
from workbench.tasks.theory_of_mind import TheoryOfMind
from workbench.values.refs import Head

QUESTION_STARTS = "What does"
TURNS = ("A", "B")
"""Words for who acts first and who second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MindsLesson:
    """What does a character think that a container holds? Questions are drawn with replacement, in the task's own
    balance."""

    queries: int = 6

    name: ClassVar[str] = "theory_of_mind"
    probe_layers: ClassVar[Mapping[str, int]] = MappingProxyType(
        {
            "container": 1,
            "filler": 1,
            "turn": 1,
            "seer": 1,
            "asked_character": 1,
            "asked_container": 1,
            "sight": 2,
            "turn_of_character": 2,
            "turn_of_container": 2,
            "knows": 3,
        }
    )
    """Each content is asked for its container, who filled it and whose turn that was (A or B), `can` or `cannot` for
    whose sight it is; the last token of a question for the two words that it asks about, later for the character's
    sight and both their turns, at last for whether the character knows."""
    looking: ClassVar[Mapping[str, Head]] = MappingProxyType(
        {"sight": Head(1, 1), "filler": Head(1, 2), "container": Head(1, 3)}
    )
    """The last token of a question looks at whether the character sees, at what it filled in itself, and at what is in
    the container."""

    @property
    def levels(self) -> int:
        """All see; any visibility."""
        return 2

    def exercise(self, draw: random.Random, level: int) -> Exercise:
        """A story of the train split and its questions."""
        cells = [cell for cell in TheoryOfMind().cells() if level or all(cell[2:])]
        who, asked, *sees = draw.choice(cells)
        story = _story(draw, (sees[0], sees[1]), who, asked)
        wording, place = draw.randrange(len(VISIBILITY)), draw.choice(SETTINGS)
        text, spans = story.text(wording, place, "")
        start = text.rindex(QUESTION_STARTS)
        words = cut(text[:start])
        at = {name: token_at(text, spans[name][0]) for name in ("state_1", "state_2", "sees_1", "sees_2")}
        states = (at["state_1"], at["state_2"])
        probes: dict[str, list[Mark]] = {
            "container": [Mark(at=states[n], word=story.objects[n]) for n in (0, 1)],
            "filler": [Mark(at=states[n], word=story.characters[n]) for n in (0, 1)],
            "turn": [Mark(at=states[n], word=TURNS[n]) for n in (0, 1)],
            "seer": [Mark(at=at[f"sees_{n + 1}"], word=story.characters[n]) for n in (0, 1)],
        }
        looks: dict[str, list[Look]] = {"sight": [], "filler": [], "container": []}
        asking = [
            (who, asked),
            *(
                (cell[0], cell[1])
                for cell in draw.choices([c for c in cells if list(c[2:]) == sees], k=self.queries - 1)
            ),
        ]
        answers = []
        for who, asked in asking:
            again = replace(story, who=story.characters[who], asked=story.objects[asked])
            words += cut(again.text(wording, place, "")[0][start:])
            last = len(words) - 1
            answers.append(Mark(at=last, word=again.believed))
            for name, word in _asked_for(again, who, asked).items():
                probes.setdefault(name, []).append(Mark(at=last, word=word))
            for name, to in (("sight", at[f"sees_{who + 1}"]), ("filler", states[who]), ("container", states[asked])):
                looks[name].append(Look(at=last, to=to))
            words.append(again.believed)
        return Exercise(words=tuple(words), answers=tuple(answers), probes=_tuples(probes), looks=_tuples(looks))


def _asked_for(story: VisibilityStory, who: int, asked: int) -> dict[str, str]:
    """What probes ask the last token of a question for."""
    return {
        "asked_character": story.who,
        "asked_container": story.asked,
        "sight": can(story.sees[who]),
        "turn_of_character": TURNS[who],
        "turn_of_container": TURNS[asked],
        "knows": can(story.believed != UNKNOWN),
    }


def _tuples(lists: Mapping[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(values) for name, values in lists.items()}


def _story(draw: random.Random, sees: tuple[bool, bool], who: int, asked: int) -> VisibilityStory:
    while True:
        one, two = draw.sample(NAMES, 2)
        objects, states = draw.sample(CONTAINERS, 2), draw.sample(CONTENTS, 2)
        story = VisibilityStory(
            characters=(one, two),
            objects=(objects[0], objects[1]),
            states=(states[0], states[1]),
            sees=sees,
            who=(one, two)[who],
            asked=objects[asked],
        )
        if story.split == "train":
            return story
