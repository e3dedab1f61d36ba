"""Who gets which rows: whole, disjoint by content, refused with the key to change."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from workbench.cli.commands import _recipe, _study_config
from workbench.cli.parser import parsed
from workbench.errors import InputError
from workbench.experiment.prompts import Prompts
from workbench.experiment.recipe import parse_recipe, read_recipe
from workbench.experiment.runs import RunFolder
from workbench.pretraining import word_tokenizer
from workbench.study.grid import Study
from workbench.tasks.allotment import USES, allot, refuse_copies
from workbench.tasks.base import PromptPairs
from workbench.tasks.entity_tracking import LABELS, OBJECTS

TOKENIZER = word_tokenizer()


def own_rows(count: int) -> list[dict[str, Any]]:
    """Different prompts of one length."""
    named = itertools.islice(itertools.product(OBJECTS[:12], LABELS[:10]), count)
    return [
        {
            "clean": f"The {thing} is in Box {label}. Box {label} contains the",
            "corrupt": "The pen is in Box Y. Box Z contains the",
            "answer": f" {thing}",
            "distractor": " plate",
        }
        for thing, label in named
    ]


def prompts_of(folder: Path, rows: list[dict[str, Any]], data: dict[str, Any], **recipe: Any) -> Prompts:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Prompts(parse_recipe({"teacher": "x", "data": {"pairs": str(file), **data}, **recipe}), TOKENIZER)


def sets_of(prompts: Prompts) -> dict[str, set[bytes]]:
    found: dict[str, PromptPairs | None] = {
        use: getattr(prompts, use) for use in ("discovery", "train", "validation", "test")
    }
    return {use: pairs.prompts() for use, pairs in found.items() if pairs is not None}


def test_every_row_of_any_file_goes_to_one_use() -> None:
    for total, idle in itertools.product(range(120), ([], ["reference"], ["reference", "validation"], ["train"])):
        made = allot(total, {}, idle=idle)
        taken = [row for use in USES for row in range(total)[made.rows_of(use)]]
        assert taken == list(range(total))
        assert all(made.sizes[use] == 0 for use in idle)
        if total >= 5:
            assert all(made.sizes[use] > 0 for use in USES if use not in idle)


def test_thirty_rows() -> None:
    assert str(allot(30, {}, idle=["reference"])) == "30 rows: 0 reference, 10 discovery, 8 train, 4 validation, 8 test"
    chosen = allot(30, {"reference": 40, "discovery": 9, "test": 8}, idle=["reference", "validation"])
    assert str(chosen) == "30 rows: 0 reference, 9 discovery, 13 train, 0 validation, 8 test", (
        "what is idle does not count"
    )


def test_too_many_are_refused_with_the_key_to_lower() -> None:
    with pytest.raises(
        InputError, match=r"30 rows, but 31 .*data.test_scenes 11.*1 too many.*lower data.discovery_scenes"
    ):
        allot(30, {"discovery": 20, "test": 11})
    with pytest.raises(InputError, match=r"none is left for test.*lower data.discovery_scenes \(30\)"):
        allot(30, {"discovery": 30}, idle=["reference", "train", "validation"]).require("discovery", "test")


def test_corrupt_prompts_as_reference_leave_no_row_on_two_sides(tmp_path: Path) -> None:
    """Thirty rows, nine for discovery, eight for the test: all of them used to be discovery prompts."""
    prompts = prompts_of(
        tmp_path, own_rows(30), {"reference": "corrupt", "discovery_scenes": 9, "test_scenes": 8}, training={"steps": 4}
    )
    sets = sets_of(prompts)
    assert {use: len(found) for use, found in sets.items()} == {"discovery": 9, "train": 13, "test": 8}
    for one, other in itertools.combinations(sets.values(), 2):
        assert not one & other
    assert len(prompts.reference) == 9


@pytest.mark.parametrize("reference", ["corrupt", "calibration"])
def test_the_defaults_fit_a_file_of_thirty(tmp_path: Path, reference: str) -> None:
    prompts = prompts_of(tmp_path, own_rows(30), {"reference": reference}, training={"steps": 4, "evaluate_every": 2})
    sets = sets_of(prompts)
    assert set(sets) == {"discovery", "train", "validation", "test"}
    for one, other in itertools.combinations(sets.values(), 2):
        assert one
        assert not one & other
    prompts.require(*USES)


def test_validation_rows_are_not_test_rows(tmp_path: Path) -> None:
    data = {
        "reference": "corrupt",
        "discovery_scenes": 5,
        "train_scenes": 5,
        "validation_scenes": 10,
        "test_scenes": 10,
    }
    prompts = prompts_of(tmp_path, own_rows(30), data, training={"steps": 4, "evaluate_every": 2})
    sets = sets_of(prompts)
    assert [len(sets[use]) for use in ("discovery", "train", "validation", "test")] == [5, 5, 10, 10]
    assert not sets["validation"] & sets["test"]


def test_copied_rows_on_two_sides_are_refused_by_number(tmp_path: Path) -> None:
    rows = own_rows(30)
    rows[27] = rows[12]
    with pytest.raises(InputError, match=r"row 28 \(test\) repeats row 13 \(train\)"):
        prompts_of(tmp_path, rows, {"reference": "corrupt"}, training={"steps": 4}).require("test")
    rows = own_rows(30)
    rows[1] = rows[0]  # both of discovery
    prompts_of(tmp_path, rows, {"reference": "corrupt"}, training={"steps": 4}).require("test")


def test_twenty_copies_are_shown_and_all_counted() -> None:
    made = allot(60, {"discovery": 30, "test": 30})
    with pytest.raises(InputError, match=r"30 prompts on two sides(.*\n){21}  \.\.\. and 10 more"):
        refuse_copies(made, [str(row % 30) for row in range(60)], range(1, 61), source="rows")


def test_left_out_rows_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    rows = own_rows(30)
    rows[3]["answer"] = " zebra"
    rows[27] = rows[12]
    prompts = prompts_of(tmp_path, rows, {"reference": "corrupt", "skip_bad_rows": True}, training={"steps": 4})
    with pytest.raises(InputError, match=r"row 28 \(test\) repeats row 13 \(train\).*|row 28"):
        prompts.require("test")
    assert [(row.number, row.field) for row in prompts.left_out] == [(4, "answer")]
    RunFolder(tmp_path / "run").record_left_out("rows.jsonl", prompts.left_out)
    recorded = json.loads((tmp_path / "run/left_out.json").read_text())
    assert (recorded["source"], recorded["left_out"], recorded["rows"][0]["row"]) == ("rows.jsonl", 1, 4)


@pytest.mark.parametrize(
    ("command", "key"), [("discover", "data.skip_bad_rows"), ("study", "overrides.data.skip_bad_rows")]
)
def test_bad_rows_are_left_out_by_a_word_on_the_command_line(command: str, key: str) -> None:
    words = [command, "--recipe", "demo" if command == "discover" else "study_entity", "--out", "x"]
    for flag in ([], ["--skip-bad-rows"]):
        options = parsed([*words, *flag])
        recipe = _recipe(options) if command == "discover" else Study(_study_config(options), Path("x")).recipe
        assert recipe.data.skip_bad_rows is bool(flag), key


def test_the_bundled_recipes_draw_the_prompts_they_always_drew() -> None:
    """Fingerprints from before there was an allotment."""
    prompts = Prompts(read_recipe("demo"), TOKENIZER)
    found = {use: getattr(prompts, use).fingerprint()[:12] for use in ("reference", "discovery", "train", "test")}
    assert found == {
        "reference": "d90a758c3926",
        "discovery": "a65a502546cd",
        "train": "8a7f58f867ed",
        "test": "9fae1f7c101f",
    }
    assert str(prompts.allotment) == "86 scenes: 30 reference, 6 discovery, 10 train, 0 validation, 40 test"
