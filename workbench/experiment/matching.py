"""The second stage: the student's circuit matched to the teacher's, with each pair's CKA and floor."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from workbench import storage
from workbench.errors import InputError
from workbench.experiment.conditions import ConditionSpec
from workbench.experiment.finding import Finding
from workbench.experiment.setting import NO_STUDENT
from workbench.matching import HeadMap, MatchingConfig, match_heads, replace_rule
from workbench.matching.aligned_pairs import AlignedPair, aligned_pairs
from workbench.matching.head_rows import require_fitting
from workbench.matching.head_similarity import circuit_ckas, head_similarities
from workbench.matching.pair_cka import PairCka, aligned_influence, floor_warning, pair_ckas
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import require_same_words
from workbench.values.scores import Scores

log = logging.getLogger("workbench")


class Matching(Finding):
    """A recipe whose circuits can be found and matched."""

    def match(self) -> HeadMap:
        """Match the student's circuit to the teacher's by ablation impact; writes the head map and each pair's CKA with
        its floor."""
        if self.recipe.student is None:
            raise InputError(NO_STUDENT)
        self.require_alignable()
        self.discover()
        if not self.folder.head_map_file.exists():
            circuits = [self.folder.circuit_file(model) for model in self.models()]
            head_map = self._matched(self.recipe.matching, 0)
            storage.write_json(self.folder.head_map_file, head_map.to_json(), made_from=circuits)
        head_map = self.folder.head_map()
        ckas = self.ckas(self.student, head_map, self.prompts.discovery)
        storage.write_json(self.folder.path / "ckas.json", [cka.to_json() for cka in ckas])
        log.info("%s", head_map.summary())
        impacts = {
            name: self._profiles(name, model)[self.recipe.matching.metric] for name, model in self.models().items()
        }
        found, floor = aligned_influence(head_map, ckas, impacts["student"], impacts["teacher"])
        storage.write_json(self.folder.path / "circuit_alignment.json", {**found.to_json(), "floor": floor})
        log.info("influence-weighted alignment of the matched heads: %.2f (prompts shuffled: %.2f)", found.value, floor)
        warning = floor_warning(ckas)
        if warning:
            log.warning("%s", warning)
        return head_map

    def require_alignable(self) -> None:
        """Where the models have different tokenizers: refuse, before anything is searched, what could not be aligned
        afterwards."""
        alignment, prompts = self.recipe.alignment, self.prompts.discovery
        require_fitting(alignment.measure, alignment.activation, prompts)
        acts = (
            [stage.position for stage in self.prompts.stages]
            if self.recipe.discovery.method == "path_patching"
            else ["all"]
        )
        own = [*acts, *(alignment.broadened.get(name, name) for name in acts)]
        for name in own if alignment.positions == "own" else [alignment.positions]:
            require_same_words(prompts, [name], [name])

    def aligned(self, head_map: HeadMap) -> tuple[AlignedPair, ...]:
        """The pairs of a map with their positions."""
        circuits = self.folder.circuit("student"), self.folder.circuit("teacher")
        alignment = self.recipe.alignment
        return aligned_pairs(
            head_map, *circuits, self.prompts.test, positions=alignment.positions, broadened=alignment.broadened
        )

    def ckas(self, student: HookedModel, head_map: HeadMap, prompts: PromptPairs) -> list[PairCka]:
        """Debiased CKA of each pair on some prompts with its shuffled floor."""
        return pair_ckas(
            student, self.teacher, prompts, self.aligned(head_map), activation=self.recipe.alignment.activation
        )

    def circuit_ckas(self, student: HookedModel, prompts: PromptPairs) -> Scores:
        """Debiased CKA of all pairs of circuit heads on some prompts, and the same with the prompts shuffled: [student
        teacher draw]."""
        circuits = self.folder.circuit("student"), self.folder.circuit("teacher")
        return circuit_ckas(
            student,
            self.teacher,
            prompts,
            *circuits,
            activation=self.recipe.alignment.activation,
            positions=self._compared_at,
        )

    @property
    def _compared_at(self) -> str:
        """Where all pairs of circuit heads are compared: where the student's acts; with two tokenizers where the recipe
        aligns."""
        return "own" if self.prompts.discovery.teacher is None else self.recipe.alignment.positions

    def head_map_of(self, spec: ConditionSpec, seed: int) -> HeadMap:
        """The map that a condition aligns by: the matched one, or another one (by another rule, or drawn with the seed)
        of the same student heads."""
        matched = self.folder.head_map()
        if spec.aligns in (None, "matched"):
            return matched
        other, ours = (
            self._matched(replace_rule(self.recipe.matching, spec.aligns), seed),
            {match.student for match in matched.matches},
        )
        return replace(other, matches=tuple(match for match in other.matches if match.student in ours))

    def _matched(self, config: MatchingConfig, seed: int) -> HeadMap:
        circuits = self.folder.circuit("student"), self.folder.circuit("teacher")
        impacts = {name: self._profiles(name, model)[config.metric] for name, model in self.models().items()}
        similarity, similarities, prompts = None, None, self.prompts.discovery
        if "similarity" in config.distances:
            activation, positions = self.recipe.alignment.activation, self._compared_at
            similarities = head_similarities(
                self.student,
                self.teacher,
                prompts,
                *circuits,
                activation=activation,
                measure=config.measure,
                positions=positions,
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
