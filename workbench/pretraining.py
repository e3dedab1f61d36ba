"""How the bundled models are made: a Llama-style teacher, its pruned student, and an unrelated student, on entity tracking.

Plain training stalls at "some object of the context": moving an object to its label, moving the queried label to the last token, and
matching the two must appear together. Two temporary linear probes on the residual after the first layer (each context label predicts its
object, the last token predicts the queried label) and a curriculum over the number of boxes get past it; no probe is part of a saved model.

Lineage: the pruned student is an early checkpoint of the teacher with whole layers removed, then healed on few boxes: trained less, not
damaged. The unrelated student has the same size and another initialisation: the negative control of every alignment claim.

Every batch is a function of (seed, step) alone, so an interrupted training resumes to the same bits.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workbench import seeds, storage
from workbench.tasks.entity_tracking import LABELS, OBJECTS, Scene, context, draw_scene

CLAUSE = 7
"""Tokens of one clause of a context: `the apple is in Box F ,`; the object is the second, the label the sixth."""
QUERY = 6
"""Tokens of one query with its answer: `Box F contains the apple .`; the answer is predicted at the fourth."""


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PretrainConfig:
    """One bundled model: its size and its training."""

    layers: Annotated[int, Field(ge=1)] = 6
    heads: Annotated[int, Field(ge=1)] = 8
    kv_heads: Annotated[int, Field(ge=1)] = 4
    d_model: Annotated[int, Field(ge=8)] = 128
    d_mlp: Annotated[int, Field(ge=8)] = 256
    init_std: float = 0.05
    seed: int = 0
    batch: int = 64
    queries: int = 8
    """Queries in each training sequence, drawn with replacement (without it later answers are guessed by elimination)."""
    learning_rate: float = 1e-3
    warmup: int = 50
    probe_weight: float = 0.5
    """Weight of the two temporary probes; they are dropped once two boxes are solved."""
    boxes: tuple[int, int] = (2, 7)
    """First and last number of boxes of the curriculum."""
    solved: float = 0.9
    """First-query accuracy (a running mean) that adds a box."""
    stop_at: float = 0.99
    """Accuracy on the last number of boxes that ends the training."""
    max_steps: int = 4000
    checkpoint_every: int = 100


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of our tasks; words and punctuation are one token each."""
    words = ["<pad>", "<unk>", "<bos>", ".", ",", "?", *LABELS, "The", "the", "is", "in", "Box", "contains", *OBJECTS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", padding_side="left")


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(arbitrary_types_allowed=True))
class Lesson:
    """A batch of training sequences: tokens, and where and what the answers and the probes' targets are."""

    tokens: Int[Tensor, "batch pos"]
    answers: Int[Tensor, "batch queries"]
    answer_at: Int[Tensor, " queries"]
    objects: Int[Tensor, "batch boxes"]
    label_at: Int[Tensor, " boxes"]
    queried: Int[Tensor, "batch queries"]


def lesson(vocabulary: dict[str, int], boxes: int, config: PretrainConfig, step: int) -> Lesson:
    """The batch of one step: scenes of the train split, each followed by its queries and their answers."""
    draw = seeds.chooser(config.seed, "lesson", step)
    scenes = [draw_scene(draw, boxes, "train") for _ in range(config.batch)]
    asked = [[draw.randrange(boxes) for _ in range(config.queries)] for _ in scenes]
    tokens = torch.tensor([[vocabulary[word] for word in _words(scene, queries)] for scene, queries in zip(scenes, asked, strict=True)])
    start = CLAUSE * boxes
    answer_at = torch.arange(config.queries) * QUERY + start + 3
    label_at = torch.arange(boxes) * CLAUSE + 5
    return Lesson(
        tokens=tokens,
        answers=tokens[:, answer_at + 1],
        answer_at=answer_at,
        objects=tokens[:, label_at - 4],
        label_at=label_at,
        queried=tokens[:, answer_at - 2],
    )


def _words(scene: Scene, queries: Sequence[int]) -> list[str]:
    text = context(scene).replace(",", " ,").replace(".", " .").split()
    for index in queries:
        thing, label = scene[index]
        text += ["Box", label, "contains", "the", thing, "."]
    return text


def losses(model: LlamaForCausalLM, probes: nn.ModuleDict, batch: Lesson) -> tuple[Float[Tensor, ""], Float[Tensor, ""], float]:
    """Answer loss, probe loss, and accuracy on the first query."""
    output = model(batch.tokens, output_hidden_states=True, use_cache=False)
    logits = output.logits[:, batch.answer_at]
    answer = nn.functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
    first = output.hidden_states[1]
    bound = probes["object"](first[:, batch.label_at]).flatten(0, 1)
    asked = probes["label"](first[:, batch.answer_at]).flatten(0, 1)
    probe = nn.functional.cross_entropy(bound, batch.objects.flatten()) + nn.functional.cross_entropy(asked, batch.queried.flatten())
    accuracy = (logits[:, 0].argmax(-1) == batch.answers[:, 0]).float().mean().item()
    return answer, probe, accuracy
