'''Docstring completion (Heimersheim & Janiak 2023, in our own words): which argument comes next?

    def load(self, size, path, text, mode, user, rate):
        """The oil column piece

        :param path: dark gold
        :param text: side rice
        :param
    -> " mode"

The documentation goes through the arguments in their order, but need not begin with the first: the answer is the
argument after the last documented one, and stands at any of the last four places equally often (in the original it
always stands at the same place, which a rule about places finds). The corrupt prompt has other names in the definition,
in the documentation, or (default) in both, without a relation between the two.'''

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from workbench import seeds
from workbench.errors import InputError, nearest
from workbench.tasks.base import Pair, Split, Stage, single_token_words
from workbench.tasks.drawing import distinct, fitting
from workbench.tasks.wording import fill, split_by_hash, words_of

ARGUMENTS, DOCUMENTED = 6, 2
NAMES = tuple(
    "size load name index value list data key path text image model state time order type count line color date level "
    "group page user role table field "
    "node edge mode unit area rate cost price width height depth speed point score weight".split()
)
PROSE = tuple(
    "oil column piece dark gold side rice wood river cloud stone bird winter music water silver field sand paper "
    "grain".split()
)
TEMPLATE = (
    "def {function}(self, {a0}, {a1}, {a2}, {a3}, {a4}, {a5}):\n"
    '    """The {w0} {w1} {w2}\n\n    :param {d0}: {w3} {w4}\n    :param {d1}: {w5} {w6}\n    :param'
)
Corruption = Literal["both", "definition", "documentation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Docstring:
    """The docstring task."""

    corruption: Corruption = "both"
    """Where the corrupt prompt has other names."""

    name: ClassVar[str] = "docstring"
    stages: ClassVar[tuple[Stage, ...]] = (Stage(name="A", title="argument mover", position="last"),)
    words: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys([*words_of(TEMPLATE.replace('"', ' " ')), *NAMES, *PROSE]))
    """Every word of the task, for a word-level vocabulary."""

    def __post_init__(self) -> None:
        if self.corruption not in get_args(Corruption):
            raise InputError(
                f"docstring has no corruption {self.corruption!r}; {nearest(self.corruption, get_args(Corruption))}"
            )

    @property
    def chance(self) -> float:
        """Accuracy of naming one of the arguments that are at the place of the answer equally often."""
        return 1 / (ARGUMENTS - DOCUMENTED)

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        """`scenes` pairs. Errors: `InputError` for a tokenizer with too few whole words."""
        names, prose = single_token_words(tokenizer, NAMES), single_token_words(tokenizer, PROSE)
        if len(names) < 4 * ARGUMENTS or len(prose) < 7:
            raise InputError(
                f"docstring needs {4 * ARGUMENTS} one-token argument names and 7 other words; this tokenizer has "
                f"{len(names)} and {len(prose)} of ours. "
                "Use a tokenizer with more whole words."
            )
        draw = seeds.chooser(seed, self.name, self.corruption, split)
        yield from distinct(
            lambda place: self._pair(draw, split, names, prose, first=place % (ARGUMENTS - DOCUMENTED)),
            scenes=scenes,
            key=lambda pair: pair.clean,
            what=f"{self.name} ({split})",
        )

    def _pair(
        self, draw: random.Random, split: Split, names: tuple[str, ...], prose: tuple[str, ...], *, first: int
    ) -> Pair:
        """A pair whose documentation begins with the argument of number `first`."""
        function, *arguments = fitting(
            lambda: draw.sample(names, 1 + ARGUMENTS),
            lambda words: split_by_hash(words[1:]) == split,
            what=f"{self.name} ({split})",
        )
        others = draw.sample([name for name in names if name not in (function, *arguments)], ARGUMENTS + DOCUMENTED)
        next_one = first + DOCUMENTED
        fixed = {"function": function, **{f"w{number}": word for number, word in enumerate(draw.sample(prose, 7))}}
        documented = arguments[first:next_one]
        clean, spans = fill(TEMPLATE, **fixed, **_numbered("a", arguments), **_numbered("d", documented))
        corrupt, _ = fill(
            TEMPLATE,
            **fixed,
            **_numbered("a", arguments if self.corruption == "documentation" else others[:ARGUMENTS]),
            **_numbered("d", documented if self.corruption == "definition" else others[ARGUMENTS:]),
        )
        return Pair(
            clean=clean,
            corrupt=corrupt,
            answer=f" {arguments[next_one]}",
            distractor=f" {draw.choice([a for i, a in enumerate(arguments) if i != next_one and i >= DOCUMENTED])}",
            positions={
                "definition_answer": spans[f"a{next_one}"],
                "definition_previous": spans[f"a{next_one - 1}"],
                "definition": tuple(spans[f"a{number}"][0] for number in range(ARGUMENTS)),
                "documented": (*spans["d0"], *spans["d1"]),
                "documented_last": spans["d1"],
            },
            facts={"place": next_one},
        )


def _numbered(letter: str, words: list[str]) -> dict[str, str]:
    return {f"{letter}{number}": word for number, word in enumerate(words)}
