"""Prompts with a common beginning as one sequence: the beginning once, then each prompt's own rest and answer as a
branch.

A branch sees the beginning and itself, at the positions that it has in its own prompt, so that whatever the model
computes in it is what it computes in the prompt alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.tasks.pairs import Pair

Ids = Sequence[int]
PADDING = -1
STEM = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trees:
    """Trees as tensors, with where each answer token is predicted."""

    tokens: Int[Tensor, "tree pos"]
    positions: Int[Tensor, "tree pos"]
    branch: Int[Tensor, "tree pos"]
    """0: the common beginning; i: of the i-th prompt; -1: padding."""
    rows: Int[Tensor, " answers"]
    places: Int[Tensor, " answers"]
    """(tree, place) of the token that predicts an answer token."""
    targets: Int[Tensor, " answers"]
    prompt: Int[Tensor, " answers"]
    """Which prompt an answer token belongs to, counted through all trees."""

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> "Trees":
        """The same on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def visible(self) -> Bool[Tensor, "tree 1 pos pos"]:
        """Which key each query may see; padding sees itself, so that no row is empty."""
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        everything = torch.ones(2 * self.tokens.shape[1:], dtype=torch.bool, device=self.tokens.device)
        earlier = everything.tril()
        seen = earlier & ((key == STEM) | (key == query)) & (key != PADDING)
        return (seen | earlier & everything.triu())[:, None]

    def mask(self, dtype: torch.dtype) -> Float[Tensor, "tree 1 pos pos"]:
        """The same to be added to attention scores: 0, or the lowest number."""
        seen = self.visible()
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def right(self, logits: Float[Tensor, "answers d_vocab"]) -> Bool[Tensor, " prompts"]:
        """Whether all tokens of a prompt's answer have the highest logits, prompt by prompt."""
        first = int(self.prompt.min())
        wrong = torch.zeros(int(self.prompt.max()) - first + 1, dtype=torch.long, device=logits.device)
        return wrong.index_add(0, self.prompt - first, (logits.argmax(-1) != self.targets).long()) == 0

    def batches(self, size: int) -> Iterator["Trees"]:
        """Consecutive batches of at most `size` trees."""
        for start in range(0, len(self), size):
            inside = (self.rows >= start) & (self.rows < start + size)
            part = slice(start, start + size)
            yield Trees(
                tokens=self.tokens[part],
                positions=self.positions[part],
                branch=self.branch[part],
                rows=self.rows[inside] - start,
                places=self.places[inside],
                targets=self.targets[inside],
                prompt=self.prompt[inside],
            )


def trees_of(pairs: Sequence[Pair], tokenizer: Any, *, each: int) -> Trees:
    """The clean prompts of some pairs with their answers; each `each` consecutive ones are one tree."""
    prompts, answers = (_ids(tokenizer, [getattr(pair, name) for pair in pairs]) for name in ("clean", "answer"))
    groups = [slice(start, start + each) for start in range(0, len(prompts), each)]
    return joined([tree(prompts[group], answers[group]) for group in groups])


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """One tree as lists; `answers` holds (branch, place, token)."""

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    answers: list[tuple[int, int, int]]


def tree(prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tree:
    """Prompts and their answers as a tree. The last token of a prompt, which predicts the first of its answer, is
    always its branch's own."""
    common = _common(prompts)
    tokens, positions, branch = list(prompts[0][:common]), list(range(common)), [STEM] * common
    predicted: list[tuple[int, int, int]] = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        own = [*prompt[common:], *answer[:-1]]
        first = len(tokens) + len(prompt) - common - 1
        predicted += [(index, first + place, token) for place, token in enumerate(answer)]
        tokens += own
        positions += range(common, common + len(own))
        branch += [index] * len(own)
    return Tree(tokens=tokens, positions=positions, branch=branch, answers=predicted)


def _common(prompts: Sequence[Ids]) -> int:
    """How many tokens all prompts begin with, at most all but the last of the shortest."""
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if len({prompt[place] for prompt in prompts}) > 1), most)


def joined(trees: Sequence[Tree]) -> Trees:
    """Trees padded on the right to one length."""
    width = max(len(each.tokens) for each in trees)

    def padded(values: list[list[int]], fill: int) -> Int[Tensor, "tree pos"]:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values])

    flat = [(row, place, token, branch) for row, each in enumerate(trees) for branch, place, token in each.answers]
    starts = torch.tensor([0, *[max(branch for branch, _, _ in each.answers) for each in trees]]).cumsum(0)
    rows, places, targets, branches = (torch.tensor(column) for column in zip(*flat, strict=True))
    return Trees(
        tokens=padded([each.tokens for each in trees], 0),
        positions=padded([each.positions for each in trees], 0),
        branch=padded([each.branch for each in trees], PADDING),
        rows=rows,
        places=places,
        targets=targets,
        prompt=starts[rows] + branches - 1,
    )
