"""The forecast's tables: one pair of models counts once in whatever studies it stands, few have no interval, and what
the pages say of related students is what the summaries hold."""

import pytest

from docs import forecasts
from docs.forecasts import Point, correlation, model_of, ranked, trainings
from docs.studies import OF_ONE_TASK


def points(models: int, copies: int = 1) -> list[Point]:
    """Gains that follow what was known in most models, and contradict it inside each."""
    return [
        Point(model=f"teacher student-{model}", known=model + 0.1 * place, gain=model % 5 - 0.01 * place)
        for model in range(models)
        for place in range(3)
    ] * copies


def test_the_same_trainings_twice_are_no_more_students() -> None:
    """Drawn by model: a study that repeats another's students narrows nothing."""
    assert ranked(points(8)) == ranked(points(8, copies=4))
    assert "[" in ranked(points(5))
    assert "[" not in ranked(points(4)), "of four models no interval"
    assert ranked([]) == forecasts.DASH


def test_a_model_is_one_in_all_its_studies() -> None:
    assert model_of("study_scenes", "sibling") == model_of("study_methods", "procrustes")
    assert model_of("study_thin", "unrelated") != model_of("study_entity", "unrelated")
    every = [point for study in OF_ONE_TASK["entity tracking"] for point in trainings(study)]
    assert len({point.model for point in every}) == 9
    assert len({point.model for point in every if point.related}) == 6


def test_among_related_students_a_higher_start_has_not_meant_a_larger_gain() -> None:
    matched = [point for point in trainings("study_lineage") if point.matched]
    related = [point for point in matched if point.related]
    assert (len(matched), len(related)) == (25, 20)
    assert correlation(related) == pytest.approx(-0.87, abs=0.005)
    assert correlation(related[:5]) is None, "one student starts at one value"
