"""Entity tracking (Prakash et al. 2024; METHOD section of the paper): which object is in the queried box?

    "The apple is in Box F, the computer is in Box Q. Box F contains the" -> " apple"

Objects are distinct one-token nouns, labels are distinct capital letters, and each scene is queried at each of its
boxes (or at some). The corrupt prompt is another scene (no object or label in common) whose query names a letter of
neither scene: it keeps the form and length of the clean prompt and carries none of its information.

Splits are disjoint by construction: a scene (as a set of object-label pairs) belongs to train, calibration or test by
its SHA-256, whatever the seed or the size of the sample.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from workbench import seeds
from workbench.errors import InputError
from workbench.tasks.base import Pair, Span, Split, Stage, single_token_words
from workbench.tasks.drawing import distinct, fitting

OBJECTS = tuple(
    "apple ball bag bell boat bomb bone book boot bottle bread brick bus cake camera card chain chair clock coat "
    "coffee computer cross "
    "cup dish disk dress drum egg engine fan file flag flower fork game gift glass guitar hat key knife lamp letter "
    "magazine map "
    "medicine milk mirror note paper pen phone picture pipe plane plant plate pot radio".split()
)
LABELS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

Scene = tuple[tuple[str, str], ...]
"""(object, label) of each box, in the order of the text."""


def split_of(scene: Scene) -> Split:
    """The split that a scene belongs to: 80 % train, 10 % calibration, 10 % test, by SHA-256 of the unordered scene."""
    return seeds.split(f"{thing}:{label}" for thing, label in scene)


def draw_scene(
    draw: random.Random,
    boxes: int,
    split: Split,
    *,
    exclude: Scene = (),
    objects: tuple[str, ...] = OBJECTS,
    labels: tuple[str, ...] = LABELS,
) -> Scene:
    """A scene of a split, sharing no object or label with `exclude`."""
    used = {word for pair in exclude for word in pair}
    things = [thing for thing in objects if thing not in used]
    letters = [label for label in labels if label not in used]
    return fitting(
        lambda: tuple(zip(draw.sample(things, boxes), draw.sample(letters, boxes), strict=True)),
        lambda scene: split_of(scene) == split,
        what=f"entity tracking ({split})",
    )


def context(scene: Scene) -> str:
    """The sentence that describes a scene, with its full stop."""
    clauses = ", ".join(f"the {thing} is in Box {label}" for thing, label in scene)
    return f"{clauses[0].upper()}{clauses[1:]}."


def prompt(scene: Scene, label: str) -> str:
    """The description of a scene and a query for the box with this label."""
    return f"{context(scene)} Box {label} contains the"


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityTracking:
    """The entity-tracking task with a number of boxes (3 to 9; the paper uses 7)."""

    boxes: int = 7
    """Boxes in each scene; chance accuracy is one in `boxes`."""
    queries: int | None = None
    """Boxes of each scene that are asked for, at random; None: each of them."""

    name: ClassVar[str] = "entity_tracking"
    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(name="A", title="value fetcher", position="last"),
        Stage(name="B", title="position transmitter", position="last", into="A", composition="q"),
        Stage(name="C", title="position detector", position="query_label", into="B", composition="v"),
        Stage(name="D", title="structure reader", position="earlier_label", into="C", composition="v"),
    )
    """The backward search of Prakash et al. 2024: each stage's heads act at `position` and write into the stage
    `into`."""
    words: ClassVar[tuple[str, ...]] = (".", ",", *LABELS, "The", "the", "is", "in", "Box", "contains", *OBJECTS)
    """Every word of the task, for a word-level vocabulary."""

    def __post_init__(self) -> None:
        if not 3 <= self.boxes <= 9:
            raise InputError(f"entity tracking has 3 to 9 boxes, not {self.boxes}; set `boxes` within that range.")
        if self.queries is not None and not 1 <= self.queries <= self.boxes:
            raise InputError(
                f"{self.queries} of {self.boxes} boxes can't be asked for; set `queries` within 1 and {self.boxes}, or "
                "leave it out for all."
            )

    @property
    def chance(self) -> float:
        """Accuracy of naming one of the objects in the context at random."""
        return 1 / self.boxes

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        """`scenes * queries` pairs: each scene of the split queried at each of its boxes (or at some), in words that
        are one token for the tokenizer."""
        words, labels = single_token_words(tokenizer, OBJECTS), single_token_words(tokenizer, LABELS)
        if len(words) < 2 * self.boxes or len(labels) < 2 * self.boxes + 1:
            raise InputError(
                f"{self.boxes} boxes need {2 * self.boxes} one-token objects and {2 * self.boxes + 1} one-token "
                "labels; this tokenizer has "
                f"{len(words)} and {len(labels)} of ours. Use fewer boxes or a tokenizer with more whole words."
            )
        draw = seeds.chooser(seed, self.name, self.boxes, split)
        for scene in distinct(
            lambda _: draw_scene(draw, self.boxes, split, objects=words, labels=labels),
            scenes=scenes,
            key=frozenset,
            what=f"{self.name} ({split})",
        ):
            asked = range(self.boxes) if self.queries is None else draw.sample(range(self.boxes), self.queries)
            yield from (self._pair(draw, scene, index, split, words, labels) for index in asked)

    def _pair(
        self,
        draw: random.Random,
        scene: Scene,
        index: int,
        split: Split,
        words: tuple[str, ...],
        labels: tuple[str, ...],
    ) -> Pair:
        thing, label = scene[index]
        other = draw_scene(draw, self.boxes, split, exclude=scene, objects=words, labels=labels)
        used = {letter for _, letter in (*scene, *other)}
        stranger = draw.choice([letter for letter in labels if letter not in used])
        clean = prompt(scene, label)
        return Pair(
            clean=clean,
            corrupt=prompt(other, stranger),
            answer=f" {thing}",
            distractor=f" {draw.choice([word for word, _ in scene if word != thing])}",
            positions=_positions(clean, scene, index),
        )


def _positions(text: str, scene: Scene, index: int) -> dict[str, tuple[Span, ...]]:
    """Character spans of the words that the method names, in the clean prompt (the corrupt prompt has the same
    form)."""
    labels = tuple(_span(text, f" Box {label}", label) for _, label in scene)
    objects = tuple(_span(text.lower(), f"the {thing} is", thing) for thing, _ in scene)
    query = text.rindex(" Box ") + len(" Box ")
    return {
        "query_label": ((query, query + len(scene[index][1])),),
        "earlier_label": (labels[index],),
        "labels": labels,
        "object": (objects[index],),
        "objects": objects,
    }


def _span(text: str, phrase: str, word: str) -> Span:
    start = text.index(phrase) + phrase.rindex(f" {word}") + 1
    return start, start + len(word)
