"""The stories of the theory-of-mind task: words, wordings, and what a character believes.

Two scenarios. *Visibility* (the structure of CausalToM, Prakash et al. 2025, in words of our own): two characters fill
a container each, and each can or cannot see the other; a character knows what it did and what it saw, and nothing else.
*False belief* (Sally and Anne, Baron-Cohen et al. 1985): both see where a thing is put; then one moves it while the
other is present or absent.

All wordings of a scenario have the same number of words, so that prompts of different wordings line up token by token
where each word is a token.
"""

from dataclasses import dataclass
from typing import Literal

from workbench.tasks.base import Span
from workbench.tasks.ioi import NAMES
from workbench.tasks.wording import Spans, fill, split_by_hash, words_of

UNKNOWN = "unknown"
CONTAINERS = tuple(
    "box jar bag bottle cup pot tin basket bowl bucket barrel chest drawer tank tube flask case sack".split()
)
CONTENTS = tuple(
    "rice sugar salt flour sand water milk oil tea coffee juice soup honey ink paint soap corn wheat coal gold silver "
    "butter cream wine beer pepper "
    "cotton wool grain".split()
)
SETTINGS = tuple(
    "kitchen market garden station office school hospital library museum harbor farm factory village camp".split()
)
THINGS = tuple("ball key coin book ring watch hat letter cake toy knife pen doll lamp map phone".split())

VISIBILITY = (
    "At the {place}, {first} and {second} work side by side. {first} takes a closed {object_1} and fills it with "
    "{state_1}. Then {second} takes a "
    "closed {object_2} and fills it with {state_2}. {first} {sees_1} see what {second} does. {second} {sees_2} see "
    "what {first} does. "
    "What does {who} think the {asked} holds? Answer:",
    "In the {place}, {first} and {second} prepare for a feast. {first} picks a covered {object_1} and packs it with "
    "{state_1}. Later {second} picks a "
    "covered {object_2} and packs it with {state_2}. {first} {sees_1} watch how {second} works. {second} {sees_2} "
    "watch how {first} works. "
    "What does {who} believe the {asked} hides? Answer:",
    "Near the {place}, {first} and {second} sort goods for sale. {first} lifts a sealed {object_1} and loads it with "
    "{state_1}. Next {second} lifts a "
    "sealed {object_2} and loads it with {state_2}. {first} {sees_1} notice anything {second} does. {second} {sees_2} "
    "notice anything {first} does. "
    "What does {who} suppose the {asked} has? Answer:",
)
FALSE_BELIEF = (
    "At the {place}, {first} and {second} work side by side. Both see {mover} put the {thing} in the {state_1}. "
    "{observer} is {presence} while {mover} "
    "moves the {thing} to the {state_2}. {who} thinks that the {thing} is in the",
    "In the {place}, {first} and {second} prepare for a feast. Both watch {mover} lay the {thing} in the {state_1}. "
    "{observer} is {presence} when {mover} "
    "shifts the {thing} to the {state_2}. {who} believes that the {thing} is in the",
    "Near the {place}, {first} and {second} sort goods for sale. Both notice {mover} hide the {thing} in the "
    "{state_1}. {observer} is {presence} as {mover} "
    "brings the {thing} to the {state_2}. {who} assumes that the {thing} is in the",
)
INSTRUCTIONS = {
    "visibility": "Read the story and answer with one word. A person knows what they did and what they saw, and "
    "nothing else. If a person does not "
    "know the answer, say unknown.\n\nStory: ",
    "false_belief": "Read the story and complete its last sentence with one word. A person believes what they saw "
    "last.\n\nStory: ",
}
Scenario = Literal["visibility", "false_belief"]
WORDINGS: dict[str, tuple[str, ...]] = {"visibility": VISIBILITY, "false_belief": FALSE_BELIEF}


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibilityStory:
    """Two characters, what each fills with what, whether each sees the other, and a question about a character and a
    container."""

    characters: tuple[str, str]
    objects: tuple[str, str]
    states: tuple[str, str]
    sees: tuple[bool, bool]
    """Whether the first sees the second, and the second the first."""
    who: str
    """The character asked about."""
    asked: str
    """The container asked about."""

    @property
    def own(self) -> bool:
        """Whether the character filled the container itself."""
        return self.characters.index(self.who) == self.objects.index(self.asked)

    @property
    def believed(self) -> str:
        """What the character takes to be in the container: its content if it filled it or saw it filled, else
        "unknown"."""
        knows = self.own or self.sees[self.characters.index(self.who)]
        return self.states[self.objects.index(self.asked)] if knows else UNKNOWN

    @property
    def candidates(self) -> tuple[str, ...]:
        """The answers that the story allows."""
        return (*self.states, UNKNOWN)

    @property
    def split(self) -> str:
        """The split, by all its names, containers and contents."""
        return split_by_hash((*self.characters, *self.objects, *self.states))

    def text(self, wording: int, place: str, instruction: str) -> tuple[str, Spans]:
        """The prompt in a wording, with the spans of its fields."""
        first, second = self.characters
        words = {
            "object_1": self.objects[0],
            "object_2": self.objects[1],
            "state_1": self.states[0],
            "state_2": self.states[1],
        }
        seen = {"sees_1": can(self.sees[0]), "sees_2": can(self.sees[1])}
        return fill(
            instruction + VISIBILITY[wording],
            first=first,
            second=second,
            place=place,
            who=self.who,
            asked=self.asked,
            **words,
            **seen,
        )

    def positions(self, text: str, spans: Spans) -> dict[str, tuple[Span, ...]]:
        """The words that a circuit of this task may act at, as characters of the prompt."""
        who, asked = self.characters.index(self.who), self.objects.index(self.asked)
        states = (spans["state_1"][0], spans["state_2"][0])
        sight = spans[f"sees_{who + 1}"][0]
        return {
            "query_character": spans["who"],
            "query_object": spans["asked"],
            "character": (spans["first" if who == 0 else "second"][1],),
            "object": (spans[f"object_{asked + 1}"][0],),
            "state": (states[asked],),
            "other_state": (states[1 - asked],),
            "states": states,
            "visibility": ((text.rindex(". ", 0, sight[0]) + 2, text.index(".", sight[1]) + 1),),
            "visibility_word": (sight,),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BeliefStory:
    """A thing that one character moves from a container to another while the other is present or absent."""

    characters: tuple[str, str]
    mover: int
    """Which of the two moves the thing; the other is the observer."""
    thing: str
    states: tuple[str, str]
    """The container where it is put first and the one where it goes."""
    present: bool
    who: str

    @property
    def observer(self) -> str:
        """The character who does not move the thing."""
        return self.characters[1 - self.mover]

    @property
    def believed(self) -> str:
        """Where the character takes the thing to be: an absent observer has not seen it move."""
        return self.states[0] if self.who == self.observer and not self.present else self.states[1]

    @property
    def candidates(self) -> tuple[str, ...]:
        """The answers that the story allows."""
        return self.states

    @property
    def split(self) -> str:
        """The split, by its names, thing and containers."""
        return split_by_hash((*self.characters, self.thing, *self.states))

    def text(self, wording: int, place: str, instruction: str) -> tuple[str, Spans]:
        """The prompt in a wording, with the spans of its fields."""
        names = {
            "first": self.characters[0],
            "second": self.characters[1],
            "mover": self.characters[self.mover],
            "observer": self.observer,
        }
        words = {
            "state_1": self.states[0],
            "state_2": self.states[1],
            "presence": "present" if self.present else "absent",
        }
        return fill(instruction + FALSE_BELIEF[wording], place=place, thing=self.thing, who=self.who, **names, **words)

    def positions(self, text: str, spans: Spans) -> dict[str, tuple[Span, ...]]:
        """The words that a circuit of this task may act at, as characters of the prompt."""
        states = (spans["state_1"][0], spans["state_2"][0])
        believed, presence = self.states.index(self.believed), spans["presence"][0]
        return {
            "query_character": spans["who"],
            "query_object": (spans["thing"][-1],),
            "character": (spans["observer"][0] if self.who == self.observer else spans["mover"][1],),
            "object": (spans["thing"][0],),
            "state": (states[believed],),
            "other_state": (states[1 - believed],),
            "states": states,
            "visibility": ((spans["observer"][0][0], presence[1]),),
            "visibility_word": (presence,),
        }


Story = VisibilityStory | BeliefStory


def can(sees: bool) -> str:
    return "can" if sees else "cannot"


def story_words() -> tuple[str, ...]:
    """Every word that a story of either scenario may hold, for a word-level vocabulary."""
    templates = (*VISIBILITY, *FALSE_BELIEF, *INSTRUCTIONS.values())
    fixed = [word for template in templates for word in words_of(template)]
    return tuple(
        dict.fromkeys(
            [*fixed, "can", "cannot", "present", "absent", UNKNOWN, *NAMES, *CONTAINERS, *CONTENTS, *SETTINGS, *THINGS]
        )
    )
