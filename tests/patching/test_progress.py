"""An interrupted sweep resumes inside, to the same bits, and refuses what is not its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entity_pairs
from torch import Tensor

from workbench.circuits.curves import Faithfulness
from workbench.errors import InputError
from workbench.models.hooked_model import Teacher
from workbench.patching import progress
from workbench.patching.ablation import ablate, ablation_profiles
from workbench.patching.activation import activation_patch
from workbench.patching.attribution import attribute_edges, exact_edges
from workbench.patching.execution import Execution
from workbench.patching.path import path_patch
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import METRICS, Metric, logit_difference, metric_named
from workbench.values.scores import Scores

SMALL = 1
"""Bytes of a chunk: every variant is a chunk of its own."""
Sweep = Callable[..., Scores]


class Interruption(Exception):
    """What stops a sweep in the middle."""


class Meter:
    """A metric that counts how often it is asked, and interrupts after some calls."""

    def __init__(self, limit: int | None = None) -> None:
        self.calls, self.limit = 0, limit

    def __call__(self, logits: Tensor, answers: Tensor, distractors: Tensor) -> Tensor:
        self.calls += 1
        if self.limit is not None and self.calls > self.limit:
            raise Interruption
        return logit_difference(logits, answers, distractors)


def named(function: Any, name: str = "it", unit: str = "logit difference") -> Metric:
    return Metric(name, unit, function)


def to_logits(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    return path_patch(model, pairs, metric=named(metric), execution=Execution(memory=SMALL, batch=4, file=file))


def into_heads(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    execution = Execution(memory=SMALL, file=file)
    return path_patch(
        model, pairs, metric=named(metric), position="all", receivers=["L2H0.v", "L1H1.v"], execution=execution
    )


def through_hooks(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    return path_patch(model, pairs, metric=named(metric), execution=Execution(engine="hooks", batch=4, file=file))


def ablating(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    return ablate(model, pairs, "zero", metric=named(metric), execution=Execution(memory=SMALL, batch=4, file=file))


def activations(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    execution = Execution(memory=SMALL, batch=4, file=file)
    return activation_patch(model, pairs, "z", metric=named(metric), execution=execution)


def edges(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    return exact_edges(model, pairs, metric=named(metric), execution=Execution(batch=4, file=file))


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Teacher:
    """Grouped-query attention."""
    return Teacher.load(model_folder("llama"))


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """Six pairs."""
    return entity_pairs(scenes=2)


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write after every chunk."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)


@pytest.mark.parametrize("sweep", [to_logits, into_heads, through_hooks, ablating, activations, edges])
def test_an_interrupted_sweep_resumes_to_the_same_bits_and_does_only_what_is_left(sweep: Sweep, model, pairs, tmp_path):
    file, whole = tmp_path / "scores.safetensors", Meter()
    expected = sweep(model, pairs, whole, None)
    limit = 2 * whole.calls // 3
    with pytest.raises(Interruption):
        sweep(model, pairs, Meter(limit=limit), file)
    assert not file.exists()
    assert list(tmp_path.glob("*.partial"))

    rest = Meter()
    found = sweep(model, pairs, rest, file)
    assert torch.equal(found.values.nan_to_num(7.0), expected.values.nan_to_num(7.0))
    assert found.unit == expected.unit
    assert found.baseline == expected.baseline
    assert float(expected.values.nan_to_num(0).abs().max()) > 0.01
    assert rest.calls <= whole.calls - limit // 2, (
        "at least half of what was done is not done again (the ends, and the last chunk, are)"
    )
    assert not list(tmp_path.glob("*.partial"))

    again = Meter()
    assert torch.equal(sweep(model, pairs, again, file).values.nan_to_num(7.0), expected.values.nan_to_num(7.0))
    assert again.calls == 0


def test_another_sweeps_files_are_refused(model, pairs, tmp_path):
    file = tmp_path / "scores.safetensors"
    with pytest.raises(Interruption):
        to_logits(model, pairs, Meter(limit=9), file)
    with pytest.raises(InputError, match="another sweep"):
        into_heads(model, pairs, Meter(), file)
    to_logits(model, pairs, Meter(), file)
    for other in (
        lambda: into_heads(model, pairs, Meter(), file),
        lambda: to_logits(model, pairs.swapped(), Meter(), file),
    ):
        with pytest.raises(InputError, match="other prompts or settings"):
            other()


def test_a_chunk_of_which_a_part_was_found_is_computed_again_whole(model, pairs, tmp_path):
    """All variants are one chunk: an interruption inside it leaves nothing to go on from."""
    whole = Meter()
    path_patch(model, pairs, metric=named(whole))
    interrupted = named(Meter(limit=whole.calls - 2))
    with pytest.raises(Interruption):
        path_patch(model, pairs, metric=interrupted, execution=Execution(file=tmp_path / "scores.safetensors"))
    rest = Meter()
    path_patch(model, pairs, metric=named(rest), execution=Execution(file=tmp_path / "scores.safetensors"))
    assert rest.calls == whole.calls


def attributed(model: Teacher, pairs: PromptPairs, execution: Execution, metric: str | Metric) -> Scores:
    return attribute_edges(model, pairs, metric=metric, execution=execution)


def patched(model: Teacher, pairs: PromptPairs, execution: Execution, metric: str | Metric) -> Scores:
    return path_patch(model, pairs, metric=metric, execution=execution)


def by_activation(model: Teacher, pairs: PromptPairs, execution: Execution, metric: str | Metric) -> Scores:
    return activation_patch(model, pairs, "z", metric=metric, execution=execution)


def by_edges(model: Teacher, pairs: PromptPairs, execution: Execution, metric: str | Metric) -> Scores:
    return exact_edges(model, pairs, metric=metric, senders=["L0H1"], execution=execution)


def by_ablation(model: Teacher, pairs: PromptPairs, execution: Execution, metric: str | Metric) -> Scores:
    return ablate(model, pairs, "zero", metric=metric, execution=execution)


def by_profiles(model: Teacher, pairs: PromptPairs, execution: Execution, metric: str | Metric) -> Scores:
    measured = metric_named(metric)
    files = {measured.name: Path(str(execution.file))}
    return ablation_profiles(model, pairs, "zero", metrics=[measured], files=files)[measured.name]


def by_faithfulness(model: Teacher, pairs: PromptPairs, execution: Execution, metric: str | Metric) -> float:
    return Faithfulness(model, pairs, "zero", metric=metric, execution=execution).of(["L0H1"])


SWEEPS = [patched, by_activation, by_edges, by_ablation, by_profiles, attributed, by_faithfulness]
BASE = METRICS["logit_difference"]


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize(
    "other",
    [
        Metric(BASE.name, BASE.unit, METRICS["log_probability"].function),
        Metric("another", BASE.unit, BASE.function),
        Metric(BASE.name, "nats", BASE.function),
    ],
    ids=["function", "name", "unit"],
)
def test_a_second_metric_does_not_get_the_first_ones_numbers(sweep, other, model, pairs, tmp_path):
    """Whichever of its name, unit and function differs; `path_patch` once gave the first metric's scores."""
    execution = Execution(file=tmp_path / "kept.safetensors")
    sweep(model, pairs, execution, BASE)
    sweep(model, pairs, execution, "logit_difference")
    with pytest.raises(InputError, match="another"):
        sweep(model, pairs, execution, other)


INGREDIENTS: dict[str, Callable[[dict[str, Any], Teacher, PromptPairs], dict[str, Any]]] = {
    "sweep": lambda base, other, pairs: {**base, "sweep": "another"},
    "model": lambda base, other, pairs: {**base, "model": other},
    "prompts": lambda base, other, pairs: {**base, "pairs": [pairs.swapped()]},
    "metric": lambda base, other, pairs: {**base, "metrics": [METRICS["accuracy"]]},
    "more metrics": lambda base, other, pairs: {**base, "metrics": [BASE, METRICS["accuracy"]]},
    "replacement": lambda base, other, pairs: {**base, "replacement": "zero"},
    "setting": lambda base, other, pairs: {**base, "settings": {"position": "last"}},
}


@pytest.mark.parametrize("ingredient", [*INGREDIENTS, "format"])
def test_an_identity_changes_with_each_of_its_ingredients(
    ingredient, model, pairs, tmp_path, model_folder, monkeypatch
):
    base: dict[str, Any] = {
        "sweep": "a sweep",
        "model": model,
        "pairs": [pairs],
        "metrics": [BASE],
        "settings": {"position": "all"},
    }

    def identified(parts: dict[str, Any]) -> str:
        return progress.identity(
            parts["sweep"], parts["model"], parts["pairs"], **{k: parts[k] for k in parts if k not in POSITIONAL}
        )

    file, scores = tmp_path / "scores.safetensors", Scores.of_heads(torch.zeros(2, 2), unit="x")
    first = progress.load_or_sweep(file, lambda: identified(base), lambda _: scores)
    assert torch.equal(progress.load_or_sweep(file, lambda: identified(base), lambda _: 1 / 0).values, first.values)
    changed = base
    if ingredient == "format":
        monkeypatch.setattr(progress, "FORMAT", progress.FORMAT + 1)
    else:
        changed = INGREDIENTS[ingredient](base, Teacher.load(model_folder("gpt2")), pairs)
    with pytest.raises(InputError, match="another model, other prompts or settings, or another metric"):
        progress.load_or_sweep(file, lambda: identified(changed), lambda _: scores)


POSITIONAL = ("sweep", "model", "pairs")


def test_how_a_sweep_is_carried_out_is_no_part_of_its_identity(model, pairs, tmp_path):
    file = str(tmp_path / "scores.safetensors")
    first = by_activation(model, pairs, Execution(file=file), "logit_difference")
    again = by_activation(
        model, pairs, Execution(file=file, batch=2, memory=1, progress=False, engine="hooks"), "logit_difference"
    )
    assert torch.equal(first.values, again.values)


def test_files_of_several_metrics_are_named_one_each(model, pairs, tmp_path):
    with pytest.raises(InputError, match="give `files`"):
        ablation_profiles(model, pairs, "zero", metrics=["accuracy"], execution=Execution(file=tmp_path / "one"))
    with pytest.raises(InputError, match="name each once"):
        ablation_profiles(model, pairs, "zero", metrics=["accuracy"], files={"probability": tmp_path / "one"})


def test_a_metric_without_a_name_and_a_misspelt_one_are_refused(model, pairs):
    with pytest.raises(InputError, match="did you mean 'log_probability'"):
        path_patch(model, pairs, metric="log_probabilty")
    with pytest.raises(InputError, match=r"Metric\(name=\.\.\., unit=\.\.\., function=f\)"):
        metric_named(logit_difference)
