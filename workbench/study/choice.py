"""What validation prompts choose in a cell of a study: lambda, and each condition's learning rate where a study tries
several.

The method is tried at every (lambda, learning rate); then, each by itself, the other conditions that train at every
learning rate, those with alignment at the lambda that the method's trials chose. Judged is accuracy on validation
prompts after the last step, its mean over the validation seeds; of equals, the smallest lambda and rate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from typing_extensions import NotRequired

from workbench import storage
from workbench.experiment.conditions import CONDITIONS, METHOD
from workbench.study.config import StudyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a condition is tried."""

    condition: str
    weight: float
    """lambda; of a condition without alignment the smallest, which means nothing there."""
    rate: float | None
    """Learning rate; None: the recipe's own."""

    @property
    def folder(self) -> str:
        """Name of its folder in the cell's."""
        return f"weight-{self.weight:g}" + ("" if self.rate is None else f"-rate-{self.rate:g}")


class Choice(TypedDict):
    """The chosen lambda, and what each gave on validation prompts (at its best rate), seed by seed; the same of each
    condition's learning rates."""

    weight: float
    validation_accuracy: dict[str, list[float]]
    learning_rates: NotRequired[dict[str, float]]
    learning_rate_accuracy: NotRequired[dict[str, dict[str, list[float]]]]


def read_choice(file: Path) -> Choice:
    """A cell's choice. Errors: `InputError` when the file is missing or damaged."""
    return storage.read_typed(storage.read_json(file), Choice, what=f"a chosen lambda ({file})")


def chosen_accuracy(choice: Choice) -> float | None:
    """Mean validation accuracy at the chosen lambda; None where none was tried."""
    values = choice["validation_accuracy"].get(str(choice["weight"]))
    return mean(values) if values else None


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def method_points(config: StudyConfig) -> list[Point]:
    """Where the method is tried; one point alone is taken as it is."""
    rates = config.learning_rates or (None,)
    points = [Point(condition=METHOD, weight=weight, rate=rate) for weight in config.weights for rate in rates]
    return points if config.chooses else []


def other_points(config: StudyConfig, conditions: Sequence[str], weight: float | None) -> Iterator[Point]:
    """Where the other conditions of a cell are tried; those with alignment once lambda is known."""
    for condition in conditions:
        aligned = CONDITIONS[condition].aligns is not None
        if condition == METHOD or CONDITIONS[condition].trains is None or (aligned and weight is None):
            continue
        at = weight if aligned and weight is not None else min(config.weights)
        yield from (Point(condition=condition, weight=at, rate=rate) for rate in config.learning_rates)


def choose(config: StudyConfig, conditions: Sequence[str], judge: Callable[[Point], list[float]]) -> Choice:
    """The choice of a cell; `judge` gives the validation accuracies of a point, seed by seed."""
    if not config.chooses:
        return {"weight": config.weights[0], "validation_accuracy": {}}
    tried = {point: judge(point) for point in method_points(config)}
    best = _best(tried)
    at_best_rate = {
        weight: tried[_best({point: values for point, values in tried.items() if point.weight == weight})]
        for weight in config.weights
    }
    choice: Choice = {
        "weight": best.weight,
        "validation_accuracy": {str(weight): values for weight, values in at_best_rate.items()},
    }
    if not config.learning_rates:
        return choice
    tried = {point: values for point, values in tried.items() if point.weight == best.weight}
    tried |= {point: judge(point) for point in other_points(config, conditions, best.weight)}
    by_condition: dict[str, dict[Point, list[float]]] = {}
    for point, values in tried.items():
        by_condition.setdefault(point.condition, {})[point] = values
    choice["learning_rates"] = {name: float(_best(points).rate or 0.0) for name, points in by_condition.items()}
    choice["learning_rate_accuracy"] = {
        name: {str(point.rate): values for point, values in points.items()} for name, points in by_condition.items()
    }
    return choice


def _best(tried: Mapping[Point, Sequence[float]]) -> Point:
    """The point of the highest mean; of equals the smallest lambda, then the smallest rate."""
    return max(sorted(tried, key=lambda point: (point.weight, point.rate or 0.0)), key=lambda point: mean(tried[point]))
