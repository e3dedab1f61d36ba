"""Rows with the columns of MIB's tasks, as the hub has them, in words of the small tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import workbench as wb
from tests.tasks.test_rows import TOKENIZER
from workbench.errors import InputError
from workbench.tasks import records
from workbench.tasks.base import load_pairs
from workbench.tasks.pairs import numbered_pairs

ROWS = Path(__file__).parent / "mib_rows"


@pytest.mark.parametrize(
    ("task", "answer", "distractor", "corrupt_answer"),
    [
        ("ioi", " book", " card", " card"),
        ("mcqa", " B", " R", " R"),
        ("arc", " C", " J", " J"),
        ("arithmetic", " C", " K", " K"),
    ],
)
def test_each_task_is_read_by_its_columns(task: str, answer: str, distractor: str, corrupt_answer: str) -> None:
    row = json.loads((ROWS / f"{task}.jsonl").read_text().splitlines()[0])
    counterfactual = {"ioi": "s2_io_flip", "arithmetic": "random"}.get(task, "symbol")
    (_, pair), *_ = numbered_pairs(ROWS / f"{task}.jsonl", problems=[])
    assert (pair.clean, pair.corrupt) == (row["prompt"], row[f"{counterfactual}_counterfactual"]["prompt"])
    assert (pair.answer, pair.distractor, pair.corrupt_answer) == (answer, distractor, corrupt_answer)
    read = load_pairs(ROWS / f"{task}.jsonl", TOKENIZER, skip_bad_rows=True)
    assert read["answer"][0] == answer


def test_another_counterfactual_and_rows_without_one() -> None:
    (_, pair), *_ = numbered_pairs(ROWS / "ioi.jsonl", counterfactual="abc_counterfactual")
    assert pair.corrupt.endswith("ball is in the")
    assert (pair.answer, pair.distractor, pair.corrupt_answer) == (" book", " card", " book")
    with pytest.raises(InputError, match=r"row 1: .*no counterfactual 'abd_counterfactual'.*abc_counterfactual"):
        numbered_pairs(ROWS / "ioi.jsonl", counterfactual="abd_counterfactual")
    with pytest.raises(InputError, match=r"\n  row 2: random_counterfactual is None, no object.*\[random_counter"):
        numbered_pairs(ROWS / "arithmetic.jsonl")
    with pytest.raises(InputError, match=r"row 2: answerKey is 9"):
        numbered_pairs(ROWS / "arc.jsonl")


def test_greater_than_has_sets_of_years() -> None:
    ((_, pair),) = numbered_pairs(ROWS / "greater_than.jsonl")
    assert pair.answers == tuple(f"{year}" for year in range(42, 100))
    assert pair.distractors[0] == "00"
    assert pair.distractors[-1] == "41"


def test_the_hub_is_asked_for_repository_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []

    def hub(repository: str, configuration: str | None, *, split: str) -> Dataset:
        asked.append((repository, configuration, split))
        return Dataset.from_json(str(ROWS / "arc.jsonl"))  # pyright: ignore[reportReturnType]

    monkeypatch.setattr(records, "load_dataset", hub)
    teacher = wb.Teacher.load("teacher", check=False)
    pairs = wb.read_pairs("mib-bench/arc_easy:4_answer_choices", teacher, split="test", skip_bad_rows=True)
    assert asked == [("mib-bench/arc_easy", "4_answer_choices", "test")]
    assert len(pairs) == 1
    assert "1 bad rows left out" in repr(pairs)
    assert "1 rows are left out, 1 are used" in caplog.text
    with pytest.raises(InputError, match="row 2"):
        wb.read_pairs("mib-bench/arc_easy", teacher)
