"""A user's own rows: what a file may hold, and that every bad row is named with its reason and remedy."""

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.tasks.task_tokenizers import bpe_tokenizer
from workbench.errors import InputError
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import Pair, encode, load_pairs, to_dataset
from workbench.tasks.pairs import numbered_pairs
from workbench.tasks.tokenizers import read_by_both

TOKENIZER = word_tokenizer()
GOOD: dict[str, Any] = {
    "clean": "The apple is in Box F. Box F contains the",
    "corrupt": "The book is in Box G. Box H contains the",
    "answer": " apple",
    "distractor": " book",
}
LENGTH = 11


def jsonl(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return file


def as_csv(folder: Path, *rows: dict[str, Any]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "rows.csv").write_text(text.getvalue())
    return folder / "rows.csv"


def places(folder: Path, position: Any) -> list[int]:
    return load_pairs(jsonl(folder, {**GOOD, "positions": {"x": position}}), TOKENIZER)[0]["positions"]["x"]


@pytest.mark.parametrize(
    ("position", "tokens"),
    [
        (0, [0]),
        (-1, [LENGTH - 1]),
        (-LENGTH, [0]),
        ([5, -3, 5], [5, 8]),
        ("apple", [1]),
        ("Box", [7]),  # the last of two
        ("Box F", [8]),  # its last token, where it stands last
        ([[4, 9]], [1]),
        ([[4, 9], 3, [0, 3]], [0, 1, 3]),
        ([[0, 9]], [0, 1]),
    ],
)
def test_what_a_position_may_be(tmp_path: Path, position: Any, tokens: list[int]) -> None:
    assert places(tmp_path, position) == tokens


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("", "no token stands"),
        (" ", "no token stands"),
        ("pear", "does not contain"),
        (None, r"None; give a token's number"),
        (1.0, r"1\.0; give a token's number"),
        (True, "True; give"),
        ([], r"\[\]; give"),
        ([None], "give a token's number"),
        ([True], "give a token's number"),
        ([1.5], "give a token's number"),
        ([[1]], "give a token's number"),
        ([[1, 2, 3]], "give a token's number"),
        ([["a", "b"]], "give a token's number"),
        ({"a": 1}, "give a token's number"),
        (LENGTH, "outside the 11 tokens"),
        (-LENGTH - 1, "outside the 11 tokens"),
        (2**70, "outside the 11 tokens"),
        ([[4, 400]], "outside the .* characters"),
        ([[9, 4]], "outside the .* characters"),
        ([[-3, 4]], "outside the .* characters"),
        ([[3, 4]], "outside"),  # a space between two tokens
    ],
)
def test_what_is_no_position_is_refused_with_what_is_one(tmp_path: Path, position: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"row 1: position 'x'.*{message}"):
        places(tmp_path, position)


@pytest.mark.parametrize("columns", [{"positions": 3}, {"positions": "x"}, {"positions": [1]}, {"positions": True}])
def test_positions_are_an_object(tmp_path: Path, columns: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"row 1: positions .*write for example"):
        load_pairs(jsonl(tmp_path, {**GOOD, **columns}), TOKENIZER)


def test_last_and_all_keep_their_meaning(tmp_path: Path) -> None:
    every = list(range(LENGTH))
    for said in ({"last": -1}, {"last": "the"}, {"last": LENGTH - 1}, {"all": every}, {}):
        read = load_pairs(jsonl(tmp_path, {**GOOD, "positions": {**said, "x": 1}}), TOKENIZER)
        assert read[0]["positions"] == {"x": [1], "last": [LENGTH - 1]}
        assert encode(read, TOKENIZER).positions["all"].all()
    for said in ({"last": 2}, {"all": 0}, {"last": [0, -1]}, {"all": [-1]}):
        with pytest.raises(InputError, match=r"always means"):
            load_pairs(jsonl(tmp_path, {**GOOD, "positions": said}), TOKENIZER)


@pytest.mark.parametrize("fact", [1.5, 1.0, True, None, "2", 2**31, 2**40, [1], {}])
def test_facts_are_whole_numbers(tmp_path: Path, fact: Any) -> None:
    with pytest.raises(InputError, match=r"row 1: fact 'n' is .*whole numbers"):
        load_pairs(jsonl(tmp_path, {**GOOD, "facts": {"n": fact}}), TOKENIZER)
    assert load_pairs(jsonl(tmp_path, {**GOOD, "facts": {"n": 2**31 - 1}}), TOKENIZER)[0]["facts"] == {"n": 2**31 - 1}


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    """U+2028, U+0085 and a form feed are no ends of lines in JSONL."""
    for sign in ("\u2028", "\x85", "\u2029", "\x1c"):
        row = {**GOOD, "corrupt_answer": f"a{sign}b"}
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        assert load_pairs(file, TOKENIZER)[0]["corrupt_answer"] == f"a{sign}b"


def test_encodings(tmp_path: Path) -> None:
    text = json.dumps({**GOOD, "corrupt_answer": "café"}, ensure_ascii=False)
    file = tmp_path / "rows.jsonl"
    for content in (text.encode(), text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode() + b"\r\n\r\n"):
        file.write_bytes(content)
        assert load_pairs(file, TOKENIZER)[0]["corrupt_answer"] == "café"
    for encoding in ("latin-1", "utf-16", "utf-32"):
        file.write_bytes(b"\n" + text.encode(encoding))
        with pytest.raises(InputError, match=r"line \d+: byte 0x.. is not UTF-8; save the file as UTF-8"):
            load_pairs(file, TOKENIZER)


@pytest.mark.parametrize("column", ["clean", "corrupt", "answer", "distractor", "corrupt_answer"])
def test_half_a_character_is_refused(tmp_path: Path, column: str) -> None:
    with pytest.raises(InputError, match=rf"row 1: .*{column}.* holds half of a character"):
        load_pairs(jsonl(tmp_path, {**GOOD, column: "The \ud800"}), TOKENIZER)


def test_an_answer_that_merges_with_the_prompt_is_refused() -> None:
    """Byte pairs read "... the bo" + "ok" as another last token than that of the prompt."""
    tokenizer = bpe_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = "The apple is in Box F. Box F contains the b"
    merging = [word for word in tokenizer.get_vocab() if word.isalpha() and word.isascii() and len(ids(word)) == 1]
    merging = [word for word in merging if ids(prompt + word) != ids(prompt) + ids(word)]
    assert merging
    for word in merging[:20]:
        pair = Pair(clean=prompt, corrupt=prompt.replace("F", "G"), answer=word, distractor=" the", positions={})
        for several in (False, True):
            with pytest.raises(InputError, match=r"row 1: the answer .* merges with the end of the prompt"):
                to_dataset([(1, pair)], tokenizer, source="rows", multi_token=several)
    good = Pair(
        clean=prompt[:-2], corrupt=prompt[:-2].replace("F", "G"), answer=" apple", distractor=" book", positions={}
    )
    assert len(to_dataset([(1, good)], tokenizer, source="rows", multi_token=True)) == 1


def test_all_bad_rows_are_listed_and_counted(tmp_path: Path) -> None:
    bad = [b"{nonsense", {**GOOD, "answer": " zebra"}, {**GOOD, "clean": None}, {**GOOD, "positions": {"x": 40}}, [3]]
    with pytest.raises(InputError) as error:
        load_pairs(jsonl(tmp_path, GOOD, *bad, GOOD), TOKENIZER)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"5 of 7 rows of {tmp_path / 'rows.jsonl'} can't be used (rows count from 1")
    assert [line.split(":")[0].strip() for line in lines[1:6]] == [f"row {number}" for number in range(2, 7)]
    assert [line.rpartition(" [")[2] for line in lines[2:5]] == ["answer]", "clean]", "positions]"]
    assert "skip_bad_rows" in lines[-1]
    with pytest.raises(InputError) as error:
        load_pairs(jsonl(tmp_path, GOOD, *[b"x"] * 50), TOKENIZER)
    assert len(str(error.value).splitlines()) == 1 + 20 + 1 + 1
    assert "... and 30 more" in str(error.value)


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = jsonl(tmp_path, GOOD, b"{nonsense", {**GOOD, "answer": " zebra"}, {**GOOD, "distractor": " cup"})
    with caplog.at_level(logging.WARNING, logger="workbench"):
        read = load_pairs(file, TOKENIZER, skip_bad_rows=True)
    assert read["distractor"][:] == [" book", " cup"]
    assert "2 rows are left out, 2 are used" in caplog.text
    assert "row 2: not JSON" in caplog.text
    with pytest.raises(InputError, match=r"2 of 2 rows"):
        load_pairs(jsonl(tmp_path, b"x", b"y"), TOKENIZER, skip_bad_rows=True)


def test_rows_that_one_of_two_readers_cannot_read_are_left_out_for_both() -> None:
    pieces = bpe_tokenizer()
    pairs = [Pair(**GOOD, positions={}), Pair(**{**GOOD, "answer": " zebra"}, positions={}), Pair(**GOOD, positions={})]
    numbered = list(enumerate(pairs, 1))
    with pytest.raises(InputError, match=r"1 of 3 rows.*\n  row 2: "):
        read_by_both(numbered, TOKENIZER, pieces, source="rows")
    both = read_by_both(numbered, TOKENIZER, pieces, source="rows", skip_bad_rows=True)
    assert len(both) == len(both.for_teacher) == 2


def test_repeated_prompts_are_named_by_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {**GOOD, "clean": GOOD["clean"].replace("F", "Q")}
    with caplog.at_level(logging.WARNING, logger="workbench"):
        load_pairs(jsonl(tmp_path, GOOD, other, GOOD), TOKENIZER)
    assert "row 3 repeats row 1" in caplog.text


def test_csv_keeps_texts_as_they_are(tmp_path: Path) -> None:
    """Numbers, NA and leading spaces are texts, and positions are JSON."""
    row = {**GOOD, "positions": '{"x": "apple", "y": 3}', "corrupt_answer": "", "facts": '{"n": 4}'}
    read = load_pairs(as_csv(tmp_path, row), TOKENIZER)[0]
    assert read["answer"] == " apple"
    assert read["positions"] == {"x": [1], "y": [3], "last": [LENGTH - 1]}
    assert read["facts"] == {"n": 4}
    assert "corrupt_answer" not in read
    assert numbered_pairs(as_csv(tmp_path, {**GOOD, "answer": " 07", "distractor": "NA"}))[0][1].answer == " 07"


@pytest.mark.parametrize("positions", ["apple", "{x: 1}", '{"x": NaN}', '{"x": 1, "x": 2}', "[" * 5000, "nan"])
def test_positions_of_a_csv_that_are_not_json(tmp_path: Path, positions: str) -> None:
    with pytest.raises(InputError, match=r"row 1: positions is not JSON"):
        load_pairs(as_csv(tmp_path, {**GOOD, "positions": positions}), TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no pairs; give one pair a row"),
        ("a.jsonl", b"\n\n", "holds no pairs"),
        ("a.csv", b"", "holds no pairs"),
        ("a.csv", b"clean,corrupt,answer,distractor\n", "holds no pairs"),
        ("a.csv", b"clean,clean\na,b\n", "names a column twice"),
        ("a.csv", b'clean,corrupt\n"a', "line 2: not CSV"),
        ("a.csv", b"clean,corrupt\na,b,c\n", "row 1: 3 cells where the first line names 2"),
        ("a.parquet", b"", "no Parquet file"),
        ("a.parquet", b"PAR1 noise PAR1", "no Parquet file"),
        ("a.txt", b"{}", "neither .jsonl, .csv nor .parquet"),
        ("a.jsonl", b"[" * 100_000, "nested too deep"),
        ("a.jsonl", b'{"clean": "a", "clean": "b"}', "the key 'clean' stands twice"),
        ("a.jsonl", b'{"clean": NaN}', "NaN is no number"),
        ("a.jsonl", b"9" * 5000, "row 1: not"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_pairs(tmp_path / name, TOKENIZER)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "plain"])
def test_a_directory_in_a_files_place(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"is a directory; give a JSONL, CSV or Parquet file"):
        load_pairs(tmp_path / name, TOKENIZER)


@pytest.mark.parametrize("source", ["nobody/nothing", "a\x00b.jsonl", "x" * 5000])
def test_sources_that_are_none(source: Any) -> None:
    with pytest.raises(InputError):
        numbered_pairs(source)


def test_columns_of_objects_have_gaps_in_parquet(tmp_path: Path) -> None:
    """Arrow gives every row all names; null is then no position, and the names differ."""
    rows = [{**GOOD, "positions": {"x": [1], "y": None}}, {**GOOD, "positions": {"x": None, "y": [2]}}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r"row 2: names the positions \['last', 'y'\], the first good row \['last', 'x'\]"
    ):
        load_pairs(tmp_path / "a.parquet", TOKENIZER)
