"""From two circuits to matched heads in one call, with the CKA of each pair and what shuffled prompts give."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from typing_extensions import TypedDict, Unpack

from workbench.circuits.circuit import Circuit
from workbench.circuits.search_result import CircuitSearch, circuit_of
from workbench.errors import InputError, nearest
from workbench.matching.aligned_pairs import AlignedPair, aligned_pairs, is_own
from workbench.matching.config import Compared, Distance, MatchingConfig, Rule
from workbench.matching.head_map import HeadMap
from workbench.matching.head_similarity import head_similarities
from workbench.matching.pair_cka import PairCka, floor_warning, pair_ckas
from workbench.matching.rules import match_heads
from workbench.models.hooked_model import HookedModel, Student, Teacher
from workbench.patching.ablation import ablate
from workbench.patching.reference import require_model, require_pairs
from workbench.similarity.measures import Measure
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import require_same_words
from workbench.values.metrics import METRICS, Metric, metric_named
from workbench.values.scores import Scores
from workbench.values.settings import configured
from workbench.values.tables import html_table, number, text_table


class MatchSettings(TypedDict, total=False):
    """What of a matching can be set besides its rule; see `MatchingConfig`."""

    metric: str | Metric
    """Of the impacts; `log_probability` unless set (the paper's accuracy has few levels, so that many heads tie)."""
    one_to_one: bool
    combine: dict[Distance, float]
    scale: Literal["rank", "minmax"]
    measure: Measure
    compared: Compared
    noise: Literal["flag", "drop", "refuse"]
    confidence: float
    resamples: int
    seed: int
    """Of the controls `random` and `shuffled`, and of the resamples."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matching:
    """Student heads and their teacher heads, where each pair is read, and how alike it is there."""

    head_map: HeadMap
    ours: Circuit
    """The student's circuit."""
    theirs: Circuit
    """The teacher's."""
    pairs: tuple[AlignedPair, ...]
    """Each match with the positions at which both heads are read."""
    positions: str
    """`own`, or the one position at which all are read."""
    ckas: tuple[PairCka, ...]
    """Debiased CKA of each pair, with the floor that shuffled prompts give."""
    impacts: Mapping[Literal["student", "teacher"], Scores]
    """Ablation impacts of both circuits' heads, [layer head example]."""

    @property
    def files(self) -> dict[str, Any]:
        """Head map and circuits as JSON values by file name, for whoever shares the student."""
        return shared_files(self.head_map, self.ours, self.theirs)

    @property
    def mean_cka(self) -> float:
        """Mean CKA of the pairs."""
        return sum(each.cka for each in self.ckas) / len(self.ckas)

    @property
    def floor(self) -> float:
        """The same with the prompts shuffled."""
        return sum(each.floor for each in self.ckas) / len(self.ckas)

    @property
    def warning(self) -> str | None:
        """Why alignment will probably hurt: the pairs' CKA is at its floor. None where it is not."""
        return floor_warning(self.ckas)

    @property
    def _title(self) -> str:
        own, *beside = self.positions.split("+")
        place = " and ".join(["at their own positions", *beside]) if own == "own" else f"at {self.positions}"
        return f"{self.head_map.summary()}; read {place}"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
        rows = [
            (
                str(match.student),
                self.ours.role_of(match.student),
                str(match.teacher),
                self.theirs.role_of(match.teacher),
                number(match.distance),
                number(cka.cka, 2),
                number(cka.floor, 2),
                "" if not match.noise else f"impact within noise: {', '.join(match.noise)}",
            )
            for match, cka in zip(self.head_map.matches, self.ckas, strict=True)
        ]
        return ("student", "role", "teacher", "role", "distance", "CKA", "floor", "note"), rows, self._title

    def __repr__(self) -> str:
        head, rows, title = self._table()
        return text_table(head, rows, title=title) + ("" if self.warning is None else f"\n{self.warning}")

    def _repr_html_(self) -> str:
        head, rows, title = self._table()
        return html_table(head, rows, title=title)


def shared_files(head_map: HeadMap | None, ours: Circuit, theirs: Circuit | None) -> dict[str, Any]:
    """JSON values by the file name under which a student's folder holds them; without a head map where nothing was
    aligned, and without the teacher's circuit where it was not loaded."""
    return {
        **({} if head_map is None else {HeadMap.FILE: head_map.to_json()}),
        "student_circuit.json": ours.to_json(),
        **({} if theirs is None else {"teacher_circuit.json": theirs.to_json()}),
    }


def match(
    student: Student,
    teacher: Teacher,
    ours: Circuit | CircuitSearch,
    theirs: Circuit | CircuitSearch,
    pairs: PromptPairs,
    *,
    rule: Rule = "paper",
    positions: str | None = None,
    **settings: Unpack[MatchSettings],
) -> Matching:
    """Match every head of the student's circuit to a head of the teacher's.

    `rule`: `paper` (eq 5: equal ablated performance), `similarity` (CKA of the heads' outputs), ..., and the controls
    `random` and `shuffled`; see `MatchingConfig`. Impacts are of mean ablation over the pairs' corrupt prompts.
    `positions`: where pairs are read, `own` (where each head acts in its circuit), `own+last` (there and at a named
    position), or a named position (`last` is the paper's). None: `own`, but `last` where a head acts at all positions
    (circuits of mean ablation), for over whole prompts CKA sees mostly what all prompts share. Errors: `InputError` for
    an unknown rule, setting or position, an empty circuit, one of another model, and pairs in one model's tokens alone.
    """
    require_model(student, Student, role="student")
    require_model(teacher, Teacher, role="teacher")
    require_pairs(pairs, student, teacher)
    circuits = circuit_of(ours, student), circuit_of(theirs, teacher)
    config, metric, seed = _config(rule, dict(settings))
    if positions is None:
        everywhere = any(member.position == "all" for each in circuits for member in each.members)
        positions = "last" if everywhere else "own"
    named = positions.removeprefix("own").removeprefix("+") if is_own(positions) else positions
    if named:
        pairs.position(named)
    empty = next((name for name, each in zip(("student", "teacher"), circuits, strict=True) if not each.heads), None)
    if empty is not None:
        raise InputError(f"the {empty}'s circuit is empty: lower `least_effect` of find_circuit, or use more pairs.")
    impacts: dict[Literal["student", "teacher"], Scores] = {
        "student": ablate(student, pairs, heads=circuits[0].heads, metric=metric),
        "teacher": ablate(teacher, pairs, heads=circuits[1].heads, metric=metric),
    }
    similarities = None
    if "similarity" in config.distances:
        similarities = head_similarities(
            student, teacher, pairs, *circuits, measure=config.measure, positions=positions, compared=config.compared
        )
    head_map = match_heads(
        impacts["student"],
        impacts["teacher"],
        *circuits,
        config,
        seed=seed,
        similarity=None if similarities is None else similarities(torch.arange(len(pairs))),
        similarities=similarities,
    )
    return matching_of(student, teacher, head_map, circuits, pairs, positions=positions, impacts=impacts)


def matching_of(
    student: HookedModel,
    teacher: HookedModel,
    head_map: HeadMap,
    circuits: tuple[Circuit, Circuit],
    pairs: PromptPairs,
    *,
    positions: str,
    impacts: Mapping[Literal["student", "teacher"], Scores],
) -> Matching:
    """A head map with the positions and the CKA of its pairs on these prompts."""
    aligned = aligned_pairs(head_map, *circuits, pairs, positions=positions)
    ckas = tuple(pair_ckas(student, teacher, pairs, aligned))
    return Matching(
        head_map=head_map,
        ours=circuits[0],
        theirs=circuits[1],
        pairs=aligned,
        positions=positions,
        ckas=ckas,
        impacts=impacts,
    )


def pairs_of(matching: Matching | HeadMap, prompts: PromptPairs, positions: str | None) -> tuple[AlignedPair, ...]:
    """Each match with the positions at which it is read on these prompts: None = as it was matched (of a bare
    `HeadMap`: `last`), or a named position for all. Errors: `InputError` for `own` positions of a bare `HeadMap`."""
    if isinstance(matching, Matching):
        if positions is None:
            return matching.pairs
        return aligned_pairs(matching.head_map, matching.ours, matching.theirs, prompts, positions=positions)
    if positions is not None and is_own(positions):
        raise InputError("a bare HeadMap does not know where its heads act; give what `match` returns, or a position.")
    place = positions or "last"
    require_same_words(prompts, [place], [place])
    return tuple(
        AlignedPair(student=ours, teacher=theirs, student_positions=(place,), teacher_positions=(place,))
        for ours, theirs in matching.pairs
    )


def _config(rule: Rule, settings: dict[str, Any]) -> tuple[MatchingConfig, Metric, int]:
    known = MatchSettings.__annotations__
    for name in settings:
        if name not in known:
            raise InputError(f"match has no setting {name!r}; {nearest(name, known)}")
    metric, seed = metric_named(settings.pop("metric", "log_probability")), settings.pop("seed", 0)
    named = {"metric": metric.name} if metric.name in METRICS else {}
    return configured(MatchingConfig, {"rule": rule, **named, **settings}, call="match"), metric, seed
