"""`HeadMap`: which teacher head each student head goes to, and what there is to know about each match; JSON both
ways."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from workbench.errors import InputError
from workbench.matching.config import Rule
from workbench.storage import read_typed
from workbench.storage.hub import Artefact
from workbench.values.refs import Head
from workbench.values.tables import html_table, number, text_table

Side = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A student head and its teacher head, the distance of their impacts, and how much farther the runner-up is."""

    student: Head
    teacher: Head
    distance: float | None
    """None for the controls, which measure nothing."""
    margin: float | None
    """Distance of the second-best teacher head minus this one's; 0 is a tie, None where there is no second."""
    stability: float | None = None
    """Share of resamples of the prompts in which the same teacher head is chosen; None where none were drawn."""
    noise: tuple[Side, ...] = ()
    """Whose ablation impact can't be told from 0 (its confidence interval holds 0): the match rests on noise there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMap(Artefact):
    """Student heads -> teacher heads."""

    FILE: ClassVar[str] = "head_map.json"

    matches: tuple[Match, ...]
    rule: Rule
    one_to_one: bool
    unmatched: tuple[Head, ...] = ()
    """Heads of the student's circuit left without a match: no teacher head of their role (or none left, one to one), or
    impact within noise."""

    def __post_init__(self) -> None:
        if len({match.student for match in self.matches}) != len(self.matches):
            raise InputError("a student head is matched twice; a head map has one match for each student head.")

    @property
    def pairs(self) -> tuple[tuple[Head, Head], ...]:
        """(student head, teacher head) of each match."""
        return tuple((match.student, match.teacher) for match in self.matches)

    @property
    def teacher_heads(self) -> tuple[Head, ...]:
        """The distinct teacher heads in use: few of them is the collapse of scalar matching."""
        return tuple(sorted({match.teacher for match in self.matches}))

    @property
    def ties(self) -> int:
        """Matches whose runner-up is equally near: chosen by order, not by impact."""
        return sum(match.margin == 0 for match in self.matches)

    @property
    def stability(self) -> float | None:
        """Mean stability of the matches; None where none was measured."""
        known = [match.stability for match in self.matches if match.stability is not None]
        return sum(known) / len(known) if known else None

    @property
    def within_noise(self) -> int:
        """Matches in which a head's impact can't be told from 0."""
        return sum(bool(match.noise) for match in self.matches)

    def summary(self) -> str:
        """What there is to know about the whole map, in one line."""
        remarks = [f"rule {self.rule}", f"{self.ties} ties"]
        if self.stability is not None:
            remarks.append(f"{self.stability:.0%} of matches come out again on resampled prompts")
        if self.within_noise:
            noisy = [str(match.student) for match in self.matches if match.noise]
            remarks.append(
                f"{self.within_noise} rest on impacts within noise: "
                f"{', '.join(noisy[:6])}{', ...' if len(noisy) > 6 else ''}"
            )
        if self.unmatched:
            remarks.append(f"unmatched: {', '.join(map(str, self.unmatched))}")
        return (
            f"matched {len(self.matches)} student heads to {len(self.teacher_heads)} teacher heads "
            f"({'; '.join(remarks)})"
        )

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        rows = [
            (
                str(match.student),
                str(match.teacher),
                number(match.distance),
                number(match.margin),
                number(match.stability, 2),
                "" if not match.noise else f"impact within noise: {', '.join(match.noise)}",
            )
            for match in self.matches
        ]
        return ("student", "teacher", "distance", "margin", "stability", "note"), rows

    def __repr__(self) -> str:
        return text_table(*self._table(), title=self.summary())

    def _repr_html_(self) -> str:
        return html_table(*self._table(), title=self.summary())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back. The counts and means beside the matches are for the
        reader."""
        return {
            "matches": [_match_to_json(match) for match in self.matches],
            "rule": self.rule,
            "one_to_one": self.one_to_one,
            "unmatched": [str(head) for head in self.unmatched],
            "teacher_heads_used": len(self.teacher_heads),
            "ties": self.ties,
            "stability": self.stability,
            "within_noise": self.within_noise,
        }

    @classmethod
    def from_json(cls, value: Any) -> "HeadMap":
        """Read what `to_json` gave, now or before stability, noise and unmatched heads were kept. Errors: `InputError`
        on anything else."""
        beside = ("teacher_heads_used", "ties", "stability", "within_noise")
        what = "a head map (matches with student, teacher, distance, margin; rule; one_to_one)"
        return read_typed(value, cls, what=what, beside=beside)


def _match_to_json(match: Match) -> dict[str, Any]:
    return {
        "student": str(match.student),
        "teacher": str(match.teacher),
        "distance": match.distance,
        "margin": match.margin,
        "stability": match.stability,
        "noise": list(match.noise),
    }
