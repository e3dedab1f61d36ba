"""Indirect object identification (Wang et al. 2022): who receives the thing?

    "When Mary and John went to the store, John gave a drink to" -> " Mary"

Half of the prompts name the indirect object first (ABBA), half the subject (BABA). The corrupt prompt is the clean one with three other names
(the "ABC" corruption): same template, place and object, nothing about who repeats. Splits are disjoint by the names: a pair of names belongs to
train, calibration or test by its SHA-256.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from workbench import seeds
from workbench.errors import InputError
from workbench.tasks.base import Pair, Split, Stage, single_token_words

NAMES = tuple(
    "Mary John Peter Paul James David Mark Tom Jane Laura Kate Anna Robert Michael Sarah Emma Daniel Alice George Henry Charles William Thomas "
    "Richard Joseph Helen Susan Linda Karen Lisa Nancy Betty Sandra Ashley Andrew Kevin Brian Edward Ronald Anthony Steven Adam Simon Martin".split()
)
PLACES = tuple("store garden office school park station market hospital library kitchen beach museum".split())
THINGS = tuple("drink book ball letter ring flower bone computer basket gift camera map".split())
TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "After {first} and {second} left the {place}, {subject} handed a {thing} to",
    "While {first} and {second} were at the {place}, {subject} sold a {thing} to",
    "Then, {first} and {second} met near the {place}, and {subject} passed a {thing} to",
    "As soon as {first} and {second} arrived at the {place}, {subject} brought a {thing} to",
)


def split_of(names: tuple[str, str]) -> Split:
    """The split of a pair of names: 60 % train, 20 % calibration, 20 % test, by SHA-256 of the unordered pair."""
    bucket = int.from_bytes(hashlib.sha256("|".join(sorted(names)).encode()).digest()[:4], "big") % 10
    return "train" if bucket < 6 else "calibration" if bucket < 8 else "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndirectObject:
    """The IOI task."""

    name: ClassVar[str] = "ioi"
    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(name="N", title="name mover", position="last"),
        Stage(name="S", title="S-inhibition", position="last", into="N", composition="q"),
        Stage(name="I", title="induction or duplicate token", position="subject_again", into="S", composition="v"),
        Stage(name="P", title="previous token", position="after_subject", into="I", composition="k"),
    )
    """Wang et al. 2022, figure 2, from the logits down; negative name movers show in the first stage with the other sign."""

    @property
    def chance(self) -> float:
        """Accuracy of naming one of the two names at random."""
        return 0.5

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        """`scenes` pairs, the order of the names in turns ABBA and BABA. Errors: `InputError` for a tokenizer with too few whole names."""
        names, places, things = (single_token_words(tokenizer, words) for words in (NAMES, PLACES, THINGS))
        if len(names) < 12 or not places or not things:
            raise InputError(
                f"IOI needs a dozen one-token names, places and things; this tokenizer has {len(names)}, {len(places)} and {len(things)} of ours."
            )
        draw, seen = seeds.chooser(seed, self.name, split), set()
        while len(seen) < scenes:
            pair = self._pair(draw, split, names, places, things, swapped=len(seen) % 2 == 1)
            if pair.clean not in seen:
                seen.add(pair.clean)
                yield pair

    def _pair(
        self, draw: random.Random, split: Split, names: tuple[str, ...], places: tuple[str, ...], things: tuple[str, ...], *, swapped: bool
    ) -> Pair:
        while True:
            subject, recipient, *others = draw.sample(names, 5)
            if split_of((subject, recipient)) == split:
                break
        words = {"place": draw.choice(places), "thing": draw.choice(things)}
        template = draw.choice(TEMPLATES)
        order = {"first": subject, "second": recipient} if swapped else {"first": recipient, "second": subject}
        clean = template.format(**order, subject=subject, **words)
        start, again = clean.index(f" {subject}") + 1, clean.rindex(f" {subject} ") + 1
        after = start + len(subject) + 1  # a space follows the name in every template
        return Pair(
            clean=clean,
            corrupt=template.format(first=others[0], second=others[1], subject=others[2], **words),
            answer=f" {recipient}",
            distractor=f" {subject}",
            positions={
                "recipient": ((clean.index(f" {recipient}") + 1, clean.index(f" {recipient}") + 1 + len(recipient)),),
                "subject": ((start, start + len(subject)),),
                "after_subject": ((after, after + 1),),
                "subject_again": ((again, again + len(subject)),),
            },
        )
