"""Sets of answers: what a row may hold, and that every metric and method counts a set by its mass."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.tasks.test_rows import GOOD, TOKENIZER, as_csv, jsonl
from workbench import seeds
from workbench.circuits.circuit import Member
from workbench.distillation import losses
from workbench.distillation.trainers import training_rows
from workbench.errors import InputError
from workbench.patching.execution import Execution
from workbench.readouts.logit_attribution import direct_logit_attribution
from workbench.tasks.base import encode, load_pairs
from workbench.tasks.streams import read_pairs as read_saved
from workbench.tasks.streams import save_pairs
from workbench.values.metrics import METRICS

QUIET = Execution(progress=False)
SETS: list[dict[str, Any]] = [
    {**GOOD, "answer": [" cup", " apple", " bell"], "distractor": [" book", " hat"]},
    {**GOOD, "clean": GOOD["corrupt"], "corrupt": GOOD["clean"], "answer": " book", "distractor": [" apple"]},
]


def member_by_member(metric: str, logits: torch.Tensor, answers: list[int], distractors: list[int]) -> float:
    """The slow reference, from a row's probabilities."""
    likely = logits.double().softmax(-1)
    right, wrong = (sum(float(likely[token]) for token in tokens) for tokens in (answers, distractors))
    return {
        "probability": right,
        "log_probability": float(torch.tensor(right).log()),
        "probability_difference": right - wrong,
        "logit_difference": float((torch.tensor(right) / torch.tensor(wrong)).log()),
        "accuracy": float(int(likely.argmax()) in answers),
    }[metric]


@pytest.mark.parametrize("metric", METRICS)
def test_a_set_counts_by_its_mass(metric: str) -> None:
    logits = 3 * torch.randn(6, 9, generator=seeds.generator(0, "sets"))
    logits[0, 1] += 20  # not the first member, and it alone is the likeliest
    answers = torch.tensor([[0, 1, 2], [3, -1, -1], [4, 5, -1], [8, 0, -1], [7, -1, -1], [1, 2, 3]])
    distractors = torch.tensor([[3, 4], [0, -1], [1, 2], [1, 2], [3, 4], [8, 7]])
    values = METRICS[metric](logits, answers, distractors)
    expected = [
        member_by_member(metric, row, [t for t in right if t >= 0], [t for t in wrong if t >= 0])
        for row, right, wrong in zip(logits, answers.tolist(), distractors.tolist(), strict=True)
    ]
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-5, rtol=0)
    first = METRICS[metric](logits, answers[:, 0], distractors[:, 0])
    assert (values - first).abs().max() > 1e-3, "the other members count"
    lone = METRICS[metric](logits, answers[:, :1], distractors[:, :1])
    torch.testing.assert_close(lone, first, atol=1e-6, rtol=0)  # a set of one is its member
    shuffled = METRICS[metric](logits, answers.flip(1), distractors.flip(1))
    torch.testing.assert_close(shuffled, values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_with_sets_are_read_and_saved(tmp_path: Path, kind: str) -> None:
    as_cells = [{**row, **{name: json.dumps(row[name]) for name in ("answer", "distractor")}} for row in SETS]
    as_cells[1]["answer"] = " book"
    file = jsonl(tmp_path, *SETS) if kind == "jsonl" else as_csv(tmp_path, *as_cells)
    dataset = load_pairs(file, TOKENIZER)
    assert dataset["answer"][:] == [[" cup", " apple", " bell"], [" book"]]
    pairs = encode(dataset, TOKENIZER)
    ids = {word: TOKENIZER(word)["input_ids"][0] for word in ("apple", "cup", "bell", "book", "hat")}
    assert pairs.answers.tolist() == [[ids["cup"], ids["apple"], ids["bell"]], [ids["book"], -1, -1]]
    assert pairs.distractors.tolist() == [[ids["book"], ids["hat"]], [ids["apple"], -1]]
    save_pairs(dataset, tmp_path / "saved.parquet")
    assert encode(read_saved(tmp_path / "saved.parquet", TOKENIZER), TOKENIZER).fingerprint() == pairs.fingerprint()
    lists = [{**row, "answer": [row["answer"]], "distractor": [row["distractor"]]} for row in (GOOD, GOOD)]
    alone = encode(load_pairs(jsonl(tmp_path, *lists), TOKENIZER), TOKENIZER)
    assert alone.fingerprint() == encode(load_pairs(jsonl(tmp_path, GOOD, GOOD), TOKENIZER), TOKENIZER).fingerprint()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": []}, "empty list"),
        ({"answer": [" apple", 3]}, "int, not text"),
        ({"answer": [" apple", " book"]}, "both ' book'"),
        ({"answer": [" apple", " apple"]}, "twice"),
        ({"answer": [" apple", " zebra"]}, "' zebra' is unknown"),
        ({"answer": [" apple", " Box F"]}, "has 2 tokens"),
        ({"clean": [GOOD["clean"]]}, "list, not text"),
    ],
)
def test_a_set_that_is_none_is_refused_with_its_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_pairs(jsonl(tmp_path, {**GOOD, **change}), TOKENIZER)
    if "answer" in change and reason == "empty list":
        with pytest.raises(InputError, match="set of answers holds answers of one token"):
            load_pairs(jsonl(tmp_path, SETS[0]), TOKENIZER, multi_token=True)


def test_every_method_takes_sets_or_says_that_it_does_not(tmp_path: Path) -> None:
    """Path patching, ablation, attribution, a circuit's report; what needs one token says so."""
    teacher = wb.Teacher.load("teacher", check=False)
    pairs = wb.read_pairs(jsonl(tmp_path, *SETS), teacher)
    plain = wb.path_patch(teacher, pairs.first_members(), metric="logit_difference", execution=QUIET)
    scores = wb.path_patch(teacher, pairs, metric="logit_difference", execution=QUIET)
    assert scores.values.isfinite().all()
    assert (scores.values - plain.values).abs().max() > 1e-4
    with torch.no_grad():
        logits = teacher.final_logits(pairs.clean, pairs.mask)
    whole = METRICS["accuracy"](logits, pairs.answers, pairs.distractors)[:1].mean()
    circuit = wb.Circuit.of(
        [Member(head, "A", "last") for head in teacher.heads[:4]],
        shape=(teacher.n_layers, teacher.n_heads),
        method="some",
    )
    report = wb.evaluate_circuit(teacher, pairs[:1], circuit, random_circuits=1)
    assert report.full_accuracy == float(whole)
    edges = wb.attribute(teacher, pairs, execution=QUIET).values
    assert edges[edges.isfinite()].abs().max() > 1e-4
    with pytest.raises(InputError, match=r"first_members\(\)"):
        direct_logit_attribution(teacher, pairs)
    assert direct_logit_attribution(teacher, pairs.first_members()).total.isfinite().all()
    with pytest.raises(InputError, match=r"first_members\(\)"):
        training_rows(pairs)
    loss = losses.cross_entropy_of_sets(logits, pairs.answers)
    masses = METRICS["probability"](logits, pairs.answers, pairs.answers)
    torch.testing.assert_close(loss, -masses.log().mean())
    single = replace(pairs, answers=pairs.answers[:, 0], distractors=pairs.distractors[:, 0])
    assert torch.equal(
        losses.cross_entropy_of_sets(logits, single.answers), losses.cross_entropy(logits, single.answers)
    )
