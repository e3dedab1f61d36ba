"""The second stage: the student's circuit matched to the teacher's, with each pair's CKA and floor."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from workbench import storage
from workbench.errors import InputError
from workbench.experiment.conditions import Condition
from workbench.experiment.discover import discover, profiles
from workbench.experiment.origins import KEY
from workbench.experiment.preflight import preflight
from workbench.experiment.run import NO_STUDENT, Run
from workbench.matching import HeadMap, MatchingConfig, match_heads, replace_rule
from workbench.matching.aligned_pairs import AlignedPair, aligned_pairs
from workbench.matching.head_similarity import circuit_ckas, head_similarities
from workbench.matching.pair_cka import PairCka, aligned_influence, floor_warning, pair_ckas
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs
from workbench.values.scores import Scores

log = logging.getLogger("workbench")


def match(run: Run) -> HeadMap:
    """Match the student's circuit to the teacher's by ablation impact; writes the head map and each pair's CKA with
    its floor."""
    if run.recipe.student is None:
        raise InputError(NO_STUDENT)
    preflight(run)
    discover(run)
    if not run.folder.head_map_file.exists():
        matching = _matched(run, run.recipe.matching, 0)
        circuits = [run.folder.circuit_file(model) for model in run.both()]
        written = {**matching.to_json(), KEY: run.head_map_origin()}
        storage.write_json(run.folder.head_map_file, written, made_from=circuits)
    head_map = run.head_map()
    pairs = aligned_ckas(run, run.student, head_map, run.prompts.discovery)
    storage.write_json(run.folder.path / "ckas.json", [cka.to_json() for cka in pairs])
    log.info("%s", head_map.summary())
    impacts = {name: profiles(run, name, model)[run.recipe.matching.metric] for name, model in run.both().items()}
    influence, floor = aligned_influence(head_map, pairs, impacts["student"], impacts["teacher"])
    storage.write_json(run.folder.path / "circuit_alignment.json", {**influence.to_json(), "floor": floor})
    log.info("influence-weighted alignment of the matched heads: %.2f (prompts shuffled: %.2f)", influence.value, floor)
    warning = floor_warning(pairs)
    if warning:
        log.warning("%s", warning)
    return head_map


def aligned(run: Run, head_map: HeadMap) -> tuple[AlignedPair, ...]:
    """The pairs of a map with their positions."""
    circuits = run.circuit("student"), run.circuit("teacher")
    alignment = run.recipe.alignment
    return aligned_pairs(
        head_map, *circuits, run.prompts.test, positions=alignment.positions, broadened=alignment.broadened
    )


def aligned_ckas(run: Run, student: HookedModel, head_map: HeadMap, prompts: PromptPairs) -> list[PairCka]:
    """Debiased CKA of each pair on some prompts with its shuffled floor."""
    return pair_ckas(student, run.teacher, prompts, aligned(run, head_map), activation=run.recipe.alignment.activation)


def all_ckas(run: Run, student: HookedModel, prompts: PromptPairs) -> Scores:
    """Debiased CKA of all pairs of circuit heads on some prompts, and the same with the prompts shuffled: [student
    teacher draw]."""
    circuits = run.circuit("student"), run.circuit("teacher")
    return circuit_ckas(
        student,
        run.teacher,
        prompts,
        *circuits,
        activation=run.recipe.alignment.activation,
        positions=_compared_at(run),
    )


def _compared_at(run: Run) -> str:
    """Where all pairs of circuit heads are compared: where the student's acts; with two tokenizers where the recipe
    aligns."""
    return "own" if run.prompts.discovery.teacher is None else run.recipe.alignment.positions


def head_map_of(run: Run, condition: Condition, seed: int) -> HeadMap:
    """The map that a condition aligns by: the matched one, or another one (by another rule, or drawn with the seed)
    of the same student heads."""
    matched = run.head_map()
    if condition.aligns in (None, "matched"):
        return matched
    other, ours = (
        _matched(run, replace_rule(run.recipe.matching, condition.aligns), seed),
        {match.student for match in matched.matches},
    )
    return replace(other, matches=tuple(match for match in other.matches if match.student in ours))


def _matched(run: Run, config: MatchingConfig, seed: int) -> HeadMap:
    circuits = run.circuit("student"), run.circuit("teacher")
    impacts = {name: profiles(run, name, model)[config.metric] for name, model in run.both().items()}
    similarity, similarities, prompts = None, None, run.prompts.discovery
    if "similarity" in config.distances:
        activation, positions = run.recipe.alignment.activation, _compared_at(run)
        similarities = head_similarities(
            run.student,
            run.teacher,
            prompts,
            *circuits,
            activation=activation,
            measure=config.measure,
            positions=positions,
            compared=config.compared,
        )
        similarity = similarities(torch.arange(len(prompts)))
    return match_heads(
        impacts["student"],
        impacts["teacher"],
        *circuits,
        config,
        seed=seed,
        similarity=similarity,
        similarities=similarities,
    )


def mean_cka_and_floor(values: Sequence[PairCka]) -> tuple[float | None, float | None]:
    """(mean CKA, mean floor) of some pairs; None without pairs."""
    if not values:
        return None, None
    return sum(v.cka for v in values) / len(values), sum(v.floor for v in values) / len(values)
