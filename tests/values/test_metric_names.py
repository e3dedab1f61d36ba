"""Metrics by name: ours, and those of installed packages, which recipes name too."""

from importlib.metadata import EntryPoint

import pytest
import torch

from workbench.errors import InputError
from workbench.experiment.recipe import read_recipe
from workbench.values import metric_names, metrics
from workbench.values.metrics import Metric, metric_named

RANK = Metric(
    "rank", "rank of the answer", lambda logits, answers, _: -(logits > logits.gather(1, answers[:, None])).sum(1)
)
OTHER = Metric("place", "place of the answer", RANK.function)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"rank": "RANK", "other": "OTHER", "nothing": "pytest"}
    points = [EntryPoint(name=name, value=f"{__name__}:{it}", group=metric_names.GROUP) for name, it in names.items()]
    for module in (metric_names, metrics):
        monkeypatch.setattr(module, "entry_points", lambda group: points if group == metric_names.GROUP else [])


def test_an_installed_package_adds_a_metric_that_recipes_name(installed: None) -> None:
    metric = metric_named("rank")
    logits, answers = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.0]]), torch.tensor([2, 1])
    assert metric(logits, answers, answers).tolist() == [-1, -2]
    recipe = read_recipe("demo", overrides={"discovery": {"metric": "rank"}, "matching": {"metric": "rank"}})
    assert (recipe.discovery.metric, recipe.matching.metric) == ("rank", "rank")


@pytest.mark.parametrize("name", ["other", "nothing"])
def test_an_entry_point_that_is_no_metric_of_its_name_is_refused(installed: None, name: str) -> None:
    with pytest.raises(InputError, match=rf"the entry point {name} .* is no metric of that name: let .* be `Metric\("):
        metric_named(name)


@pytest.mark.parametrize("part", ["discovery", "matching"])
def test_an_unknown_metric_is_refused_with_the_nearest(part: str) -> None:
    with pytest.raises(InputError, match=r"no metric 'accuracey'.*'accuracy'"):
        read_recipe("demo", overrides={part: {"metric": "accuracey"}})
    with pytest.raises(InputError, match=r"no metric 'accuracey'.*'accuracy'"):
        metric_named("accuracey")
