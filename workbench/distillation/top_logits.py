"""A teacher's distribution by its largest logits: k of them by token, and the mass of all others as one.

    p_i = exp(z_i / T) / Z for the k kept tokens,   p_rest = (SUM of exp(z_j / T) over all others) / Z

A divergence from the student is then that of the two distributions over k + 1 outcomes, for which the student's other
tokens are put together too. So the teacher's tail says how much mass belongs there, and not where in it. Putting
outcomes together lowers a KL divergence, never raises it; where k covers the vocabulary nothing is put together. A
vocabulary of 128,256 at k = 64 takes 516 bytes a prompt in place of 513,024 (float32).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopLogits:
    """The largest logits of some prompts, and what is needed of the others."""

    tokens: Int[Tensor, "batch *token k"]
    logits: Float[Tensor, "batch *token k"]
    """In falling order."""
    rest: Float[Tensor, "batch *token"]
    """Log of the summed exponentials of all other logits over the temperature; -inf where there are none."""
    d_vocab: int
    temperature: float
    """At which `rest` was summed."""

    def rows(self, index: Int[Tensor, " rows"] | Bool[Tensor, "batch token"]) -> "TopLogits":
        """Those of some prompts; with a mask over answer tokens, of these tokens one by one."""
        return replace(self, tokens=self.tokens[index], logits=self.logits[index], rest=self.rest[index])

    def to(self, device: torch.device | str) -> "TopLogits":
        """The same on another device."""
        return replace(self, tokens=self.tokens.to(device), logits=self.logits.to(device), rest=self.rest.to(device))


def top_logits(logits: Float[Tensor, "batch *token d_vocab"], k: int, *, temperature: float = 1.0) -> TopLogits:
    """The k largest logits of each prompt (all, where there are fewer). Source: equation above."""
    k = min(k, logits.shape[-1])
    values, tokens = logits.topk(k, -1)
    return TopLogits(
        tokens=tokens.int(),
        logits=values,
        rest=_others(logits.float() / temperature, tokens),
        d_vocab=logits.shape[-1],
        temperature=temperature,
    )


def over_outcomes(
    student: Float[Tensor, "batch d_vocab"], teacher: TopLogits, *, temperature: float
) -> tuple[Float[Tensor, "batch outcomes"], Float[Tensor, "batch outcomes"]]:
    """Log-probabilities of (student, teacher) of the k kept tokens and, unless these are all, of the rest.

    Errors: `InputError` for another temperature than the rest was summed at.
    """
    if temperature != teacher.temperature:
        raise InputError(
            f"the teacher's top logits were kept for temperature {teacher.temperature:g}, and the loss is at "
            f"{temperature:g}; make the cache again for that, or keep all logits."
        )
    tokens, scaled = teacher.tokens.long(), student.float() / temperature
    target = teacher.logits.float() / temperature
    chosen = scaled.gather(-1, tokens)
    if tokens.shape[1] < teacher.d_vocab:
        chosen = torch.cat([chosen, _others(scaled, tokens)[:, None]], -1)
        target = torch.cat([target, teacher.rest[:, None].float()], -1)
    return chosen.log_softmax(-1), target.log_softmax(-1)


def _others(
    logits: Float[Tensor, "batch *token d_vocab"], tokens: Int[Tensor, "batch *token k"]
) -> Float[Tensor, "batch *token"]:
    """Log of the summed exponentials of all logits but these tokens'."""
    return logits.scatter(-1, tokens, -torch.inf).logsumexp(-1)
