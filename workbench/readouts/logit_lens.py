"""The logit lens: what the residual stream of each layer would predict if it went straight to the final norm and the
unembedding.

Every stage is normalised by its own scale, and the last stage is the model's own prediction (refused where it is not).
What an early stage seems to predict is only what the unembedding reads there; the model itself may keep things in
another basis. Source: nostalgebraist 2020.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, last_position
from workbench.readouts.output import Output, refuse_unlike
from workbench.readouts.text import token_texts
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric, metric_named
from workbench.values.scores import Scores, joined

BATCH = 128
"""Default number of prompts in one forward."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitLens:
    """One prompt seen through the lens: at each stage and position the likeliest next tokens, and how likely the answer
    is."""

    tokens: tuple[str, ...]
    """The prompt's tokens as text."""
    stages: tuple[str, ...]
    """`embed`, then `L0`, `L1`, ...: the stream after each block; the last is the model's prediction."""
    top: tuple[tuple[tuple[str, ...], ...], ...]
    """[stage][position][rank]: next tokens as text, likeliest first."""
    probabilities: Float[Tensor, "stage pos rank"]
    """Of `top`."""
    answer: str
    """The token whose probability is in `of_answer`, as text."""
    of_answer: Float[Tensor, "stage pos"]
    """Probability of the answer as the next token."""

    def to_frame(self) -> pd.DataFrame:
        """A row per stage and position: the likeliest next token with its probability, and the answer's."""
        rows = [
            (
                stage,
                place,
                token,
                self.top[s][place][0],
                float(self.probabilities[s, place, 0]),
                float(self.of_answer[s, place]),
            )
            for s, stage in enumerate(self.stages)
            for place, token in enumerate(self.tokens)
        ]
        return pd.DataFrame(rows, columns=["stage", "position", "token", "top", "probability", "answer_probability"])


@torch.no_grad()
def logit_lens(model: HookedModel, tokens: Int[Tensor, " pos"], answer: int, *, top: int = 5) -> LogitLens:
    """Read one prompt (without padding) at all positions and stages; `top` next tokens are kept of each.

    Errors: `InputError` in training mode, for an answer outside the vocabulary, and for a model whose last stage is not
    its prediction.
    """
    model.require_eval()
    if not 0 <= answer < model.d_vocab:
        raise InputError(f"{answer} is no token of a vocabulary of {model.d_vocab}; give the answer's token id.")
    batch, mask = tokens[None].to(model.device), torch.ones(1, len(tokens), dtype=torch.bool, device=model.device)
    final, streams = _streams(model, batch, mask)
    logits = Output.of(model).logits(streams[:, 0])
    refuse_unlike(model, logits[-1, -1], final[0], float(final.abs().max()))
    likely = logits.softmax(-1)
    best = likely.topk(top, -1)
    texts = [[token_texts(model, ids) for ids in rows] for rows in best.indices]
    return LogitLens(
        tokens=token_texts(model, tokens),
        stages=stage_names(model),
        top=tuple(map(tuple, texts)),
        probabilities=best.values.cpu(),
        answer=token_texts(model, torch.tensor([answer]))[0],
        of_answer=likely[..., answer].cpu(),
    )


@torch.no_grad()
def lens_scores(model: HookedModel, pairs: PromptPairs, *, metric: str | Metric, batch: int = BATCH) -> Scores:
    """A metric of what each stage predicts at the last token of the clean prompts: [stage example].

    Errors: `InputError` in training mode, for an unknown metric, and for a model whose last stage is not its
    prediction.
    """
    model.require_eval()
    output, measured, parts = Output.of(model), metric_named(metric), []
    for part in pairs.batches(batch):
        final, streams = _streams(model, part.clean, part.mask)
        rows = torch.arange(len(part), device=final.device)
        logits = output.logits(streams[:, rows, last_position(part.mask)])
        refuse_unlike(model, logits[-1], final, float(final.abs().max()))
        values = torch.stack([measured(stage, part.answers, part.distractors) for stage in logits]).float().cpu()
        parts.append(
            Scores(
                values=values,
                axes=("stage", "example"),
                labels={"stage": stage_names(model)},
                unit=f"{measured.unit}, logit lens",
            )
        )
    return joined(parts)


def stage_names(model: HookedModel) -> tuple[str, ...]:
    """`embed`, `L0`, `L1`, ..."""
    return ("embed", *(f"L{layer}" for layer in range(model.n_layers)))


def _streams(
    model: HookedModel, tokens: Tensor, mask: Tensor
) -> tuple[Float[Tensor, "batch d_vocab"], Float[Tensor, "stage batch pos d_model"]]:
    names = [hooks.residual_pre(0), *(hooks.residual_post(layer) for layer in range(model.n_layers))]
    logits, activations = model.activations(tokens, mask, names)
    return logits, torch.stack([activations[name] for name in names])
