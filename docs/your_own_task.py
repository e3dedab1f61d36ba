"""A template for a task of your own: which colour is the named thing? Copy it, change the words, declare it, check it.

1. Write a frozen dataclass with `name`, `stages`, `chance` and `pairs`, as below. `pairs` draws from
   `seeds.chooser(seed, ...)` alone, takes only words that are one token for the tokenizer, keeps clean and corrupt of
   equal length, and draws the splits from disjoint scenes (`split_by_hash`).
2. Declare it in your package's pyproject.toml and install the package (`pip install -e .`); nothing in the workbench
   changes:

       [project.entry-points."workbench.tasks"]
       colours = "your_package.your_own_task:Colours"

3. `workbench check-task colours --tokenizer PATH_OF_YOUR_MODEL` names what is wrong; in a test:
   `assert check(Colours(), tokenizer).sound`.
4. `data: {task: colours, options: {things: 4}}` in a recipe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from workbench import seeds
from workbench.errors import InputError
from workbench.tasks.base import Pair, Split, Stage, single_token_words
from workbench.tasks.drawing import distinct
from workbench.tasks.wording import fill, split_by_hash, words_of

THINGS = tuple("cup hat book ball key lamp coat bag".split())
COLOURS = tuple("red blue green white black brown yellow pink".split())
CLAUSE, QUESTION = "The {thing} is {colour}.", "The colour of the {asked} is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Colours:
    """ "The cup is red. The hat is blue. The book is green. The colour of the hat is" -> " blue"."""

    things: int = 3
    """Things in each scene: an option that a recipe can set."""

    name: ClassVar[str] = "colours"
    stages: ClassVar[tuple[Stage, ...]] = (Stage(name="A", title="colour fetcher", position="last"),)
    """From the logits down: which heads write into which, and at which named position they act. `last` is always
    there."""
    words: ClassVar[tuple[str, ...]] = (*words_of(CLAUSE), *words_of(QUESTION), *THINGS, *COLOURS)
    """Optional: every word, so that a word-level tokenizer for small models can be made of them."""

    @property
    def chance(self) -> float:
        """Accuracy of naming one of the scene's colours at random; no rule about mentions may beat it."""
        return 1 / self.things

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        """`scenes` pairs; the corrupt prompt gives the things other colours."""
        things, colours = single_token_words(tokenizer, THINGS), single_token_words(tokenizer, COLOURS)
        if len(things) < self.things or len(colours) < 2 * self.things:
            raise InputError(
                f"colours needs {self.things} one-token things and {2 * self.things} colours; use a tokenizer with "
                "more whole words."
            )
        draw = seeds.chooser(seed, self.name, self.things, split)

        def make(place: int) -> Pair | None:
            named, painted = draw.sample(things, self.things), draw.sample(colours, 2 * self.things)
            if split_by_hash(f"{thing}:{colour}" for thing, colour in zip(named, painted, strict=False)) != split:
                return None  # the scene belongs to another split, whatever the seed
            asked = place % self.things  # in turns: no place is right more often than another
            template = " ".join(f"The {{thing{i}}} is {{colour{i}}}." for i in range(self.things)) + f" {QUESTION}"
            words = {f"thing{i}": thing for i, thing in enumerate(named)} | {"asked": named[asked]}
            clean, spans = fill(template, **words, **{f"colour{i}": painted[i] for i in range(self.things)})
            corrupt, _ = fill(template, **words, **{f"colour{i}": painted[self.things + i] for i in range(self.things)})
            return Pair(
                clean=clean,
                corrupt=corrupt,
                answer=f" {painted[asked]}",
                distractor=f" {painted[(asked + 1) % self.things]}",
                corrupt_answer=f" {painted[self.things + asked]}",
                positions={"thing": spans[f"thing{asked}"], "colour": spans[f"colour{asked}"], "asked": spans["asked"]},
            )

        # ends with an error where the task has fewer scenes than are asked for
        yield from distinct(make, scenes=scenes, key=lambda pair: pair.clean, what=f"{self.name} ({split})")
