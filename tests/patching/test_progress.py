"""An interrupted sweep resumes inside, to the same bits, and refuses what is not its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entity_pairs
from torch import Tensor

from workbench.errors import InputError
from workbench.models.hooked_model import Teacher
from workbench.patching import progress
from workbench.patching.ablation import ablation_profiles
from workbench.patching.activation import activation_patch
from workbench.patching.attribution import exact_edges
from workbench.patching.path import path_patch
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import logit_difference
from workbench.values.refs import Head, Receiver
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


def to_logits(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    return path_patch(model, pairs, metric=metric, unit="logit difference", memory=SMALL, batch=4, file=file)


def into_heads(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    receivers = [Receiver(Head(2, 0), "v"), Receiver(Head(1, 1), "v")]
    return path_patch(
        model,
        pairs,
        metric=metric,
        unit="logit difference",
        position="all",
        receivers=receivers,
        memory=SMALL,
        file=file,
    )


def through_hooks(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    return path_patch(model, pairs, metric=metric, unit="logit difference", engine="hooks", batch=4, file=file)


def ablating(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    files = None if file is None else {"it": file}
    return ablation_profiles(model, pairs, "zero", metrics={"it": metric}, memory=SMALL, batch=4, files=files)["it"]


def activations(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    return activation_patch(model, pairs, "z", metric=metric, unit="logit difference", memory=SMALL, batch=4, file=file)


def edges(model: Teacher, pairs: PromptPairs, metric: Any, file: Path | None) -> Scores:
    return exact_edges(model, pairs, metric=metric, unit="logit difference", batch=4, file=file)


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
    path_patch(model, pairs, metric=whole, unit="", file=None)
    with pytest.raises(Interruption):
        path_patch(model, pairs, metric=Meter(limit=whole.calls - 2), unit="", file=tmp_path / "scores.safetensors")
    rest = Meter()
    path_patch(model, pairs, metric=rest, unit="", file=tmp_path / "scores.safetensors")
    assert rest.calls == whole.calls
