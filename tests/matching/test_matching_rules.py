"""Roles, combined distances, one to one, stability, noise and the influence-weighted alignment: by hand, against brute
force, and on models."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.conftest import entity_pairs
from workbench import seeds
from workbench.circuits.circuit import Circuit, Member
from workbench.errors import InputError
from workbench.experiment.recipe import parse_recipe
from workbench.matching import HeadMap, MatchingConfig, Rule, circuit_alignment, match_heads
from workbench.matching.aligned_pairs import aligned_pairs
from workbench.matching.head_similarity import all_head_similarity, head_similarities, head_similarity
from workbench.matching.noise import heads_within_noise
from workbench.matching.pair_cka import aligned_influence, pair_ckas
from workbench.matching.rules import assigned
from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.similarity.cka import linear_cka
from workbench.values.refs import Head
from workbench.values.scores import Scores

EXAMPLES = 12
SHAPE = (2, 4)


def circuit(**roles: str) -> Circuit:
    """`A="L0H0 L0H1"`: role -> heads."""
    members = [Member(Head.parse(head), role, "last") for role, heads in roles.items() for head in heads.split()]
    return Circuit.of(members, shape=SHAPE, method="given")


def profile(means: list[float], *, baseline: float, noise: float = 0.01, label: str = "noise") -> Scores:
    """Impacts of eight heads with exact means and some spread over examples."""
    spread = torch.randn(*SHAPE, EXAMPLES, generator=seeds.generator(0, label), dtype=torch.float64)
    values = torch.tensor(means, dtype=torch.float64).view(*SHAPE, 1) + noise * (spread - spread.mean(-1, keepdim=True))
    return Scores.of_heads(values, unit="fall of accuracy", baseline=baseline)


STUDENT = profile([0.1, 0.3, 0.5, 0.7, 0.2, 0.4, 0.6, 0.8], baseline=0.9)
TEACHER = profile([0.72, 0.31, 0.52, 0.11, 0.83, 0.64, 0.42, 0.21], baseline=0.9, label="teacher")
OURS, THEIRS = circuit(A="L0H0 L0H1 L0H2", B="L0H3"), circuit(A="L0H0 L0H1 L1H0", B="L0H3 L1H1")
SIMILARITY = Scores(
    values=torch.rand(4, 5, generator=seeds.generator(0, "similarity"), dtype=torch.float64),
    axes=("student", "teacher"),
    labels={"student": tuple(map(str, OURS.heads)), "teacher": tuple(map(str, THEIRS.heads))},
    unit="debiased CKA",
)


def matched(config: MatchingConfig, **changes: Any) -> HeadMap:
    given: dict[str, Any] = {
        "student": STUDENT,
        "teacher": TEACHER,
        "student_circuit": OURS,
        "teacher_circuit": THEIRS,
        "similarity": SIMILARITY,
    }
    return match_heads(**{**given, **changes}, config=config)


def names(head_map: HeadMap) -> dict[str, str]:
    return {str(ours): str(theirs) for ours, theirs in head_map.pairs}


@pytest.mark.parametrize("rule", get_args(Rule))
def test_every_rule_matches_many_to_one_and_one_to_one(rule: Any) -> None:
    combine: Any = {"similarity": 1.0, "profile": 0.5} if rule == "combined" else {}
    many, one = (matched(MatchingConfig(rule=rule, one_to_one=flag, combine=combine)) for flag in (False, True))
    assert (many.one_to_one, one.one_to_one) == (False, True)
    assert len(many.matches) == len(one.matches) == 4
    assert len(one.teacher_heads) == 4
    if rule not in ("random", "shuffled"):
        assert all(match.margin is None or match.margin >= 0 for match in many.matches), (
            "head by head, the nearest is taken"
        )
        assert len(many.teacher_heads) < 4 or many.pairs == one.pairs


def test_role_keeps_matches_inside_the_group() -> None:
    paper, role = matched(MatchingConfig()), matched(MatchingConfig(rule="role"))
    assert names(paper) == {"L0H0": "L0H3", "L0H1": "L0H1", "L0H2": "L1H1", "L0H3": "L0H0"}
    assert names(role) == {"L0H0": "L0H1", "L0H1": "L0H1", "L0H2": "L0H1", "L0H3": "L1H1"}
    assert role.matches[0].margin == pytest.approx(abs(0.1 - 0.72) - abs(0.1 - 0.31)), (
        "the runner-up is one of the same role"
    )
    by_similarity = matched(MatchingConfig(rule="role", combine={"similarity": 1.0}))
    inside = {"A": [0, 1, 3], "B": [2, 4]}  # places of the teacher's heads L0H0 L0H1 L0H3 L1H0 L1H1
    for place, (ours, theirs) in enumerate(by_similarity.pairs):
        candidates = inside[OURS.role_of(ours)]
        best = max(candidates, key=lambda column: float(SIMILARITY.values[place, column]))
        assert theirs == THEIRS.heads[best]


def test_role_leaves_out_what_has_no_counterpart() -> None:
    theirs = circuit(A="L0H0 L0H1", C="L1H1")
    role = matched(MatchingConfig(rule="role"), teacher_circuit=theirs)
    assert role.unmatched == (Head(0, 3),)
    assert "unmatched: L0H3" in role.summary()
    assert set(names(role).values()) == {"L0H1"}
    one = matched(MatchingConfig(rule="role", one_to_one=True), teacher_circuit=theirs)
    assert names(one) == {"L0H1": "L0H1", "L0H2": "L0H0"}, "as many as can be, at the least sum"
    assert one.unmatched == (Head(0, 0), Head(0, 3))
    assert HeadMap.from_json(one.to_json()) == one
    twice = circuit(A="L0H0", B="L0H0 L0H3")
    assert names(matched(MatchingConfig(rule="role"), student_circuit=twice))["L0H0"] == "L0H3", (
        "a head of two roles may go to either"
    )
    with pytest.raises(InputError, match="no role in common"):
        matched(MatchingConfig(rule="role"), teacher_circuit=circuit(X="L0H0"))


@pytest.mark.parametrize("seed", range(20))
def test_assignment_equals_brute_force(seed: int) -> None:
    draw = seeds.generator(seed, "assignment")
    distances, allowed = (
        torch.rand(4, 5, generator=draw, dtype=torch.float64) - 0.5,
        torch.rand(4, 5, generator=draw) > 0.5,
    )
    found = assigned(distances, allowed, one_to_one=True)
    best: tuple[int, float] = (0, 0.0)
    for size in range(5):
        for rows in itertools.combinations(range(4), size):
            for columns in itertools.permutations(range(5), size):
                if all(allowed[row, column] for row, column in zip(rows, columns, strict=True)):
                    cost = sum(float(distances[row, column]) for row, column in zip(rows, columns, strict=True))
                    best = min(best, (-size, cost))
    pairs = [(row, column) for row, column in enumerate(found) if column is not None]
    assert all(allowed[pair] for pair in pairs)
    assert (-len(pairs), sum(float(distances[pair]) for pair in pairs)) == pytest.approx(best)


def ranks(distances: Tensor) -> Tensor:
    flat = distances.flatten()
    return torch.stack([((flat < value).sum() + ((flat == value).sum() - 1) / 2) for value in flat]).view_as(
        distances
    ) / (len(flat) - 1)


@pytest.mark.parametrize("scale", ["rank", "minmax"])
def test_combined_distance_by_hand(scale: Any) -> None:
    ours, theirs = (
        torch.stack([p.at(head) for head in c.heads]).mean(-1) for p, c in ((STUDENT, OURS), (TEACHER, THEIRS))
    )
    impact, similarity = (ours[:, None] - theirs[None]).abs(), 1 - SIMILARITY.values
    scaled = [ranks(d) if scale == "rank" else (d - d.min()) / (d.max() - d.min()) for d in (impact, similarity)]
    expected = (2 * scaled[0] + 0.5 * scaled[1]) / 2.5
    found = matched(MatchingConfig(rule="combined", combine={"own_baseline": 2, "similarity": 0.5}, scale=scale))
    assert [THEIRS.heads.index(theirs) for _, theirs in found.pairs] == expected.argmin(1).tolist()
    assert [match.distance for match in found.matches] == pytest.approx(expected.min(1).values.tolist())


def test_combination_goes_over_into_its_parts() -> None:
    alone = {name: matched(MatchingConfig(rule=name)).pairs for name in ("own_baseline", "similarity")}  # type: ignore[arg-type]
    assert alone["own_baseline"] != alone["similarity"]
    for name, other in (("own_baseline", "similarity"), ("similarity", "own_baseline")):
        combine: Any = {name: 1e6, other: 1e-6}
        assert matched(MatchingConfig(rule="combined", combine=combine, scale="minmax")).pairs == alone[name]
        assert matched(MatchingConfig(rule="combined", combine={name: 3.0})).pairs == alone[name]  # type: ignore[dict-item]


def test_stability_is_one_where_impacts_are_far_apart_and_low_where_they_are_not() -> None:
    assert [match.stability for match in matched(MatchingConfig()).matches] == [1.0] * 4
    noisy = profile([0.72, 0.31, 0.52, 0.11, 0.83, 0.64, 0.42, 0.21], baseline=0.9, noise=0.3, label="noisy")
    blurred = matched(MatchingConfig(resamples=200), teacher=noisy)
    assert blurred.stability is not None
    assert blurred.stability < 0.8
    twins = TEACHER.values.clone()
    twins[0, 1], twins[0, 3] = twins[0, 3], twins[0, 3]
    spread = 0.1 * torch.randn(2, EXAMPLES, generator=seeds.generator(0, "twins"), dtype=torch.float64)
    twins[0, [1, 3]] += spread - spread.mean(-1, keepdim=True)
    coin = (
        matched(MatchingConfig(resamples=400), teacher=Scores.of_heads(twins, unit="x", baseline=0.9))
        .matches[0]
        .stability
    )
    assert coin is not None
    assert 0.3 < coin < 0.7, "two heads of one impact: either is chosen"
    assert matched(MatchingConfig(resamples=0)).stability is None
    assert matched(MatchingConfig(rule="random")).stability is None


def test_stability_equals_a_slow_loop_over_the_same_draws() -> None:
    noisy = profile([0.72, 0.31, 0.52, 0.11, 0.83, 0.64, 0.42, 0.21], baseline=0.9, noise=0.3, label="noisy")
    found = matched(MatchingConfig(rule="own_baseline", resamples=30, one_to_one=True), teacher=noisy, seed=5)
    same = torch.zeros(4)
    for draw in range(30):
        rows = torch.randint(0, EXAMPLES, (EXAMPLES,), generator=seeds.generator(5, "bootstrap", draw))
        sides = [Scores.of_heads(p.values[..., rows], unit="x", baseline=0.9) for p in (STUDENT, noisy)]
        again = match_heads(*sides, OURS, THEIRS, MatchingConfig(rule="own_baseline", one_to_one=True, resamples=0))
        same += torch.tensor([a == b for a, b in zip(again.pairs, found.pairs, strict=True)])
    assert [match.stability for match in found.matches] == pytest.approx((same / 30).tolist())
    assert len(set(same.tolist())) > 1


def test_impacts_within_noise_are_flagged_dropped_or_refused() -> None:
    teacher = profile([0.72, 0.31, 0.52, 0.0, 0.83, 0.64, 0.42, 0.21], baseline=0.9, noise=0.1, label="teacher")
    student = profile([0.0, 0.3, 0.5, 0.7, 0.2, 0.4, 0.6, 0.8], baseline=0.9, noise=0.1)
    flagged = matched(MatchingConfig(), student=student, teacher=teacher)
    assert [match.noise for match in flagged.matches] == [("student", "teacher"), (), (), ()]
    assert flagged.within_noise == 1
    assert "within noise: L0H0" in flagged.summary()
    dropped = matched(MatchingConfig(noise="drop"), student=student, teacher=teacher)
    assert dropped.unmatched == (Head(0, 0),)
    assert Head(0, 3) not in dropped.teacher_heads
    assert dropped.within_noise == 0
    assert dropped.pairs == flagged.pairs[1:]
    with pytest.raises(
        InputError, match=r"1 of 4 matches.*L0H0 ~ L0H3 \(student and teacher\).*more discovery prompts"
    ):
        matched(MatchingConfig(noise="refuse"), student=student, teacher=teacher)
    assert matched(MatchingConfig(noise="refuse")).pairs == matched(MatchingConfig()).pairs
    silent = profile([0.0] * 8, baseline=0.9)
    with pytest.raises(InputError, match="leaves nothing to match"):
        matched(MatchingConfig(noise="drop"), student=silent)


def test_the_interval_has_its_level_on_heads_without_effect() -> None:
    values = torch.randn(40, 50, EXAMPLES, generator=seeds.generator(0, "null"), dtype=torch.float64)
    null = Scores.of_heads(values, unit="x", baseline=0.9)
    assert len(heads_within_noise(null, 0.95)) / 2000 == pytest.approx(0.95, abs=0.015)
    assert len(heads_within_noise(null, 0.5)) / 2000 == pytest.approx(0.5, abs=0.035)
    assert not heads_within_noise(Scores.of_heads(values + 5, unit="x", baseline=0.9), 0.95)


def test_json_holds_the_new_facts_and_old_files_still_load() -> None:
    head_map = matched(
        MatchingConfig(resamples=20), teacher=profile([0.7, 0.3, 0.5, 0.0, 0.8, 0.6, 0.4, 0.2], baseline=0.9, noise=0.2)
    )
    value = head_map.to_json()
    assert HeadMap.from_json(value) == head_map
    assert value["teacher_heads_used"] == len(head_map.teacher_heads)
    assert value["within_noise"] == head_map.within_noise > 0
    assert value["stability"] == pytest.approx(sum(m["stability"] for m in value["matches"]) / 4)
    old = {
        "matches": [{"student": "L0H0", "teacher": "L0H3", "distance": 0.1, "margin": None}],
        "rule": "paper",
        "one_to_one": False,
        "teacher_heads_used": 1,
        "ties": 0,
    }
    loaded = HeadMap.from_json(old)
    assert loaded.matches[0].stability is None
    assert loaded.matches[0].noise == ()
    assert loaded.unmatched == ()
    assert HeadMap.from_json(loaded.to_json()) == loaded


def test_configuration_refuses_what_does_not_fit() -> None:
    for matching, match in (
        ({"rule": "combined"}, "combine"),
        ({"rule": "paper", "combine": {"profile": 1.0}}, "one distance"),
        ({"rule": "combined", "combine": {"random": 1.0}}, "combine"),
        ({"rule": "combined", "combine": {"profile": -1.0}}, "combine"),
    ):
        with pytest.raises(InputError, match=match):
            parse_recipe({"teacher": "x", "matching": matching})
    recipe = parse_recipe(
        {
            "teacher": "x",
            "matching": {"rule": "combined", "combine": {"similarity": 1, "profile": 0.5}, "noise": "drop"},
        }
    )
    assert recipe.matching.combine == {"similarity": 1.0, "profile": 0.5}


def test_influence_weighted_alignment_by_hand() -> None:
    head_map = matched(MatchingConfig())  # L0H0~L0H3, L0H1~L0H1, L0H2~L1H1, L0H3~L0H0
    similarity = dict(zip(head_map.pairs, [0.9, 0.5, 0.2, 1.0], strict=True))
    found = circuit_alignment(head_map, similarity, STUDENT, TEACHER)
    ours, theirs = [v / 0.8 for v in (0.1, 0.3, 0.5, 0.7)], [v / 0.83 for v in (0.11, 0.31, 0.64, 0.72)]
    expected = [s * (1 - abs(a - b)) for s, a, b in zip([0.9, 0.5, 0.2, 1.0], ours, theirs, strict=True)]
    assert [pair.value for pair in found.pairs] == pytest.approx(expected)
    assert found.value == pytest.approx(sum(expected) / 4)
    assert found.value < 0.65 - 1e-3, "the influences matter"
    assert circuit_alignment(head_map, dict.fromkeys(head_map.pairs, 0.0), STUDENT, TEACHER).value == 0
    same = match_heads(STUDENT, STUDENT, OURS, OURS, MatchingConfig())
    assert circuit_alignment(same, dict.fromkeys(same.pairs, 1.0), STUDENT, STUDENT).value == pytest.approx(1)
    louder = Scores.of_heads(3 * STUDENT.values, unit="x", baseline=0.9)
    assert circuit_alignment(same, dict.fromkeys(same.pairs, 1.0), STUDENT, louder).value == pytest.approx(1), (
        "influence is relative to its model"
    )
    silent = Scores.of_heads(torch.zeros_like(STUDENT.values), unit="x", baseline=0.9)
    assert circuit_alignment(same, dict.fromkeys(same.pairs, 1.0), silent, silent).value == 1
    with pytest.raises(InputError, match="every matched pair"):
        circuit_alignment(head_map, {}, STUDENT, TEACHER)
    with pytest.raises(InputError, match="no heads"):
        circuit_alignment(HeadMap(matches=(), rule="paper", one_to_one=False), {}, STUDENT, TEACHER)
    holes = STUDENT.values.clone()
    holes[0, 1] = torch.nan
    with pytest.raises(InputError, match="L0H1"):
        circuit_alignment(head_map, similarity, Scores.of_heads(holes, unit="x"), TEACHER)


def test_similarity_on_some_prompts_is_that_of_those_prompts_and_gives_stability(
    load_teacher: Callable[..., Teacher],
) -> None:
    student, teacher, prompts = (
        load_teacher("llama", seed=3),
        load_teacher("llama"),
        entity_pairs(split="test", scenes=8),
    )
    everyone = Circuit.of(
        (Member(head, "A", "labels" if head.layer else "last") for head in teacher.heads), shape=(3, 4), method="all"
    )
    for measure in ("linear_cka", "procrustes"):
        similarities = head_similarities(student, teacher, prompts, everyone, everyone, measure=measure)  # type: ignore[arg-type]
        some = torch.tensor([1, 4, 5, 9, 10, 17, 20])
        part = head_similarity(student, teacher, prompts.rows(some), everyone, everyone, measure=measure)  # type: ignore[arg-type]
        torch.testing.assert_close(similarities(some).values, part.values)
        whole = similarities(torch.arange(len(prompts)))
        assert (whole.values - part.values).abs().max() > 1e-2
    impacts = Scores.of_heads(
        torch.rand(3, 4, len(prompts), generator=seeds.generator(0, "impacts")), unit="x", baseline=0.9
    )
    config = MatchingConfig(rule="similarity", resamples=10)
    own = head_similarities(teacher, teacher, prompts, everyone, everyone)
    same = match_heads(
        impacts, impacts, everyone, everyone, config, similarity=own(torch.arange(len(prompts))), similarities=own
    )
    assert all(ours == theirs for ours, theirs in same.pairs)
    assert same.stability == 1
    strangers = head_similarities(student, teacher, prompts, everyone, everyone)
    other = match_heads(
        impacts,
        impacts,
        everyone,
        everyone,
        config,
        similarity=strangers(torch.arange(len(prompts))),
        similarities=strangers,
    )
    assert other.stability is not None
    assert other.stability < 0.95, "unrelated models: which head is nearest depends on the prompts"
    unmeasured = match_heads(impacts, impacts, everyone, everyone, config, similarity=own(torch.arange(len(prompts))))
    assert unmeasured.stability is None


def test_all_heads_of_two_models_in_one_call(load_teacher: Callable[..., Teacher]) -> None:
    student, teacher, prompts = (
        load_teacher("gpt2", layers=2),
        load_teacher("llama"),
        entity_pairs(split="test", scenes=8),
    )
    scores = all_head_similarity(student, teacher, prompts, position="labels")
    where = prompts.position("labels")
    z = [
        model.activations(prompts.clean, prompts.mask, [hooks.z(layer) for layer in range(model.n_layers)])[1]
        for model in (student, teacher)
    ]
    for ours in student.heads:
        for theirs in teacher.heads:
            x, y = (
                found[hooks.z(head.layer)][:, :, head.index][where]
                for found, head in zip(z, (ours, theirs), strict=True)
            )
            expected = float(linear_cka(x, y, estimator="debiased"))
            assert float(scores.select(student=str(ours), teacher=str(theirs)).values) == pytest.approx(
                expected, abs=1e-5
            )
    assert scores.values.shape == (8, 12)
    assert scores.values.std() > 1e-2
    patterns = all_head_similarity(teacher, teacher, prompts, activation="pattern", measure="attention_kl")
    torch.testing.assert_close(patterns.values.diagonal(), torch.ones(12))
    with pytest.raises(InputError, match="activation: pattern"):
        all_head_similarity(teacher, teacher, prompts, measure="attention_kl")


def test_influence_of_a_model_with_itself(load_teacher: Callable[..., Teacher]) -> None:
    teacher, prompts = load_teacher("llama"), entity_pairs(split="test", scenes=8)
    everyone = Circuit.of((Member(head, "A", "last") for head in teacher.heads), shape=(3, 4), method="all")
    impacts = Scores.of_heads(torch.rand(3, 4, 24, generator=seeds.generator(0, "impacts")), unit="x", baseline=0.9)
    head_map = match_heads(impacts, impacts, everyone, everyone, MatchingConfig(rule="profile"))
    ckas = pair_ckas(teacher, teacher, prompts, aligned_pairs(head_map, everyone, everyone, prompts))
    found, floor = aligned_influence(head_map, ckas, impacts, impacts)
    assert found.value == pytest.approx(1, abs=1e-5)
    assert abs(floor) < 0.2


def test_heads_are_aligned_at_more_places_than_they_act_at(load_teacher: Callable[..., Teacher]) -> None:
    """Broadened, a pair's CKA is that of its rows at all labels, gathered by hand; a pair with other positions keeps
    them."""
    teacher, prompts = load_teacher("llama"), entity_pairs(split="test", scenes=8)
    binder, fetcher, stranger = Head(0, 1), Head(1, 0), Head(0, 3)
    circuit = Circuit.of(
        (Member(binder, "V", "earlier_label"), Member(fetcher, "A", "last")), shape=(3, 4), method="given"
    )
    impacts = Scores.of_heads(torch.rand(3, 4, 24, generator=seeds.generator(1, "impacts")), unit="x", baseline=0.9)
    matched = match_heads(impacts, impacts, circuit, circuit, MatchingConfig(rule="profile"))
    partners = {
        binder: stranger,
        fetcher: fetcher,
    }  # a control's partner outside the circuit is read where the student's head is
    head_map = replace(
        matched, matches=tuple(replace(match, teacher=partners[match.student]) for match in matched.matches)
    )
    pairs = aligned_pairs(head_map, circuit, circuit, prompts, broadened={"earlier_label": "labels"})
    read = {pair.student: (pair.student_positions, pair.teacher_positions) for pair in pairs}
    assert read == {binder: (("labels",), ("labels",)), fetcher: (("last",), ("last",))}
    found = {cka.pair.student: cka for cka in pair_ckas(teacher, teacher, prompts, pairs)}
    z, where = teacher.activations(prompts.clean, prompts.mask, [hooks.z(0)])[1][hooks.z(0)], prompts.position("labels")
    expected = linear_cka(z[:, :, 1][where], z[:, :, 3][where], estimator="debiased")
    assert found[binder].cka == pytest.approx(float(expected), abs=1e-5)
    assert found[binder].rows == 3 * len(prompts)
    narrow = aligned_pairs(head_map, circuit, circuit, prompts)
    assert abs(pair_ckas(teacher, teacher, prompts, narrow)[0].cka - float(expected)) > 1e-3
