"""Theory of mind: what does a character believe, given what it could see? (CausalToM's structure, Prakash et al. 2025;
Sally and Anne.)

    "At the farm, Mary and John work side by side. Mary takes a closed jar and fills it with rice.
     Then John takes a closed cup and fills it with
     milk. Mary cannot see what John does. John can see what Mary does.
     What does Mary think the cup holds? Answer:" -> " unknown"

*Balance.* A third of the answers is the first content, a third the second, a third "unknown"; the characters,
containers and visibilities are spread evenly over the questions (a cycle of cells in random order). So no rule that
looks at mentions alone beats `chance`. Rules that use part of the meaning do better and are no fault of the data:
answering with what is really in the container is right in two thirds of the default's prompts.

*Counterfactuals* (the corrupt prompt; the expected answer always differs, and is recorded as `corrupt_answer`):
- `story`: another story of the same split, which answers otherwise;
- `order`: order reversal. Names and containers change places, contents and visibility stay where they are (in a
  false-belief story the two
  containers change places);
- `states`: fresh contents (containers) in the same story; asked only where the character knows, as "unknown" would stay
  "unknown";
- `visibility`: the sentence that decides the answer is flipped; asked only where it decides.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from workbench import seeds
from workbench.errors import InputError, nearest
from workbench.tasks.base import Pair, Split, Stage, single_token_words
from workbench.tasks.drawing import distinct, fitting
from workbench.tasks.ioi import NAMES
from workbench.tasks.stories import (
    CONTAINERS,
    CONTENTS,
    INSTRUCTIONS,
    SETTINGS,
    THINGS,
    UNKNOWN,
    WORDINGS,
    BeliefStory,
    Scenario,
    Story,
    VisibilityStory,
    story_words,
)

Counterfactual = Literal["story", "order", "states", "visibility"]
Cell = tuple[int, int, bool, bool]
"""Of a visibility story: who is asked about, which container, whether the first sees, whether the second sees.
Of a false-belief story: the mover, who is asked about, whether the observer is present, and False."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lexicon:
    """The words of ours that are one token for a tokenizer."""

    names: tuple[str, ...]
    containers: tuple[str, ...]
    contents: tuple[str, ...]
    settings: tuple[str, ...]
    things: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any, fixed: tuple[str, ...]) -> "Lexicon":
        """Errors: `InputError` when too few are single tokens, or one of the `fixed` words is not."""
        lists = {"names": NAMES, "containers": CONTAINERS, "contents": CONTENTS, "settings": SETTINGS, "things": THINGS}
        known = {name: single_token_words(tokenizer, words) for name, words in lists.items()}
        missing = [word for word in fixed if not single_token_words(tokenizer, [word])]
        if (
            missing
            or len(known["settings"]) < 1
            or min(len(known[name]) for name in ("names", "containers", "contents", "things")) < 6
        ):
            counts = ", ".join(f"{len(words)} {name}" for name, words in known.items())
            raise InputError(
                "theory of mind needs six one-token names, containers, contents and things, and these words whole: "
                f"{', '.join(fixed)}. This "
                f"tokenizer has {counts} of ours and lacks {missing or 'no such word'}. Use a tokenizer with more "
                "whole words "
                "(`workbench.tasks.vocabulary.word_level_tokenizer` makes one from the tasks' own words)."
            )
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class TheoryOfMind:
    """The theory-of-mind task."""

    scenario: Scenario = "visibility"
    """`visibility` (four variants: neither, one, the other, both see) or `false_belief` (Sally and Anne)."""
    counterfactual: Counterfactual = "story"
    """What the corrupt prompt changes; see the module's docstring."""
    instruction: bool = False
    """Put the rules before the story and name "unknown" as an answer, for instruct models."""
    wording: int | None = None
    """One of the wordings by number, or None for all."""

    name: ClassVar[str] = "theory_of_mind"
    stages: ClassVar[tuple[Stage, ...]] = (Stage(name="A", title="answer", position="last"),)
    """No graph of heads is agreed on: the last stage alone. The paper ranks heads by mean ablation here."""
    words: ClassVar[tuple[str, ...]] = story_words()
    """Every word of the task, for a word-level vocabulary."""

    def __post_init__(self) -> None:
        for field, value, known in (
            ("scenario", self.scenario, get_args(Scenario)),
            ("counterfactual", self.counterfactual, get_args(Counterfactual)),
        ):
            if value not in known:
                raise InputError(f"theory of mind has no {field} {value!r}; {nearest(value, known)}")
        if self.wording is not None and not 0 <= self.wording < len(WORDINGS[self.scenario]):
            raise InputError(
                f"there is no wording {self.wording}; choose 0 to {len(WORDINGS[self.scenario]) - 1}, or None for all."
            )

    @property
    def chance(self) -> float:
        """Accuracy of naming one of the story's possible answers at random: two contents and "unknown", or two
        places."""
        return 1 / 2 if self.scenario == "false_belief" or self.counterfactual == "states" else 1 / 3

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        """`scenes` pairs, one question for each story. Errors: `InputError` for a tokenizer with too few whole
        words."""
        fixed = ("can", "cannot", UNKNOWN) if self.scenario == "visibility" else ("present", "absent")
        lexicon = Lexicon.of(tokenizer, fixed)
        draw = seeds.chooser(seed, self.name, self.scenario, self.counterfactual, str(self.instruction), split)
        cells, asked = _endless(draw, self.cells()), list[Cell]()

        def make(place: int) -> Pair:
            if place == len(asked):  # a repeated prompt is drawn again for the same cell
                asked.append(next(cells))
            return self._pair(draw, lexicon, asked[place], split)

        yield from distinct(make, scenes=scenes, key=lambda pair: pair.clean, what=f"{self.name} ({split})")

    def cells(self) -> list[Cell]:
        """One balanced cycle of questions: every answer of the scenario equally often, for each who, what and
        visibility."""
        flags = (False, True)
        if self.scenario == "false_belief":
            unseen = [(mover, 1 - mover, False, False) for mover in (0, 1)]
            decided = [(mover, 1 - mover, True, False) for mover in (0, 1)]
            if self.counterfactual == "visibility":
                return unseen + decided
            return 4 * unseen + 2 * decided + [(mover, mover, present, False) for mover in (0, 1) for present in flags]
        every = [(who, asked, one, two) for who in (0, 1) for asked in (0, 1) for one in flags for two in flags]
        own = [cell for cell in every if cell[0] == cell[1]]
        known = [cell for cell in every if cell[0] != cell[1] and cell[2 + cell[0]]]
        unknown = [cell for cell in every if cell[0] != cell[1] and not cell[2 + cell[0]]]
        match self.counterfactual:
            case "story":
                return own + 2 * known + 2 * unknown
            case "order":  # where neither sees the other, exchanging the two leaves "unknown" as it is
                return own + 2 * known + 4 * [cell for cell in unknown if cell[2] != cell[3]]
            case "states":
                return own + 2 * known
            case "visibility":
                return 2 * known + unknown

    def _pair(self, draw: random.Random, lexicon: Lexicon, cell: Cell, split: Split) -> Pair:
        story = self._story(draw, lexicon, cell, split)
        other = self._other(draw, lexicon, story, split)
        wording = draw.randrange(len(WORDINGS[self.scenario])) if self.wording is None else self.wording
        place, instruction = draw.choice(lexicon.settings), INSTRUCTIONS[self.scenario] if self.instruction else ""
        clean, spans = story.text(wording, place, instruction)
        return Pair(
            clean=clean,
            corrupt=other.text(wording, place, instruction)[0],
            answer=f" {story.believed}",
            distractor=f" {draw.choice([word for word in story.candidates if word != story.believed])}",
            positions=story.positions(clean, spans),
            corrupt_answer=f" {other.believed}",
            facts=_facts(story),
        )

    def _story(self, draw: random.Random, lexicon: Lexicon, cell: Cell, split: Split) -> Story:
        return fitting(
            lambda: self._any_story(draw, lexicon, cell),
            lambda story: story.split == split,
            what=f"{self.name} ({split})",
        )

    def _any_story(self, draw: random.Random, lexicon: Lexicon, cell: Cell) -> Story:
        characters = _two(draw, lexicon.names)
        if self.scenario == "visibility":
            objects, states, (who, asked, *sees) = _two(draw, lexicon.containers), _two(draw, lexicon.contents), cell
            return VisibilityStory(
                characters=characters,
                objects=objects,
                states=states,
                sees=(sees[0], sees[1]),
                who=characters[who],
                asked=objects[asked],
            )
        thing, states, (mover, who, present, _) = draw.choice(lexicon.things), _two(draw, lexicon.containers), cell
        return BeliefStory(
            characters=characters, mover=mover, thing=thing, states=states, present=present, who=characters[who]
        )

    def _other(self, draw: random.Random, lexicon: Lexicon, story: Story, split: Split) -> Story:
        """The story of the corrupt prompt: of the same split, with another answer."""
        return fitting(
            lambda: self._changed(draw, lexicon, story, split),
            lambda other: other.split == split and other.believed != story.believed,
            what=f"{self.name} ({split}), corrupt prompts",
        )

    def _changed(self, draw: random.Random, lexicon: Lexicon, story: Story, split: Split) -> Story:
        match self.counterfactual:
            case "story":
                return self._story(draw, lexicon, draw.choice(self.cells()), split)
            case "order" if isinstance(story, VisibilityStory):
                return replace(story, characters=story.characters[::-1], objects=story.objects[::-1])
            case "order":
                return replace(story, states=story.states[::-1])
            case "states":
                words = lexicon.contents if isinstance(story, VisibilityStory) else lexicon.containers
                return replace(story, states=_two(draw, tuple(word for word in words if word not in story.states)))
            case "visibility" if isinstance(story, VisibilityStory):
                who = story.characters.index(story.who)
                return replace(story, sees=(story.sees[0] != (who == 0), story.sees[1] != (who == 1)))
            case _:
                assert isinstance(story, BeliefStory)
                return replace(story, present=not story.present)


def _two(draw: random.Random, words: tuple[str, ...]) -> tuple[str, str]:
    first, second = draw.sample(words, 2)
    return first, second


def _endless(draw: random.Random, cells: list[Cell]) -> Iterator[Cell]:
    """The cells again and again, each time in another order."""
    while True:
        yield from draw.sample(cells, len(cells))


def _facts(story: Story) -> dict[str, int]:
    """What results may be broken down by: who sees, and whether the character acted itself."""
    if isinstance(story, VisibilityStory):
        return {"first_sees": int(story.sees[0]), "second_sees": int(story.sees[1]), "own": int(story.own)}
    return {"present": int(story.present), "own": int(story.who != story.observer)}
