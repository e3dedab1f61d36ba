"""The forecast of `workbench match`: what the nearest trainings of a study gained, by arithmetic that can be done by
hand; and what it says of the bundled models."""

from pathlib import Path

import pytest

from workbench import storage
from workbench.errors import InputError
from workbench.study.diagnostic import BUNDLED, Known, Start, forecast, forecast_of, read_known

STARTS = [Start(above_floor=place / 10, gain=(place - 4) / 100) for place in range(10)]
"""Gains from -0.04 at 0 to +0.05 at 0.9, nothing at 0.4."""
KNOWN = Known(starts=STARTS, task="colours")


def at(cka: float, floor: float = 0.0) -> list[dict[str, float]]:
    return [{"cka": cka + shift, "floor": floor} for shift in (-0.05, 0.05)]


@pytest.mark.parametrize(("cka", "verdict"), [(0.05, "likely to hurt"), (0.4, "undecided"), (0.85, "likely to help")])
def test_the_nearest_trainings_decide(cka: float, verdict: str) -> None:
    found = forecast(at(cka), KNOWN)
    assert found is not None
    assert found.verdict == verdict
    assert not found.beyond
    nearest = sorted(STARTS, key=lambda start: abs(start.above_floor - cka))[:5]
    assert found.gain.mean == pytest.approx(sum(start.gain for start in nearest) / 5)
    assert found.gained == sum(start.gain > 0 for start in nearest)
    assert verdict in found.text()


def test_the_floor_counts_and_extrapolation_is_said() -> None:
    high, lifted = forecast(at(0.85), KNOWN), forecast(at(0.85, floor=0.8), KNOWN)
    assert high is not None
    assert lifted is not None
    assert (high.verdict, lifted.verdict) == ("likely to help", "likely to hurt")
    far = forecast(at(2.0), KNOWN)
    assert far is not None
    assert far.beyond
    assert "outside the study's" in far.text()


def test_trainings_as_near_as_each_other_all_count() -> None:
    """Ten seeds of one start: no order among them may choose the answer."""
    seeds = [Start(above_floor=0.5, gain=gain / 100) for gain in range(-2, 8)]
    for order in (seeds, seeds[::-1]):
        found = forecast(at(0.5), Known(starts=[*order, Start(above_floor=0.9, gain=1.0)]))
        assert found is not None
        assert found.gain.mean == pytest.approx(0.025)
        assert len(found.nearest) == 10


def test_the_bundled_study_tells_the_bundled_students_apart(tmp_path: Path) -> None:
    known = read_known(BUNDLED["entity_tracking"])
    assert known.rank_correlation is not None
    assert known.task == "entity_tracking"
    assert len(known.starts) == 15  # three cells, five seeds, matched partners
    root = Path(__file__).parents[2] / "assets" / "results" / "study_entity"
    for student, verdict in (("sibling", "likely to help"), ("unrelated", "likely to hurt")):
        storage.write_json(tmp_path / student / "ckas.json", storage.read_json(root / student / "ckas.json"))
        found = forecast_of(tmp_path / student, task="entity_tracking")
        assert found is not None
        assert found.verdict == verdict
        assert storage.read_json(tmp_path / student / "forecast.json")["verdict"] == verdict


def test_without_a_study_or_pairs(tmp_path: Path) -> None:
    assert forecast([], KNOWN) is None
    assert forecast(at(0.5), Known(starts=[])) is None
    storage.write_json(tmp_path / "ckas.json", [])
    with pytest.raises(InputError, match="finished `workbench study`"):
        forecast_of(tmp_path, tmp_path / "nothing", task=None)


def test_it_rests_on_the_same_task_and_says_where_it_cannot_tell(tmp_path: Path) -> None:
    """Theory of mind's own study, in which starts and gains hardly go together, forecasts nothing; a task without a
    study has no forecast; another task's study is called that."""
    storage.write_json(tmp_path / "ckas.json", [{"cka": 0.3, "floor": 0.0}])
    mind = forecast_of(tmp_path, task="theory_of_mind")
    assert mind is not None
    assert mind.rank_correlation is not None
    assert mind.rank_correlation < 0.5
    assert mind.verdict == "not to be told"
    assert "not to be told" in mind.text()
    assert forecast_of(tmp_path, task="ioi") is None
    assert forecast_of(tmp_path, task=None) is None
    other = forecast_of(tmp_path, BUNDLED["entity_tracking"], task="ioi")
    assert other is not None
    assert other.text().startswith("the study is of entity_tracking, and this run is of ioi")


def test_one_start_tells_nothing() -> None:
    """Ten trainings of one student, all of which gained: that start and gain go together was not seen."""
    found = forecast(at(0.5), Known(starts=[Start(above_floor=0.5, gain=place / 100) for place in range(1, 11)]))
    assert found is not None
    assert found.gained == 10
    assert found.verdict == "not to be told"
    assert "all began, or gained, alike" in found.text()


def test_random_partners_say_nothing_of_matched_ones(tmp_path: Path) -> None:
    """The lineage study ranks well with random partners among its trainings, and not at all by matched ones."""
    study = Path(__file__).parents[2] / "assets" / "results" / "study_lineage"
    summary = storage.read_json(study / "summary.json")
    known = read_known(study)
    assert len(known.starts) < len(summary["diagnostic"]["points"])
    assert known.rank_correlation is not None
    assert known.rank_correlation < 0.5 < summary["diagnostic"]["rank_correlation"]
    storage.write_json(tmp_path / "ckas.json", [{"cka": 0.6, "floor": 0.0}])
    found = forecast_of(tmp_path, study, task=known.task)
    assert found is not None
    assert found.verdict == "not to be told"
