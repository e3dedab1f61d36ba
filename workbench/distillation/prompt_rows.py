"""Which rows of somebody else's batch are prompts of a set, and where the prompts' named positions are in them.

A trainer's rows hold a prompt and what follows it (an answer, a generated text), padded on either side. Attention is
causal, so at the prompt's tokens the heads compute what they compute on the prompt alone. A row is recognised by its
tokens: it begins with those of the prompt (the longest that fits).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.tasks.base import PromptPairs
from workbench.tasks.positions import position_mask

Tokens = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch:
    """Tokens of some prompts with their named positions; `last` and `all` are there where they are not given."""

    tokens: Tokens
    mask: Mask
    positions: Mapping[str, Mask]

    def position(self, name: str) -> Mask:
        """The mask of a named position, as `PromptPairs.position`."""
        every = torch.arange(self.mask.shape[1], device=self.mask.device)
        last = torch.where(self.mask, every, -1).amax(1, keepdim=True)
        known = {"all": self.mask, "last": every == last, **self.positions}
        return position_mask({key: value.to(self.mask.device) for key, value in known.items()}, name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptRows:
    """The rows of a batch that are prompts of a set."""

    rows: Int[Tensor, " rows"]
    """By their place in the batch."""
    index: Int[Tensor, " rows"]
    """Their prompts by place in the set."""
    batch: TokenBatch
    """These rows with the prompts' positions."""


class PromptFinder:
    """Recognises the clean prompts of a set in a batch."""

    def __init__(self, prompts: PromptPairs) -> None:
        self.prompts = prompts
        self._place: dict[int, dict[bytes, int]] = {}
        for number, (tokens, mask) in enumerate(zip(prompts.clean.cpu(), prompts.mask.cpu(), strict=True)):
            real = tokens[mask]
            self._place.setdefault(len(real), {}).setdefault(real.numpy().tobytes(), number)
        self._lengths = sorted(self._place, reverse=True)

    def rows_in(self, tokens: Tokens, mask: Mask, *, all_rows: bool = True) -> PromptRows:
        """The prompts among the rows. Errors: `InputError` for a row that begins with none of them, if `all_rows`."""
        held, real = tokens.cpu().long(), mask.cpu()
        numbers = [self._number(row[keep]) for row, keep in zip(held, real, strict=True)]
        rows = [row for row, number in enumerate(numbers) if number is not None]
        if all_rows and len(rows) < len(numbers):
            missing = numbers.index(None)
            raise InputError(
                f"{len(numbers) - len(rows)} of the batch's {len(numbers)} rows begin with none of the "
                f"{len(self.prompts)} prompts (row {missing} begins with the tokens "
                f"{held[missing][real[missing]][:8].tolist()}, the first prompt with "
                f"{self.prompts.clean[0][self.prompts.mask[0]][:8].tolist()}). Tokenise both alike (BOS), or set "
                'other_rows="skip" where other rows are mixed in on purpose.'
            )
        index = torch.tensor([number for number in numbers if number is not None], dtype=torch.long)
        chosen = torch.tensor(rows, dtype=torch.long)
        return PromptRows(
            rows=chosen.to(tokens.device), index=index, batch=self._batch(tokens, mask, chosen, index, real)
        )

    def _number(self, row: Int[Tensor, " real"]) -> int | None:
        for length in self._lengths:
            if length <= len(row) and (number := self._place[length].get(row[:length].numpy().tobytes())) is not None:
                return number
        return None

    def _batch(
        self, tokens: Tokens, mask: Mask, rows: Int[Tensor, " _"], index: Int[Tensor, " _"], real: Mask
    ) -> TokenBatch:
        """The k-th real token of a prompt is the k-th real token of its row."""
        prompts = self.prompts.rows(index.to(self.prompts.clean.device))
        inside = torch.zeros(len(rows), tokens.shape[1], dtype=torch.bool)
        positions = {name: inside.clone() for name in prompts.positions}
        for number, row in enumerate(rows.tolist()):
            own = prompts.mask[number].cpu()
            places = real[row].nonzero()[: int(own.sum()), 0]
            inside[number, places] = True
            for name, where in prompts.positions.items():
                positions[name][number, places] = where[number].cpu()[own]
        at = rows.to(tokens.device)
        return TokenBatch(
            tokens=tokens[at],
            mask=mask[at] & inside.to(mask.device),
            positions={name: where.to(tokens.device) for name, where in positions.items()},
        )
