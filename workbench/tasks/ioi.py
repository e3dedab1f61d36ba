"""Indirect object identification (Wang et al. 2022): who receives the thing?

    "When Mary and John went to the store, John gave a drink to" -> " Mary"

Half of the prompts name the indirect object first (ABBA), half the subject (BABA). The corrupt prompt keeps template,
place and object:
- `abc`: three other names, so that nothing says who repeats (no right answer; the default);
- `flipped`: the other name repeats ("..., Mary gave a drink to"), so that the right answer is the clean prompt's
  subject;
- `random`: two other names in the same pattern, so that the right answer is another name;
- `swapped`: the first two names change places (ABBA <-> BABA), and the right answer stays: what moves is where it
  stands.
Splits are disjoint by the names: a pair of names belongs to train, calibration or test by its SHA-256.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from workbench import seeds
from workbench.errors import InputError, nearest
from workbench.tasks.base import Pair, Split, Stage, single_token_words
from workbench.tasks.drawing import distinct, fitting
from workbench.tasks.wording import words_of

NAMES = tuple(
    "Mary John Peter Paul James David Mark Tom Jane Laura Kate Anna Robert Michael Sarah Emma Daniel Alice George "
    "Henry Charles William Thomas "
    "Richard Joseph Helen Susan Linda Karen Lisa Nancy Betty Sandra Ashley Andrew Kevin Brian Edward Ronald Anthony "
    "Steven Adam Simon Martin".split()
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

Corruption = Literal["abc", "flipped", "random", "swapped"]
Order = Literal["both", "abba", "baba"]


def split_of(names: tuple[str, str]) -> Split:
    """The split of a pair of names: 60 % train, 20 % calibration, 20 % test, by SHA-256 of the unordered pair."""
    return seeds.split(names, train=6, calibration=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndirectObject:
    """The IOI task."""

    corruption: Corruption = "abc"
    """What the corrupt prompt changes; see the module's docstring."""
    order: Order = "both"
    """`abba` names the indirect object first, `baba` the subject; `both` takes turns."""
    template: int | None = None
    """One of the templates by number (prompts of one length, where all words are one token), or None for all."""

    name: ClassVar[str] = "ioi"
    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(name="N", title="name mover", position="last"),
        Stage(name="S", title="S-inhibition", position="last", into="N", composition="q"),
        Stage(name="I", title="induction or duplicate token", position="subject_again", into="S", composition="v"),
        Stage(name="P", title="previous token", position="after_subject", into="I", composition="k"),
    )
    """Wang et al. 2022, figure 2, from the logits down; negative name movers show in the first stage with the other
    sign."""
    words: ClassVar[tuple[str, ...]] = tuple(
        dict.fromkeys([*(word for text in TEMPLATES for word in words_of(text)), *NAMES, *PLACES, *THINGS])
    )
    """Every word of the task, for a word-level vocabulary."""

    def __post_init__(self) -> None:
        for field, value, known in (
            ("corruption", self.corruption, get_args(Corruption)),
            ("order", self.order, get_args(Order)),
        ):
            if value not in known:
                raise InputError(f"IOI has no {field} {value!r}; {nearest(value, known)}")
        if self.template is not None and not 0 <= self.template < len(TEMPLATES):
            raise InputError(
                f"there is no template {self.template}; choose 0 to {len(TEMPLATES) - 1}, or None for all."
            )

    @property
    def keeps_answer(self) -> bool:
        """Whether the corrupt prompt has the clean prompt's answer."""
        return self.corruption == "swapped"

    @property
    def chance(self) -> float:
        """Accuracy of naming one of the two names at random."""
        return 0.5

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        """`scenes` pairs, the order of the names in turns ABBA and BABA. Errors: `InputError` for a tokenizer with too
        few whole names."""
        names, places, things = (single_token_words(tokenizer, words) for words in (NAMES, PLACES, THINGS))
        if len(names) < 12 or not places or not things:
            raise InputError(
                f"IOI needs a dozen one-token names, places and things; this tokenizer has {len(names)}, {len(places)} "
                f"and {len(things)} of ours."
            )
        draw = seeds.chooser(seed, self.name, split)

        def make(place: int) -> Pair:
            swapped = place % 2 == 1 if self.order == "both" else self.order == "baba"
            return self._pair(draw, split, names, places, things, swapped=swapped)

        yield from distinct(make, scenes=scenes, key=lambda pair: pair.clean, what=f"{self.name} ({split})")

    def _pair(
        self,
        draw: random.Random,
        split: Split,
        names: tuple[str, ...],
        places: tuple[str, ...],
        things: tuple[str, ...],
        *,
        swapped: bool,
    ) -> Pair:
        subject, recipient, *others = fitting(
            lambda: draw.sample(names, 5),
            lambda five: split_of((five[0], five[1])) == split,
            what=f"{self.name} ({split})",
        )
        words = {"place": draw.choice(places), "thing": draw.choice(things)}
        template = draw.choice(TEMPLATES) if self.template is None else TEMPLATES[self.template]
        order = {"first": subject, "second": recipient} if swapped else {"first": recipient, "second": subject}
        clean = template.format(**order, subject=subject, **words)
        corrupt, corrupt_answer = self._corrupt(draw, order, subject, names, others)
        start, again = clean.index(f" {subject}") + 1, clean.rindex(f" {subject} ") + 1
        after = start + len(subject) + 1  # a space follows the name in every template
        return Pair(
            clean=clean,
            corrupt=template.format(**corrupt, **words),
            answer=f" {recipient}",
            distractor=f" {subject}",
            positions={
                "recipient": ((clean.index(f" {recipient}") + 1, clean.index(f" {recipient}") + 1 + len(recipient)),),
                "subject": ((start, start + len(subject)),),
                "after_subject": ((after, after + 1),),
                "subject_again": ((again, again + len(subject)),),
            },
            corrupt_answer=corrupt_answer,
        )

    def _corrupt(
        self, draw: random.Random, order: dict[str, str], subject: str, names: tuple[str, ...], others: list[str]
    ) -> tuple[dict[str, str], str | None]:
        """The names of the corrupt prompt, and its right answer where it has one."""
        recipient = order["first"] if order["second"] == subject else order["second"]
        match self.corruption:
            case "abc":
                return {"first": others[0], "second": others[1], "subject": others[2]}, None
            case "flipped":
                return {**order, "subject": recipient}, f" {subject}"
            case "swapped":
                return {"first": order["second"], "second": order["first"], "subject": subject}, f" {recipient}"
            case "random":
                new, home = others[:2], split_of((subject, recipient))
                if split_of((new[0], new[1])) != home:
                    new = fitting(
                        lambda: draw.sample([name for name in names if name not in (subject, recipient)], 2),
                        lambda two: split_of((two[0], two[1])) == home,
                        what=f"{self.name} ({home})",
                    )
                renamed = {subject: new[0], recipient: new[1]}
                return {**{place: renamed[name] for place, name in order.items()}, "subject": new[0]}, f" {new[1]}"
