"""Entity tracking with state changes (after Kim & Schuster 2023, in our own words): what is in the queried box after
all operations?

    "The apple is in Box F, Box Q is empty, the cup is in Box C. Move the apple from Box F to Box Q.
     Remove the cup from Box C. What is in Box Q?
     Answer:" -> " apple"

A box holds one thing or nothing, so that an answer is one token: things are moved and put into empty boxes only. One or
two boxes are empty at any time, and empty boxes are asked about as often as any single full one, so that no word is
right more often than `chance`. The corrupt prompt has the same sentences with other things and labels, and asks about a
letter of neither scene. Prompts differ in length with the operations: use `per_position_means: false`, or `fewest` =
`most` and as few kinds of operation as that leaves.

`facts` of each pair: `operations` (all of them) and `touching` (those that name the queried box);
`workbench.tasks.breakdown` makes the table.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from workbench import seeds
from workbench.errors import InputError
from workbench.tasks.base import Pair, Split, Stage, single_token_words
from workbench.tasks.drawing import distinct, fitting
from workbench.tasks.entity_tracking import LABELS, OBJECTS
from workbench.tasks.wording import fill, split_by_hash, words_of

NOTHING = "nothing"
SPARE = 3
"""Things of a scene beyond one for each box: what is put in may be new or have been removed before."""
IN_BOX, EMPTY = "the {{o{thing}}} is in Box {{b{box}}}", "Box {{b{box}}} is empty"
MOVE, PUT, REMOVE = (
    "Move the {{o{thing}}} from Box {{b{box}}} to Box {{b{to}}}.",
    "Put the {{o{thing}}} into Box {{b{box}}}.",
    "Remove the {{o{thing}}} from Box {{b{box}}}.",
)
QUESTION, COMPLETION = "What is in Box {query}? Answer:", "Box {query} contains the"
WORDS = tuple(
    dict.fromkeys(
        word
        for text in (
            *(sentence.format(thing=0, box=0, to=0) for sentence in (IN_BOX, EMPTY, MOVE, PUT, REMOVE)),
            QUESTION,
            COMPLETION,
        )
        for word in words_of(text)
    )
)

Contents = tuple[int | None, ...]
"""The thing (by number) in each box, None for an empty one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A scene before any word is chosen: boxes and things are numbers."""

    template: str
    """The description and the operations, with fields `o<thing>` and `b<box>`."""
    contents: Contents
    """At the end."""
    touching: tuple[int, ...]
    """How many operations name each box."""
    operations: int


def history(draw: random.Random, boxes: int, operations: int) -> History:
    """A random scene with one or two empty boxes, and so many operations that keep it at one or two."""
    contents: list[int | None] = [*range(boxes)]
    for box in draw.sample(range(boxes), draw.choice((1, 2))):
        contents[box] = None
    clauses = [
        EMPTY.format(box=box) if thing is None else IN_BOX.format(thing=thing, box=box)
        for box, thing in enumerate(contents)
    ]
    description = ", ".join(clauses)
    sentences, touching = [f"{description[0].upper()}{description[1:]}."], [0] * boxes
    for _ in range(operations):
        sentence, touched = _operate(draw, contents)
        sentences.append(sentence)
        for box in touched:
            touching[box] += 1
    return History(
        template=" ".join(sentences), contents=tuple(contents), touching=tuple(touching), operations=operations
    )


def _operate(draw: random.Random, contents: list[int | None]) -> tuple[str, tuple[int, ...]]:
    """One operation, done to `contents`; returns its sentence and the boxes that it names."""
    empty = [box for box, thing in enumerate(contents) if thing is None]
    kind = draw.choice(("move", "remove" if len(empty) == 1 else "put"))
    if kind == "put":
        box, thing = (
            draw.choice(empty),
            draw.choice([thing for thing in range(len(contents) + SPARE) if thing not in contents]),
        )
        contents[box] = thing
        return PUT.format(thing=thing, box=box), (box,)
    box = draw.choice([box for box in range(len(contents)) if box not in empty])
    thing, contents[box] = contents[box], None
    if kind == "remove":
        return REMOVE.format(thing=thing, box=box), (box,)
    to = draw.choice(empty)
    contents[to] = thing
    return MOVE.format(thing=thing, box=box, to=to), (box, to)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityOperations:
    """Entity tracking with operations."""

    boxes: int = 5
    """4 to 9."""
    fewest: int = 0
    """Fewest operations of a scene."""
    most: int = 12
    """Most operations of a scene; each number from `fewest` to `most` is drawn equally often."""
    empty: bool = True
    """Ask about empty boxes too (answer "nothing", in the form of a question); False: full boxes only, in the words of
    `entity_tracking`."""

    name: ClassVar[str] = "entity_operations"
    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(name="A", title="value fetcher", position="last"),
        Stage(name="B", title="position transmitter", position="last", into="A", composition="q"),
        Stage(name="C", title="position detector", position="query_label", into="B", composition="v"),
        Stage(name="D", title="structure reader", position="latest_label", into="C", composition="v"),
    )
    """Those of plain entity tracking, the last at the latest mention of the queried label: a place to begin, not a
    published circuit."""
    words: ClassVar[tuple[str, ...]] = ("The", NOTHING, *WORDS, *LABELS, *OBJECTS)
    """Every word of the task, for a word-level vocabulary."""

    def __post_init__(self) -> None:
        if not 4 <= self.boxes <= 9:
            raise InputError(
                f"entity tracking with operations has 4 to 9 boxes, not {self.boxes}; set `boxes` within that range."
            )
        if not 0 <= self.fewest <= self.most <= 12:
            raise InputError(
                f"operations go from 0 to 12, not {self.fewest} to {self.most}; set `fewest` and `most` within that "
                "range."
            )

    @property
    def chance(self) -> float:
        """Accuracy of naming one thing of the full boxes (or "nothing") at random, where fewest are full."""
        return 1 / (self.boxes - 1 if self.empty else self.boxes - 2)

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        """`scenes` pairs, one query for each scene. Errors: `InputError` for a tokenizer with too few whole words."""
        things, labels = single_token_words(tokenizer, OBJECTS), single_token_words(tokenizer, LABELS)
        needed = (NOTHING, "empty") if self.empty else ("empty",)
        missing = [word for word in (*needed, "from", "to", "into") if not single_token_words(tokenizer, [word])]
        if missing or len(things) < 2 * (self.boxes + SPARE) or len(labels) < 2 * self.boxes + 1:
            raise InputError(
                f"{self.boxes} boxes with operations need {2 * (self.boxes + SPARE)} one-token objects and "
                f"{2 * self.boxes + 1} one-token labels; this "
                f"tokenizer has {len(things)} and {len(labels)} of ours and lacks {missing or 'no other word'}. Use "
                "fewer boxes or another tokenizer."
            )
        draw = seeds.chooser(seed, self.name, self.boxes, self.fewest, self.most, str(self.empty), split)
        yield from distinct(
            lambda _: self._pair(draw, split, things, labels),
            scenes=scenes,
            key=lambda pair: pair.clean,
            what=f"{self.name} ({split})",
        )

    def _pair(self, draw: random.Random, split: Split, things: tuple[str, ...], labels: tuple[str, ...]) -> Pair:
        scene = history(draw, self.boxes, draw.randint(self.fewest, self.most))
        asked = self.asked(draw, scene.contents)
        words = scene_words(draw, scene, split, things, labels)
        others = scene_words(
            draw, scene, split, *([word for word in pool if word not in words.values()] for pool in (things, labels))
        )
        stranger = draw.choice(
            [label for label in labels if label not in words.values() and label not in others.values()]
        )
        template = f"{scene.template} {QUESTION if self.empty else COMPLETION}"
        clean, spans = fill(template, **words, query=words[f"b{asked}"])
        answer = scene.contents[asked]
        wrong = [words[f"o{thing}"] for thing in scene.contents if thing not in (None, answer)]
        mentions = sorted(spans[f"b{asked}"])
        return Pair(
            clean=clean,
            corrupt=fill(template, **others, query=stranger)[0],
            answer=f" {NOTHING if answer is None else words[f'o{answer}']}",
            distractor=f" {draw.choice(wrong)}",
            positions={
                "query_label": spans["query"],
                "earlier_label": tuple(mentions),
                "latest_label": (mentions[-1],),
                "labels": tuple(sorted(span for field, places in spans.items() if field[0] == "b" for span in places)),
                "objects": tuple(sorted(span for field, places in spans.items() if field[0] == "o" for span in places)),
            },
            facts={"operations": scene.operations, "touching": scene.touching[asked]},
        )

    def asked(self, draw: random.Random, contents: Contents) -> int:
        """The queried box: each full one, and all empty ones together, equally likely."""
        full = [box for box, thing in enumerate(contents) if thing is not None]
        if self.empty and draw.randrange(len(full) + 1) == 0:
            return draw.choice([box for box, thing in enumerate(contents) if thing is None])
        return draw.choice(full)


def scene_words(
    draw: random.Random, scene: History, split: Split, things: Sequence[str], labels: Sequence[str]
) -> dict[str, str]:
    """A word for each thing and box, such that the scene is of the split."""
    boxes = len(scene.contents)

    def make() -> dict[str, str]:
        words = {f"o{number}": word for number, word in enumerate(draw.sample(things, boxes + SPARE))}
        return words | {f"b{number}": word for number, word in enumerate(draw.sample(labels, boxes))}

    return fitting(
        make,
        lambda words: split_by_hash(f"{field}:{word}" for field, word in words.items()) == split,
        what=f"entity operations ({split})",
    )
