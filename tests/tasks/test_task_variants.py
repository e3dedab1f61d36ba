"""Entity tracking with operations, indirect objects and docstrings: an independent reader of the text recomputes every
answer."""

import re
from collections import Counter
from typing import Any

import pytest
import torch

from tests.tasks.task_tokenizers import WORDS, bpe_tokenizer
from workbench.errors import InputError
from workbench.tasks.base import Pair, task_dataset
from workbench.tasks.breakdown import accuracy_by
from workbench.tasks.docstring import Docstring
from workbench.tasks.entity_operations import EntityOperations
from workbench.tasks.entity_tracking import EntityTracking
from workbench.tasks.ioi import NAMES as ALL_NAMES
from workbench.tasks.ioi import IndirectObject


def drawn(task: Any, scenes: int, split: Any = "train", seed: int = 0, tokenizer: Any = WORDS) -> list[Pair]:
    return list(task.pairs(tokenizer, split=split, scenes=scenes, seed=seed))


def simulated(text: str) -> tuple[dict[str, str | None], Counter[str], int, str]:
    """(box -> content at the end, box -> operations that name it, operations, queried box), read from the words of a
    prompt."""
    description, *rest = re.split(r"(?<=\.) ", text)
    contents: dict[str, str | None] = {}
    for clause in description.rstrip(".").split(", "):
        if found := re.fullmatch(r"[Tt]he (\w+) is in Box (\w)", clause):
            contents[found[2]] = found[1]
        else:
            found = re.fullmatch(r"Box (\w) is empty", clause)
            assert found, clause
            contents[found[1]] = None
    touched: Counter[str] = Counter()
    for sentence in rest[:-1]:
        if found := re.fullmatch(r"Move the (\w+) from Box (\w) to Box (\w)\.", sentence):
            assert contents[found[2]] == found[1], "only what is there is moved"
            assert contents[found[3]] is None, "and only into empty boxes"
            contents[found[2]], contents[found[3]] = None, found[1]
            touched.update(found.group(2, 3))
        elif found := re.fullmatch(r"Put the (\w+) into Box (\w)\.", sentence):
            assert contents[found[2]] is None
            assert found[1] not in contents.values()
            contents[found[2]] = found[1]
            touched[found[2]] += 1
        else:
            found = re.fullmatch(r"Remove the (\w+) from Box (\w)\.", sentence)
            assert found, sentence
            assert contents[found[2]] == found[1]
            contents[found[2]] = None
            touched[found[2]] += 1
    asked = re.search(r"Box (\w)", rest[-1])
    assert asked
    return contents, touched, len(rest) - 1, asked[1]


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("boxes", [4, 5, 7, 9])
def test_a_simulator_of_the_text_finds_the_same_answer(boxes: int, empty: bool) -> None:
    for pair in drawn(EntityOperations(boxes=boxes, empty=empty), 500):
        contents, touched, operations, asked = simulated(pair.clean)
        assert pair.answer == f" {contents[asked] or 'nothing'}"
        assert pair.distractor.strip() in set(contents.values()) - {contents[asked]}
        assert pair.facts == {"operations": operations, "touching": touched[asked]}
        assert empty or contents[asked], "only full boxes are asked about"
        assert sum(content is None for content in contents.values()) in (1, 2)
        *_, other, stranger = simulated(pair.corrupt)
        assert other == operations
        assert f"Box {stranger} " not in pair.clean + pair.corrupt.rsplit(". ", 1)[0] + " ", (
            "the corrupt query names a letter of neither scene"
        )


def test_every_number_of_operations_and_of_touches_comes_up() -> None:
    facts = [pair.facts or {} for pair in drawn(EntityOperations(), 1500)]
    assert set(Counter(fact["operations"] for fact in facts)) == set(range(13))
    assert {0, 1, 2, 3, 4, 5} <= {fact["touching"] for fact in facts}
    assert {(pair.facts or {})["operations"] for pair in drawn(EntityOperations(fewest=2, most=2), 50)} == {2}
    with pytest.raises(InputError, match="0 to 12"):
        EntityOperations(most=13)


def test_operations_name_the_right_tokens() -> None:
    for row in task_dataset(EntityOperations(), WORDS, split="test", scenes=40, seed=0):
        words = WORDS.tokenize(row["clean"])
        places = row["positions"]
        label = words[places["query_label"][0]]
        same = [index for index, word in enumerate(words) if word == label and words[index - 1] == "Box"]
        assert places["earlier_label"] == same[:-1]
        assert places["latest_label"] == same[-2:-1]
        assert [words[i - 1] for i in places["labels"]] == ["Box"] * len(places["labels"])
        assert [words[i - 1].lower() for i in places["objects"]] == ["the"] * len(places["objects"])


def test_accuracy_by_operations_is_a_count() -> None:
    dataset = task_dataset(EntityOperations(), WORDS, split="test", scenes=120, seed=0)
    touching = [facts["touching"] for facts in dataset["facts"]]
    table = accuracy_by(dataset, torch.tensor([touches < 2 for touches in touching]))
    assert table["touching"].tolist() == sorted(set(touching))
    assert table["prompts"].tolist() == [touching.count(value) for value in table["touching"]]
    assert table["accuracy"].tolist() == [float(value < 2) for value in table["touching"]]
    assert ((table["low"] <= table["accuracy"] + 1e-12) & (table["accuracy"] <= table["high"] + 1e-12)).all()
    with pytest.raises(InputError, match=r"no fact 'touches'.*touching"):
        accuracy_by(dataset, torch.ones(120, dtype=torch.bool), fact="touches")
    with pytest.raises(InputError, match="119 outcomes for 120 rows"):
        accuracy_by(dataset, torch.ones(119, dtype=torch.bool))
    plain = task_dataset(EntityTracking(boxes=3), WORDS, split="test", scenes=1, seed=0)
    with pytest.raises(InputError, match="no fact"):
        accuracy_by(plain, torch.ones(3, dtype=torch.bool))


def recipient_and_subject(text: str) -> tuple[str | None, str]:
    """Who gets the thing (None where all three names differ), and who gives it."""
    names = [word for word in re.findall(r"\w+", text) if word in NAMES]
    once = [name for name in names[:2] if name != names[2]]
    return (once[0] if len(once) == 1 else None), names[2]


NAMES = set(ALL_NAMES)


@pytest.mark.parametrize("corruption", ["abc", "flipped", "random", "swapped"])
def test_indirect_objects_of_each_corruption(corruption: Any) -> None:
    for pair in drawn(IndirectObject(corruption=corruption), 300):
        recipient, subject = recipient_and_subject(pair.clean)
        assert (pair.answer, pair.distractor) == (f" {recipient}", f" {subject}")
        other, giver = recipient_and_subject(pair.corrupt)
        assert pair.corrupt_answer == (None if other is None else f" {other}")
        clean, corrupt = pair.clean.split(), pair.corrupt.split()
        changed = [(a, b) for a, b in zip(clean, corrupt, strict=True) if a != b]
        match corruption:
            case "abc":
                assert other is None
                assert len(changed) == 3
            case "flipped":
                assert (other, giver) == (subject, recipient)
                assert len(changed) == 1
            case "swapped":
                assert (other, giver) == (recipient, subject)
                assert len(changed) == 2
            case "random":
                assert len(changed) == 3
                assert not {other, giver} & {recipient, subject}


def test_orders_and_templates_of_indirect_objects() -> None:
    for pair in drawn(IndirectObject(order="abba", template=0), 50):
        assert re.match(rf"When{pair.answer} and{pair.distractor} went to", pair.clean)
    for pair in drawn(IndirectObject(order="baba", template=1), 50):
        assert re.match(rf"After{pair.distractor} and{pair.answer} left", pair.clean)
    both = [bool(re.search(rf"{pair.answer} and{pair.distractor}", pair.clean)) for pair in drawn(IndirectObject(), 50)]
    assert both == [True, False] * 25
    with pytest.raises(InputError, match="0 to 4"):
        IndirectObject(template=5)


@pytest.mark.parametrize("corruption", ["both", "definition", "documentation"])
def test_the_docstring_goes_on_with_the_next_argument(corruption: Any) -> None:
    places: Counter[int] = Counter()
    for pair in drawn(Docstring(corruption=corruption), 200):
        arguments = re.search(r"\(self, (.*)\):", pair.clean)
        assert arguments
        defined, documented = arguments[1].split(", "), re.findall(r":param (\w+):", pair.clean)
        place = defined.index(documented[-1]) + 1
        places[place] += 1
        assert documented == defined[place - 2 : place]
        assert pair.answer == f" {defined[place]}"
        assert pair.distractor.strip() in set(defined) - {defined[place]}
        other = re.search(r"\(self, (.*)\):", pair.corrupt)
        assert other
        assert not set(other[1].split(", ")) & set(re.findall(r":param (\w+):", pair.corrupt)), (
            "no argument is documented: nothing says which is next"
        )
    assert places == {2: 50, 3: 50, 4: 50, 5: 50}


def test_positions_of_the_docstring_task() -> None:
    for tokenizer in filter(None, (WORDS, bpe_tokenizer())):
        dataset = task_dataset(Docstring(), tokenizer, split="test", scenes=20, seed=0)
        assert len({len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in dataset["clean"]}) == 1
        for row in dataset:
            ids = tokenizer(row["clean"], add_special_tokens=False)["input_ids"]
            word = {name: [tokenizer.decode(ids[i]).strip() for i in where] for name, where in row["positions"].items()}
            assert word["definition_answer"] == [row["answer"].strip()]
            assert word["definition_previous"] == word["documented_last"] == word["documented"][-1:]
            assert word["last"] == ["param"]
