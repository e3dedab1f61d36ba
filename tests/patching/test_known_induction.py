"""An induction circuit written by hand: `... A B ... A` -> `B`.

    P previous token    at every token    writes the code of the token before it to PREVIOUS
    I induction  at the last one  finds the token whose PREVIOUS is its own code, writes that token's code to ANSWER

Two heads share each step, each with one half of the code. Three corruptions, each of which leaves all but one thing in
place, take apart what the induction heads read: the earlier A (keys, through the previous-token heads), the last A
(queries), and B itself (values).
"""

from collections.abc import Callable, Mapping

import pytest
import torch
from handmade import BLOCK, FIRST, SECOND, code, write_gpt2
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from tests.patching.test_known_edges import Edge, gap, means, strongest
from workbench import seeds
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.discovery import DiscoveryConfig, backward_search
from workbench.circuits.evaluation import evaluate_circuit
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import counterfactual_outputs, plain_logits, reference_means
from workbench.patching.attribution import attribute_edges, exact_edges
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import Pair, PromptPairs, Stage, encode, to_dataset
from workbench.tasks.entity_tracking import OBJECTS
from workbench.values.metrics import accuracy
from workbench.values.refs import Head

LAYERS, HEADS, WIDTH, LENGTH = 4, 4, 128, 12
TOKEN, PREVIOUS, ANSWER, SCRATCH = (slice(start, start + BLOCK) for start in range(0, 4 * BLOCK, BLOCK))
PLACES, BALLAST = slice(4 * BLOCK, 4 * BLOCK + 2 * LENGTH), slice(WIDTH - BLOCK, WIDTH)
SCORE = 60.0
REST = 0.75
"""Score of the first token, where a head rests that finds nothing (its code is 0), as a share of a full match."""
LOGIT = 12.0

PREVIOUS_TOKEN, INDUCTION = {Head(0, 1): FIRST, Head(1, 2): SECOND}, {Head(2, 0): FIRST, Head(3, 3): SECOND}
STAGES = (
    Stage(name="I", title="induction", position="last"),
    Stage(name="P", title="previous token", position="after", into="I", composition="k"),
)
TRUE_MEMBERS = tuple(
    sorted(
        [*(Member(head, "I", "last") for head in INDUCTION), *(Member(head, "P", "after") for head in PREVIOUS_TOKEN)]
    )
)
OUT: set[Edge] = {(str(head), "logits") for head in INDUCTION}
TRUE_EDGES: Mapping[str, set[Edge]] = {
    "earlier": OUT
    | {("embed", f"{head}.v") for head in PREVIOUS_TOKEN}
    | {(str(before), f"{after}.k") for before in PREVIOUS_TOKEN for after in INDUCTION},
    "asked": OUT | {("embed", f"{head}.q") for head in INDUCTION},
    "answer": OUT | {("embed", f"{head}.v") for head in INDUCTION},
}
"""What is corrupted -> the edges that carry it."""


def place(position: int) -> Tensor:
    """The direction of a position: +1 and -1 on a pair of entries."""
    direction = torch.zeros(WIDTH)
    start = PLACES.start + 2 * position
    direction[start], direction[start + 1] = 1.0, -1.0
    return direction


def fill(model: GPT2LMHeadModel, vocabulary: Mapping[str, int]) -> None:
    for word, index in vocabulary.items():
        if word != "The":
            model.transformer.wte.weight[index, TOKEN] = code(index)
        if word in OBJECTS:
            model.lm_head.weight[index, ANSWER] = LOGIT / BLOCK * code(index)
    for position in range(LENGTH):
        model.transformer.wpe.weight[position] = place(position)
    blocks = model.transformer.h
    for head, part in PREVIOUS_TOKEN.items():
        looks_back(blocks[head.layer].attn, head.index, PREVIOUS, part)
    for head, part in INDUCTION.items():
        matches(blocks[head.layer].attn, head.index, PREVIOUS, ANSWER, part)
    looks_back(blocks[0].attn, 3, SCRATCH, FIRST + SECOND)  # a previous-token head whose word nobody reads
    matches(
        blocks[1].attn, 0, PREVIOUS, ANSWER, FIRST + SECOND
    )  # too early: half of PREVIOUS is written in its own layer
    matches(blocks[2].attn, 2, TOKEN, SCRATCH, FIRST + SECOND)  # finds duplicates, to no use
    looks_back(blocks[3].attn, 1, PREVIOUS, FIRST + SECOND)  # too late


def matrices(attention: nn.Module, index: int) -> list[Tensor]:
    """Views of a head's W_Q, W_K, W_V [d_model d_head] and W_O [d_head d_model]."""
    size = WIDTH // HEADS
    columns = [
        attention.c_attn.weight[:, part * WIDTH + index * size : part * WIDTH + (index + 1) * size] for part in range(3)
    ]
    return [*columns, attention.c_proj.weight[index * size : (index + 1) * size]]


def looks_back(attention: nn.Module, index: int, target: slice, part: Tensor) -> None:
    """Attends from each position to the one before it, and copies its token there."""
    query, key, value, output = matrices(attention, index)
    for position in range(LENGTH - 1):
        query[:, position] = SCORE * (WIDTH // HEADS) ** 0.5 * place(position + 1) / 2
        key[:, position] = place(position) / 2
    value[TOKEN, :BLOCK] = torch.eye(BLOCK)
    output[:BLOCK, target] = torch.diag(part)


def matches(attention: nn.Module, index: int, source: slice, target: slice, part: Tensor) -> None:
    """Attends to the token in whose `source` block its own token stands, and copies what it finds there."""
    query, key, value, output = matrices(attention, index)
    score = SCORE * (WIDTH // HEADS) ** 0.5
    query[TOKEN, :BLOCK] = score / BLOCK * torch.eye(BLOCK)
    key[source, :BLOCK] = torch.eye(BLOCK)
    attention.c_attn.bias[index * (WIDTH // HEADS) + BLOCK] = REST * score
    key[:, BLOCK] = place(0) / 2
    value[TOKEN, :BLOCK] = torch.eye(BLOCK)
    output[:BLOCK, target] = torch.diag(part)


def prompts(corrupted: str, *, count: int = 24, seed: int = 0) -> PromptPairs:
    """`The`, random words, and one of them again; `corrupted` says which word another one replaces in the corrupt
    prompt."""
    draw, tokenizer, rows = seeds.chooser(seed, "induction"), word_tokenizer(), []
    for _ in range(count):
        *words, other = ["The", *draw.sample(OBJECTS, LENGTH - 1)]
        at = draw.randint(3, LENGTH - 4)
        clean = [*words, words[at]]
        wrong, where = [*clean], {"earlier": at, "asked": LENGTH - 1, "answer": at + 1}[corrupted]
        wrong[where] = other
        positions = {"earlier": at, "after": at + 1}
        distractor = draw.choice(words[1:at])
        rows.append(
            Pair(
                clean=" ".join(clean),
                corrupt=" ".join(wrong),
                answer=f" {words[at + 1]}",
                distractor=f" {distractor}",
                positions=positions,
            )
        )
    return encode(to_dataset(enumerate(rows), tokenizer, source="induction"), tokenizer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """The handmade model."""
    folder = tmp_path_factory.mktemp("induction")
    return Teacher.load(
        write_gpt2(folder, fill, layers=LAYERS, heads=HEADS, width=WIDTH, ballast=BALLAST, length=LENGTH)
    )


@pytest.mark.parametrize("corrupted", TRUE_EDGES)
def test_it_repeats_what_came_after_and_the_corrupt_prompt_takes_that_away(model, corrupted):
    pairs = prompts(corrupted)
    assert float(accuracy(plain_logits(model, pairs), pairs.answers, pairs.distractors).mean()) == 1.0
    assert float(accuracy(plain_logits(model, pairs.swapped()), pairs.answers, pairs.distractors).mean()) < 0.2
    assert gap(model, pairs) > 4


def test_backward_search_finds_the_circuit_head_by_head_and_role_by_role(model):
    pairs = prompts("earlier")
    found = backward_search(model, pairs, STAGES, DiscoveryConfig(metric="logit_difference"))
    assert found.circuit.members == TRUE_MEMBERS
    for role, scores in found.scores.items():
        for head in scores.ranked():
            effect = float(scores.at(head).mean()) / gap(model, pairs)
            assert effect > 0.3 if role == found.circuit.role_of(head) else abs(effect) < 0.01


@pytest.mark.parametrize("corrupted", TRUE_EDGES)
def test_exact_paths_find_the_edges_that_carry_what_was_corrupted_and_no_other(model, corrupted):
    pairs = prompts(corrupted)
    found, whole = means(exact_edges(model, pairs, metric="logit_difference")), gap(model, pairs)
    for edge, effect in found.items():
        assert effect > 0.25 * whole if edge in TRUE_EDGES[corrupted] else abs(effect) < 0.01 * whole, edge


@pytest.mark.parametrize("corrupted", TRUE_EDGES)
def test_integrated_gradients_rank_those_edges_on_top(model, corrupted):
    found = means(attribute_edges(model, prompts(corrupted), metric="logit_difference", steps=32))
    assert strongest(found, len(TRUE_EDGES[corrupted])) == TRUE_EDGES[corrupted]


@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
def test_the_circuit_alone_does_the_task_and_random_heads_do_not(model, ablation):
    unseen, circuit = (
        prompts("earlier", seed=5),
        Circuit.of(TRUE_MEMBERS, shape=(LAYERS, HEADS), method="by construction"),
    )
    means_or_corrupt: Callable[..., object] = reference_means if ablation == "mean" else counterfactual_outputs
    outside = means_or_corrupt(model, prompts("earlier", seed=6) if ablation == "mean" else unseen)
    report = evaluate_circuit(model, unseen, circuit, outside, random_circuits=3)  # pyright: ignore[reportArgumentType]
    assert report.ablation == ablation
    assert report.faithfulness == 1.0
    assert max(report.random_circuit_accuracy, report.empty_accuracy) <= 0.1
