"""Theory of mind: an independent reader of the text agrees about every belief, no shortcut beats chance, and
counterfactuals change what they say."""

import re
from collections import Counter
from typing import Any

import pytest

from tests.tasks.task_tokenizers import WORDS, bpe_tokenizer
from workbench.errors import InputError
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import Pair, encode, task_dataset
from workbench.tasks.check import shortcuts
from workbench.tasks.theory_of_mind import TheoryOfMind

SCENARIOS, COUNTERFACTUALS = ("visibility", "false_belief"), ("story", "order", "states", "visibility")
OPTIONS = [{"scenario": scenario, "counterfactual": kind} for scenario in SCENARIOS for kind in COUNTERFACTUALS]
NAME, WORD = r"([A-Z]\w+)", r"(\w+)"


def drawn(scenes: int, split: Any = "train", seed: int = 0, **options: Any) -> list[Pair]:
    return list(TheoryOfMind(**options).pairs(WORDS, split=split, scenes=scenes, seed=seed))


def believed(text: str) -> str:
    """What the asked character believes, from the words of the prompt alone."""
    text = text.rsplit("Story: ", 1)[-1]
    return belief_about_place(text) if "absent" in text or "present" in text else belief_about_content(text)


def belief_about_content(text: str) -> str:
    fills = re.findall(
        rf"{NAME} (?:takes|picks|lifts) a (?:closed|covered|sealed) {WORD} and (?:fills|packs|loads) it with {WORD}\.",
        text,
    )
    sight = re.findall(rf"{NAME} (can|cannot) (?:see what|watch how|notice anything) {NAME}", text)
    who, thing = re.search(rf"What does {NAME} \w+ the {WORD} \w+\?", text).groups()  # type: ignore[union-attr]
    assert len(fills) == len(sight) == 2
    actor, content = {object_: (actor, content) for actor, object_, content in fills}[thing]
    sees = {(watcher, watched): can == "can" for watcher, can, watched in sight}
    return content if actor == who or sees[who, actor] else "unknown"


def belief_about_place(text: str) -> str:
    first = re.search(rf"Both \w+ {NAME} \w+ the {WORD} in the {WORD}\.", text)
    then = re.search(rf"{NAME} is (absent|present) (?:while|when|as) {NAME} \w+ the {WORD} to the {WORD}\.", text)
    asked = re.search(rf"{NAME} \w+ that the {WORD} is in the$", text)
    assert first
    assert then
    assert asked
    observer, presence, mover, thing, second_place = then.groups()
    assert mover == first[1] != observer
    assert thing == first[2] == asked[2]
    return first[3] if asked[1] == observer and presence == "absent" else second_place


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_reader_of_the_text_finds_the_same_belief_in_both_prompts(options: dict[str, Any]) -> None:
    for instruction in (False, True):
        for pair in drawn(400, instruction=instruction, **options):
            assert f" {believed(pair.clean)}" == pair.answer != pair.distractor
            assert f" {believed(pair.corrupt)}" == pair.corrupt_answer != pair.answer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_shortcut_beats_chance_by_two_points(options: dict[str, Any]) -> None:
    task = TheoryOfMind(**options)
    pairs = drawn(3600, **options)
    found, unknown = shortcuts(pairs), sum(pair.answer == " unknown" for pair in pairs) / len(pairs)
    assert max(*found.values(), unknown) <= task.chance + 0.02
    assert found["the first candidate mentioned"] > 0.3, "the rule names candidates: it would show a tilt"


def test_the_balance_test_would_notice() -> None:
    tilted = [pair for pair in drawn(1200) if pair.answer != " unknown" or len(pair.clean) % 2]
    assert max(shortcuts(tilted).values()) > TheoryOfMind().chance + 0.02


def test_visibilities_questions_and_characters_are_even() -> None:
    pairs = drawn(2400)
    cells = Counter((pair.facts["first_sees"], pair.facts["second_sees"], pair.facts["own"]) for pair in pairs)  # type: ignore[index]
    assert {key[:2] for key in cells} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(cells[sight, other, 1] == 200 for sight in (0, 1) for other in (0, 1)), (
        "a third of the questions, evenly over the four variants"
    )
    assert Counter(pair.answer == " unknown" for pair in pairs)[True] == 800


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_counterfactuals_change_what_they_say_and_nothing_else(options: dict[str, Any]) -> None:
    kind, scenario = options["counterfactual"], options["scenario"]
    for pair in drawn(60, **options):
        clean, corrupt = (re.findall(r"\w+|[.,?:]", text) for text in (pair.clean, pair.corrupt))
        changed = {(a, b) for a, b in zip(clean, corrupt, strict=True) if a != b}
        if kind == "visibility":
            assert changed in (
                {("can", "cannot")},
                {("cannot", "can")},
                {("absent", "present")},
                {("present", "absent")},
            )
        elif kind == "states":
            assert len(changed) == 2
            assert not {b for _, b in changed} & set(clean)
        elif kind == "order":
            assert sorted(clean) == sorted(corrupt)
            assert {(b, a) for a, b in changed} == changed
            assert len(changed) == (4 if scenario == "visibility" else 2)
        else:
            assert len(changed) >= 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_positions_name_the_right_words(options: dict[str, Any]) -> None:
    for row in task_dataset(TheoryOfMind(**options), WORDS, split="test", scenes=48, seed=3):
        words = WORDS.tokenize(row["clean"])
        at = {name: [words[index] for index in indices] for name, indices in row["positions"].items()}
        assert at["query_character"] == at["character"]
        assert at["query_object"] == at["object"]
        assert sorted(at["states"]) == sorted(at["state"] + at["other_state"])
        assert row["answer"].strip() in (at["state"][0], "unknown")
        assert at["visibility_word"][0] in at["visibility"]
        if options["scenario"] == "visibility":
            assert at["visibility"][:2] == [*at["character"], *at["visibility_word"]]
            assert at["visibility"][-1] == "."
            assert at["last"] == [":"]


def test_prompts_line_up_and_every_word_is_known() -> None:
    for tokenizer in filter(None, (WORDS, bpe_tokenizer())):
        for options in OPTIONS:
            pairs = encode(
                task_dataset(TheoryOfMind(**options), tokenizer, split="calibration", scenes=48, seed=1), tokenizer
            )
            assert pairs.mask.all(), "all wordings have one length: means position by position are defined"
            assert not (pairs.clean == tokenizer.unk_token_id).any() or tokenizer is not WORDS


def test_splits_are_disjoint_and_one_wording_can_be_chosen() -> None:
    splits = {split: {pair.clean for pair in drawn(300, split=split)} for split in ("train", "calibration", "test")}
    assert (
        not splits["train"] & splits["test"]
        | splits["train"] & splits["calibration"]
        | splits["calibration"] & splits["test"]
    )
    assert all(pair.clean.startswith("In the") for pair in drawn(30, wording=1))
    assert len({pair.clean[:3] for pair in drawn(30)}) == 3


def test_bad_options_and_poor_tokenizers_are_refused() -> None:
    with pytest.raises(InputError, match="0 to 2"):
        TheoryOfMind(wording=3)
    with pytest.raises(InputError, match=r"lacks \['can', 'cannot', 'unknown'\].*word_level_tokenizer"):
        next(iter(TheoryOfMind().pairs(word_tokenizer(), split="test", scenes=1, seed=0)))
