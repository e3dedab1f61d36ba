"""Matching by ablation impact: the paper's rule by hand, the other rules, the controls, and a permuted student matched
back."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import entity_pairs
from workbench import seeds
from workbench.circuits.circuit import Circuit, Member, random_circuit
from workbench.errors import InputError
from workbench.matching import HeadMap, MatchingConfig, match_heads
from workbench.matching.aligned_pairs import aligned_pairs
from workbench.matching.config import Compared
from workbench.matching.distances import DISTANCES, Evidence
from workbench.matching.head_similarity import head_similarity
from workbench.matching.pair_cka import floor_warning, pair_ckas
from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablation_profiles, reference_means
from workbench.values.refs import Head
from workbench.values.scores import Scores


def circuit(*heads: str, position: str = "last", shape: tuple[int, int] = (2, 3)) -> Circuit:
    return Circuit.of((Member(Head.parse(head), "A", position) for head in heads), shape=shape, method="given")


def profile(impacts: list[list[float]], baseline: float, noise: float = 0.0) -> Scores:
    means = torch.tensor(impacts, dtype=torch.float64)[..., None]
    spread = torch.randn(*means.shape[:2], 6, generator=seeds.generator(0, "noise"), dtype=torch.float64)
    return Scores.of_heads(
        means + noise * (spread - spread.mean(-1, keepdim=True)), unit="fall of accuracy", baseline=baseline
    )


STUDENT = profile([[0.10, 0.30, 0.0], [0.05, 0.0, 0.0]], baseline=0.5)
TEACHER = profile([[0.55, 0.80, 0.50], [0.0, 0.0, 0.60]], baseline=0.9)
OURS, THEIRS = circuit("L0H0", "L0H1", "L1H0"), circuit("L0H0", "L0H1", "L0H2", "L1H2")


def test_the_papers_rule_by_hand() -> None:
    """P_s = .5: dP_t = .5 - (.9 - impact) = .15, .40, .10, .20 for the four teacher heads; dP_s = .10, .30, .05."""
    head_map = match_heads(STUDENT, TEACHER, OURS, THEIRS, MatchingConfig())
    assert [(str(s), str(t)) for s, t in head_map.pairs] == [("L0H0", "L0H2"), ("L0H1", "L0H1"), ("L1H0", "L0H2")]
    assert [m.distance for m in head_map.matches] == pytest.approx([0.0, 0.10, 0.05])
    assert [m.margin for m in head_map.matches] == pytest.approx([0.05, 0.0, 0.05])
    assert head_map.teacher_heads == (Head(0, 1), Head(0, 2)), (
        "two student heads share a teacher head: the collapse is visible"
    )


def test_other_rules_by_hand() -> None:
    own = match_heads(STUDENT, TEACHER, OURS, THEIRS, MatchingConfig(rule="own_baseline"))
    assert {str(t) for _, t in own.pairs} == {"L0H2"}, "every student impact is nearest the teacher's smallest, 0.5"
    normalised = match_heads(STUDENT, TEACHER, OURS, THEIRS, MatchingConfig(rule="normalised"))
    assert [str(t) for _, t in normalised.pairs] == ["L0H2", "L0H1", "L0H2"]
    one_to_one = match_heads(STUDENT, TEACHER, OURS, THEIRS, MatchingConfig(one_to_one=True))
    assert len(one_to_one.teacher_heads) == 3
    assert sum(m.distance or 0 for m in one_to_one.matches) == pytest.approx(0.20), (
        "the cheapest assignment; head by head it would cost 0.15 with two on one"
    )


def test_profile_rule_follows_the_shape_of_impacts() -> None:
    """Impacts of the same shape over prompts match, whatever their size."""
    shapes = torch.randn(3, 12, generator=seeds.generator(0, "shapes"), dtype=torch.float64)
    teacher = Scores.of_heads(shapes[None].repeat(2, 1, 1) * 5 + 2, unit="x", baseline=0.9)
    student = Scores.of_heads(shapes[None][:, [2, 0, 1]].repeat(2, 1, 1), unit="x", baseline=0.4)
    head_map = match_heads(
        student,
        teacher,
        circuit("L0H0", "L0H1", "L0H2"),
        circuit("L1H0", "L1H1", "L1H2"),
        MatchingConfig(rule="profile"),
    )
    assert [str(t) for _, t in head_map.pairs] == ["L1H2", "L1H0", "L1H1"]


def test_controls_are_seeded_and_differ_from_the_match() -> None:
    matched = match_heads(STUDENT, TEACHER, OURS, THEIRS, MatchingConfig(one_to_one=True))
    random = [
        match_heads(STUDENT, TEACHER, OURS, THEIRS, MatchingConfig(rule="random"), seed=seed) for seed in (0, 0, 1)
    ]
    assert random[0] == random[1] != random[2]
    shuffled = match_heads(STUDENT, TEACHER, OURS, THEIRS, MatchingConfig(rule="shuffled", one_to_one=True), seed=0)
    assert sorted(t for _, t in shuffled.pairs) == sorted(t for _, t in matched.pairs)
    assert all(a != b for (_, a), (_, b) in zip(shuffled.pairs, matched.pairs, strict=True))


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(InputError, match=r"student's circuit is empty.*least_effect"):
        match_heads(STUDENT, TEACHER, circuit(), THEIRS, MatchingConfig())
    with pytest.raises(InputError, match="same pairs"):
        match_heads(
            STUDENT,
            Scores.of_heads(torch.rand(2, 3, 4, generator=seeds.generator(0)), unit="x", baseline=0.9),
            OURS,
            THEIRS,
            MatchingConfig(rule="profile"),
        )
    unmeasured = Scores.of_heads(torch.full((2, 3, 4), torch.nan), unit="x", baseline=0.9)
    with pytest.raises(InputError, match="profile every head"):
        match_heads(unmeasured, TEACHER, OURS, THEIRS, MatchingConfig())
    with pytest.raises(InputError, match="not a head map"):
        HeadMap.from_json({"matches": [{"student": "L0H0"}]})


def test_one_to_one_leaves_the_heads_that_fit_worst_where_the_teacher_has_fewer() -> None:
    """Two teacher heads: of all ways to give them to two student heads, the one with the least sum of distances."""
    few = circuit(*map(str, THEIRS.heads[:2]))
    found = match_heads(STUDENT, TEACHER, OURS, few, MatchingConfig(one_to_one=True))
    evidence = Evidence(
        student=STUDENT, teacher=TEACHER, ours=OURS.heads, theirs=few.heads, similarity=None, similarities=None
    )
    costs = DISTANCES["paper"](evidence)
    ways = itertools.permutations(range(len(OURS.heads)), 2)
    best = min(float(costs[first, 0] + costs[second, 1]) for first, second in ways)
    assert len(found.matches) == 2
    assert sum(match.distance or 0.0 for match in found.matches) == pytest.approx(best)
    assert set(found.unmatched) == set(OURS.heads) - {match.student for match in found.matches}
    assert len(found.unmatched) == len(OURS.heads) - 2 > 0


def test_json_round_trip() -> None:
    for rule in ("paper", "random"):
        head_map = match_heads(STUDENT, TEACHER, OURS, THEIRS, MatchingConfig(rule=rule))  # type: ignore[arg-type]
        assert HeadMap.from_json(head_map.to_json()) == head_map


def test_circuit_algebra_and_random_circuits() -> None:
    a, b = circuit("L0H0", "L0H1"), circuit("L0H1", "L1H2", position="query_label")
    assert [str(h) for h in (a | b).heads] == ["L0H0", "L0H1", "L1H2"]
    assert (a | b).scope[Head(0, 1)] == ("last", "query_label")
    assert (a & b).heads == ()
    assert a.jaccard(b) == pytest.approx(1 / 3)
    assert Circuit.from_json((a | b).to_json()) == a | b
    draw = random_circuit(a, seed=0)
    assert len(draw.heads) == 2
    assert not set(draw.heads) & set(a.heads)
    assert random_circuit(a, seed=0) == draw
    with pytest.raises(InputError, match="one model"):
        a | circuit("L0H0", shape=(4, 4))
    with pytest.raises(InputError, match="outside"):
        circuit("L5H0")


def test_a_student_of_permuted_heads_is_matched_back(load_teacher: Callable[..., Teacher], tmp_path: Path) -> None:
    """The student is the teacher with the heads of every layer permuted (and the key-value groups with them)."""
    from transformers import LlamaForCausalLM

    teacher = load_teacher("llama-mha", layers=2)
    order = {0: [2, 0, 3, 1], 1: [1, 3, 0, 2]}
    plain = LlamaForCausalLM.from_pretrained(teacher.name)
    with torch.no_grad():
        for layer, permutation in order.items():
            attention = plain.model.layers[layer].self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight.copy_(projection.weight.unflatten(0, (4, -1))[permutation].flatten(0, 1))
            attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (4, -1))[:, permutation].flatten(1, 2))
    plain.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    student = Teacher.load(tmp_path)
    prompts, reference = entity_pairs(split="test", scenes=8), entity_pairs(split="calibration", scenes=8)
    impacts = [
        ablation_profiles(model, prompts, reference_means(model, reference), metrics="log_probability")[
            "log_probability"
        ]
        for model in (student, teacher)
    ]
    everyone = Circuit.of((Member(head, "A", "last") for head in teacher.heads), shape=(2, 4), method="all")
    similarity = head_similarity(student, teacher, prompts, everyone, everyone)
    differences = head_similarity(student, teacher, prompts, everyone, everyone, compared="differences")
    assert (differences.values - similarity.values).abs().max() > 1e-2, "another evidence"
    for rule in ("similarity", "similarity of differences", "paper", "own_baseline", "profile"):
        config: Any = MatchingConfig(rule=rule.split()[0], metric="log_probability")
        evidence = differences if "differences" in rule else similarity
        head_map = match_heads(*impacts, everyone, everyone, config, similarity=evidence)
        assert all(theirs == Head(ours.layer, order[ours.layer][ours.index]) for ours, theirs in head_map.pairs), rule
        assert min(m.margin or 0 for m in head_map.matches) > 100 * max(m.distance or 0 for m in head_map.matches), (
            "the margins have teeth"
        )
    with pytest.raises(InputError, match="head_similarity"):
        match_heads(*impacts, everyone, everyone, MatchingConfig(rule="similarity"))
    ckas = pair_ckas(student, teacher, prompts, aligned_pairs(head_map, everyone, everyone, prompts))
    assert all(value.cka == pytest.approx(1, abs=1e-5) for value in ckas)
    assert floor_warning(ckas) is None
    strangers = pair_ckas(
        load_teacher("llama-mha", layers=2, seed=7),
        teacher,
        prompts,
        aligned_pairs(head_map, everyone, everyone, prompts),
    )
    assert all(value.floor == pytest.approx(0, abs=0.15) for value in strangers)


def test_matching_by_differences_ignores_what_the_two_prompts_share(load_teacher: Callable[..., Teacher]) -> None:
    """A vector for each prompt, added to the last layer's heads on the clean and on the corrupt prompt alike:
    similarities of differences stay, those of activations move."""
    student, teacher = load_teacher("llama", layers=2, seed=1), load_teacher("llama", layers=2, seed=2)
    prompts = entity_pairs(scenes=4)
    everyone = Circuit.of(
        (Member(head, "A", "last") for head in student.heads), shape=(2, student.n_heads), method="given"
    )
    shared = torch.randn(len(prompts), 1, 1, student.d_head, generator=seeds.generator(0, "shared"))

    def similarities(compared: Compared) -> torch.Tensor:
        return head_similarity(student, teacher, prompts, everyone, everyone, compared=compared).values

    for compared, least, most in (("differences", 0.0, 1e-4), ("activations", 1e-2, 2.0)):
        plain = similarities(compared)
        with hooks.edit(student.model, {hooks.z(1): lambda z: z + shared}):
            moved = float((similarities(compared) - plain).abs().max())
        assert least <= moved <= most, compared
