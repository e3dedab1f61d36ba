"""The sentences that a report opens with, on made-up results."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.plots.plot_results import STUDENT, TEACHER, result_of
from workbench import storage
from workbench.circuits.evaluation import CircuitReport
from workbench.experiment.results import OUTCOMES
from workbench.experiment.runs import RunFolder
from workbench.report.findings import AGAINST, comparisons_of, discovered, findings, gained, undecided
from workbench.values.statistics import Comparison, compared

METHOD = "circuit_ce_cka"


def right(count: int, of: int = 100, *, start: int = 0) -> torch.Tensor:
    """So many prompts answered right, from `start` on."""
    return torch.tensor([start <= place < start + count for place in range(of)])


def comparison(ours: Sequence[int], theirs: Sequence[int]) -> Comparison:
    """A seed each: how many of 100 prompts are right."""
    return compared([right(count) for count in ours], [right(count) for count in theirs])


def report(circuit: float = 0.6, full: float = 0.8) -> CircuitReport:
    """An evaluation with a faithfulness of circuit / full."""
    return CircuitReport(
        heads=4,
        total_heads=16,
        prompts=100,
        scope="positions",
        ablation="mean",
        full_accuracy=full,
        full_interval=(0.7, 0.9),
        circuit_accuracy=circuit,
        circuit_interval=(0.5, 0.7),
        random_circuit_accuracy=0.05,
        random_circuit_range=(0.0, 0.1),
        random_circuits=3,
        empty_accuracy=0.01,
        faithfulness=circuit / full if full else None,
        logit_differences={},
        logit_difference_recovered=None,
    )


def test_what_was_found_says_heads_share_and_faithfulness() -> None:
    sentence = discovered({"teacher": TEACHER, "student": STUDENT}, {"teacher": report()})
    assert "4 of 16 attention heads (25 %)" in sentence
    assert (
        "0.600 of the test prompts, the whole model 0.800 (faithfulness 0.75; as many random heads 0.050)" in sentence
    )
    assert "the student's circuit has 3 of 6 attention heads (50 %), and has not been evaluated alone" in sentence
    assert "faithfulness undefined" in discovered({"teacher": TEACHER}, {"teacher": report(0.0, 0.0)})
    assert "No circuit" in discovered({}, {})


class TestGain:
    """The method against its controls."""

    def test_a_gain_over_seeds_has_the_interval_over_seeds(self) -> None:
        against = {"circuit_ce": comparison([80, 82, 81], [60, 61, 63])}
        sentence = gained(against, accuracy=0.81, seeds=3)
        spread = against["circuit_ce"].over_seeds
        assert "circuit / CE + CKA, 3 seeds" in sentence
        assert (
            f"0.197 more than circuit / CE (95 % interval over seeds {spread.low:+.3f} to {spread.high:+.3f}"
            in sentence
        )
        assert "p < 0.001" in sentence
        assert undecided(against, seeds=3).startswith("Undecided: the difference from full / CE")

    def test_a_loss_is_called_one(self) -> None:
        against = {name: comparison([60, 61, 63], [80, 82, 81]) for name in AGAINST}
        assert "0.197 less than full / CE" in gained(against, accuracy=0.6, seeds=3)
        assert undecided(against, seeds=3) == "None of these differences is undecided at 95 %."

    def test_an_interval_around_zero_is_undecided_whatever_p(self) -> None:
        """Two seeds that disagree: pooled over prompts p is small, another training could lose."""
        against = {"circuit_ce": comparison([90, 61], [60, 60])}
        assert against["circuit_ce"].pooled_p < 0.001
        assert "the difference from circuit / CE, which could be none" in undecided(against, seeds=2)

    def test_equal_is_neither_more_nor_less(self) -> None:
        sentence = gained({"circuit_ce": comparison([60, 60], [60, 60])}, accuracy=0.6, seeds=2)
        assert "as many as circuit / CE" in sentence
        assert "more" not in sentence + "".join(sentence.split("less")[1:])

    def test_one_seed_has_no_interval_over_seeds(self) -> None:
        against = {"circuit_ce": comparison([80], [60])}
        sentence = gained(against, accuracy=0.8, seeds=1)
        assert "1 seed)" in sentence
        assert "over seeds" not in sentence
        assert "over prompts alone" in sentence
        assert "one seed has no interval over seeds" in undecided(against, seeds=1)

    def test_one_seed_is_decided_by_its_p(self) -> None:
        assert "from circuit / CE" not in undecided({"circuit_ce": comparison([80], [60])}, seeds=1)
        assert "from circuit / CE, which could be none" in undecided({"circuit_ce": comparison([62], [60])}, seeds=1)

    def test_missing_conditions_are_said(self) -> None:
        assert "has not been evaluated" in gained({}, accuracy=None, seeds=0)
        assert "none of its controls" in gained({}, accuracy=0.7, seeds=2)
        assert undecided({}, seeds=0) == "Undecided: whether alignment gains anything."
        assert "circuit / CE + random CKA, not run" in undecided({}, seeds=2)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The outcomes of the method on seeds 0 and 1, of circuit CE on 1 and 2; full CE has none."""
    run = RunFolder(tmp_path)
    for name, seed, count in ((METHOD, 0, 90), (METHOD, 1, 80), ("circuit_ce", 1, 60), ("circuit_ce", 2, 10)):
        storage.write_tensors(
            run.condition(name, seed) / OUTCOMES,
            {"full": right(count).to(torch.uint8)},
            metadata={"condition": name, "seed": str(seed)},
        )
    return run


def test_comparisons_take_the_seeds_of_both_and_scenes_as_one(folder: RunFolder) -> None:
    rows = [result_of(METHOD, seed=seed) for seed in (0, 1)]
    rows += [result_of("circuit_ce", seed=seed) for seed in (1, 2)] + [result_of("full_ce")]
    made = comparisons_of(folder, rows, scenes=20)
    assert list(made) == ["circuit_ce"], "outcomes of full CE are missing, nothing is made up"
    assert made["circuit_ce"].over_seeds.mean == pytest.approx(0.2)
    assert made["circuit_ce"].over_prompts.count == 20
    assert comparisons_of(folder, rows, scenes=0)["circuit_ce"].over_prompts.count == 100
    sentences = findings({}, {}, rows, made)
    assert len(sentences) == 3
    assert "0.200 more than circuit / CE" in sentences[1]
