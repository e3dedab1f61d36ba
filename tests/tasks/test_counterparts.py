"""Rows whose clean and corrupt prompts differ in length: how their positions are named, what belongs together, and what
is refused."""

import csv
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.tasks.task_tokenizers import bpe_tokenizer
from workbench.errors import InputError
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import PromptPairs, Stage, encode, load_pairs
from workbench.tasks.check import check
from workbench.tasks.pairs import Pair, numbered_pairs
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.tokenizers import read_by_both

TOKENIZER = word_tokenizer()
ROW: dict[str, Any] = {
    "clean": "The apple is in Box F , the book is in Box G . Box F contains the",
    "corrupt": "The cup is in Box G . Box F contains the",
    "answer": " apple",
    "distractor": " book",
    "positions": {"object": "apple", "label": [5], "both": [[4, 9], [16, 19]]},
    "corrupt_positions": {"object": "cup", "label": 5, "both": [1, 4]},
}


def loaded(tmp_path: Path, *rows: dict[str, Any], suffix: str = ".jsonl") -> Any:
    path = tmp_path / f"pairs{suffix}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_pairs(path, TOKENIZER)


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def test_a_row_names_its_positions_in_both_prompts(tmp_path: Path) -> None:
    row = loaded(tmp_path, ROW)[0]
    assert row["positions"] == {"object": [1], "label": [5], "both": [1, 4], "last": [17]}
    assert row["corrupt_positions"] == {"object": [1], "label": [5], "both": [1, 4], "last": [10]}


def test_a_csv_file_holds_them_as_json(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(ROW)
        rows.writerow([json.dumps(value) if isinstance(value, dict) else value for value in ROW.values()])
    assert load_pairs(path, TOKENIZER)[0] == loaded(tmp_path, ROW)[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_counterparts_are_the_tokens_of_the_same_name(tmp_path: Path, side: Any) -> None:
    longer = {**ROW, "clean": ROW["corrupt"], "corrupt": ROW["clean"], "answer": " cup", "distractor": " pot"}
    longer |= {"positions": ROW["corrupt_positions"], "corrupt_positions": ROW["positions"]}
    pairs = encode(loaded(tmp_path, ROW, longer), TOKENIZER, padding_side=side)
    other = pairs.counterparts
    assert other is not None
    assert (
        pairs.corrupt.shape[1] == pairs.clean.shape[1] + 1
    )  # never of one width, lest a mask be taken for the other's
    tokens = pairs.aligned(pairs.corrupt.float()[..., None])[..., 0]
    for number, (row, length) in enumerate(((ROW, 11), (longer, 18))):
        assert int(pairs.corrupt_mask[number].sum()) == length
        assert pairs.corrupt[number][pairs.corrupt_mask[number]].tolist() == TOKENIZER(row["corrupt"])["input_ids"]
        ids = {name: tokens[number][where[number]].tolist() for name, where in pairs.positions.items()}
        assert ids["object"] == [TOKENIZER("cup" if row is ROW else "apple")["input_ids"][0]]
        assert ids["last"] == [TOKENIZER("the")["input_ids"][0]]
        assert ids["both"][0] == ids["object"][0]
        named = pairs.position("object+label+both+last")[number]
        assert torch.equal(other.index[number] >= 0, named)
    assert pairs.rows(slice(1, 2)).fingerprint() != pairs.rows(slice(0, 1)).fingerprint()


def test_pairs_of_equal_length_and_the_same_places_are_plain(tmp_path: Path) -> None:
    """Every token is then the counterpart of its like, and every method has what it needs."""
    equal = {**ROW, "corrupt": ROW["clean"].replace("apple", "cup"), "corrupt_positions": ROW["positions"]}
    equal["corrupt_positions"] = {**ROW["positions"], "object": "cup", "both": [1, 4]}
    named = encode(loaded(tmp_path, equal), TOKENIZER)
    plain = encode(loaded(tmp_path, without(equal, "corrupt_positions")), TOKENIZER)
    assert named.counterparts is None
    assert named.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"corrupt_positions": None}, "18 tokens, the corrupt one 11.*corrupt_positions"),
        ({"corrupt_positions": {"object": "cup"}}, "name the same in both prompts"),
        ({"corrupt_positions": {**ROW["corrupt_positions"], "object": "pear"}}, "the corrupt prompt does not contain"),
        ({"corrupt_positions": {**ROW["corrupt_positions"], "both": [1]}}, "2 tokens in the clean prompt and 1"),
        ({"corrupt_positions": {**ROW["corrupt_positions"], "label": 1}}, "two counterparts"),
        ({"corrupt_positions": {**ROW["corrupt_positions"], "both": [2, 4]}}, "two counterparts"),
        ({"corrupt_positions": {**ROW["corrupt_positions"], "label": 40}}, "outside the 11 tokens"),
        ({"corrupt_positions": ["object"]}, "no object"),
    ],
)
def test_what_does_not_say_which_tokens_belong_together_is_refused(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loaded(tmp_path, {**ROW, **bad})


def test_answers_of_several_tokens_need_equal_lengths(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROW))
    with pytest.raises(InputError, match=r"multi_token.*equal prompt lengths"):
        load_pairs(path, TOKENIZER, multi_token=True)


def test_the_last_tokens_belong_together_by_themselves(tmp_path: Path) -> None:
    pairs = encode(loaded(tmp_path, {**ROW, "positions": {}, "corrupt_positions": {"last": -1}}), TOKENIZER)
    assert pairs.counterparts is not None
    assert torch.equal(pairs.counterparts.index >= 0, pairs.positions["last"])


def test_other_widths_without_counterparts_are_refused(tmp_path: Path) -> None:
    pairs = encode(loaded(tmp_path, ROW), TOKENIZER)
    with pytest.raises(InputError, match="corrupt_positions"):
        PromptPairs(
            clean=pairs.clean,
            corrupt=pairs.corrupt,
            mask=pairs.mask,
            answers=pairs.answers,
            distractors=pairs.distractors,
            positions=pairs.positions,
        )


def test_each_tokenizer_has_its_own_counterparts(tmp_path: Path) -> None:
    """Positions move with a chat template, too; by number they mean other words to the other model."""
    path, text = tmp_path / "pairs.jsonl", {"positions": {"object": "apple"}, "corrupt_positions": {"object": "cup"}}
    path.write_text(json.dumps({**ROW, **text}))
    other = bpe_tokenizer()
    pairs = read_by_both(numbered_pairs(path), TOKENIZER, other, source="pairs", settings=PromptSettings())
    tokenizers: list[Any] = [TOKENIZER, other]
    for side, tokenizer in zip((pairs, pairs.for_teacher), tokenizers, strict=True):
        assert side.counterparts is not None
        ids = side.aligned(side.corrupt.float()[..., None])[..., 0][side.positions["object"]].tolist()
        assert [tokenizer.decode(int(token)).strip() for token in ids] in (["cup"], ["up"], ["p"])
    path.write_text(json.dumps({**ROW, **text, "corrupt_positions": {"object": 1}}))
    with pytest.raises(InputError, match="token index"):
        read_by_both(numbered_pairs(path), TOKENIZER, other, source="pairs", settings=PromptSettings())


class Unequal:
    """A task of one such row."""

    name: ClassVar[str] = "unequal"
    stages: ClassVar[tuple[Stage, ...]] = ()
    chance = 0.5

    def __init__(self, named: bool) -> None:
        self.named = named

    def pairs(self, tokenizer: Any, *, split: Any, scenes: int, seed: int) -> Any:
        columns = ROW if self.named else without(ROW, "corrupt_positions")
        yield Pair(**columns)


@pytest.mark.parametrize("named", [True, False])
def test_the_check_of_a_task_knows_them(named: bool) -> None:
    kinds = {fault.kind for fault in check(Unequal(named), TOKENIZER, scenes=1).faults}
    assert ("unequal lengths" in kinds) != named
    assert "positions" not in kinds
