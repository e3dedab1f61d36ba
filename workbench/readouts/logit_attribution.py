"""Direct logit attribution: what each head, each MLP, the embedding and the biases write on the way from answer to
distractor.

The final residual stream is the sum of everything that was written to it; with the final norm's scale frozen at its
value in this run, the logit difference is the sum of the parts' shares, exactly (and refused where the parts do not sum
to the model's own logits). A share is a direct effect in this run only: it says what a part writes, not what the model
would do without it, which path patching and ablation measure.

Sign: positive pushes towards the answer. Source: Elhage et al. 2021; Wang et al. 2022, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel, last_position
from workbench.readouts.output import Output, refuse_unlike
from workbench.tasks.base import PromptPairs
from workbench.values.scores import Scores

UNIT = "share of the logit difference, direct"
BATCH = 128
"""Default number of prompts in one forward."""
EMBEDDING, FINAL = "embed", "final biases"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitAttribution:
    """Shares of logit(answer) - logit(distractor) at the last token. All parts of an example sum to its `total`."""

    heads: Scores
    """[layer head example]"""
    mlps: Scores
    """[layer example], with the MLPs' own biases."""
    rest: Scores
    """[part example]: `embed` (with positions), the attention's output bias of each layer that has one, `final biases`
    (norm and unembedding)."""
    total: Float[Tensor, " example"]
    """The model's logit difference, as it was measured."""

    def sum(self) -> Float[Tensor, " example"]:
        """The sum of all parts."""
        return self.heads.values.sum((0, 1)) + self.mlps.values.sum(0) + self.rest.values.sum(0)

    def to_frame(self) -> pd.DataFrame:
        """A row per part: `part` (L2H0, M2, embed, ...), mean, 95 % interval, examples."""
        heads, mlps, rest = (scores.to_frame() for scores in (self.heads, self.mlps, self.rest))
        named = [
            heads.assign(part=heads["layer"] + heads["head"]),
            mlps.assign(part=mlps["layer"].str.replace("L", "M")),
            rest,
        ]
        frame = pd.concat(
            [part.loc[:, ["part", "mean", "low", "high", "examples"]] for part in named], ignore_index=True
        )
        return frame.sort_values("mean", key=abs, ascending=False, kind="stable", ignore_index=True)


@torch.no_grad()
def direct_logit_attribution(model: HookedModel, pairs: PromptPairs, *, batch: int = BATCH) -> LogitAttribution:
    """Attribute the clean prompts' logit difference at their last token.

    Errors: `InputError` in training mode, for sets of answers (a mass is no direction in the residual stream), and for
    a model whose parts do not sum to its logits (post-norm blocks, soft-capped logits).
    """
    model.require_eval()
    if pairs.has_sets:
        raise InputError(
            "direct logit attribution reads along the direction between two tokens, and these pairs have sets of "
            "answers; give `pairs.first_members()`, or use path patching, which takes sets."
        )
    output = Output.of(model)
    batches = [_attributed(model, output, part) for part in pairs.batches(batch)]
    heads, mlps, rest, total = (torch.cat(parts, -1).cpu() for parts in zip(*batches, strict=True))
    layers = tuple(f"L{layer}" for layer in range(model.n_layers))
    names = (EMBEDDING, *(f"L{layer} b_O" for layer in _output_biases(model)), FINAL)
    return LogitAttribution(
        heads=Scores.of_heads(heads, unit=UNIT),
        mlps=Scores(values=mlps, axes=("layer", "example"), labels={"layer": layers}, unit=UNIT),
        rest=Scores(values=rest, axes=("part", "example"), labels={"part": names}, unit=UNIT),
        total=total,
    )


def _attributed(model: HookedModel, output: Output, pairs: PromptPairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shares of heads [layer head example], MLPs [layer example] and the rest [part example], and the logit difference
    [example]."""
    layers = range(model.n_layers)
    last = hooks.residual_post(model.n_layers - 1)
    names = [hooks.residual_pre(0), last, *(kind(layer) for layer in layers for kind in (hooks.z, hooks.mlp_output))]
    logits, seen = model.activations(pairs.clean, pairs.mask, names)
    rows = torch.arange(len(pairs), device=logits.device)
    seen = {name: value[rows, last_position(pairs.mask)] for name, value in seen.items()}
    direction, constant = output.directions(seen[last], pairs.answers, pairs.distractors)
    written = [model.head_outputs(layer, seen[hooks.z(layer)][:, None])[:, 0].float() for layer in layers]
    heads = torch.stack([torch.einsum("bhd,bd->hb", part, direction) for part in written])
    mlps = _shares([seen[hooks.mlp_output(layer)] for layer in layers], direction)
    biases = [bias.expand_as(direction) for bias in _output_biases(model).values()]
    rest = torch.cat([_shares([seen[hooks.residual_pre(0)], *biases], direction), constant[None]])
    total = (logits[rows, pairs.answers] - logits[rows, pairs.distractors]).float()
    size = max(float(part.abs().sum(0).max()) for part in (heads.flatten(0, 1), mlps, rest)) + float(logits.abs().max())
    refuse_unlike(
        model,
        heads.sum((0, 1)) + mlps.sum(0) + rest.sum(0),
        logits[rows, pairs.answers] - logits[rows, pairs.distractors],
        size,
    )
    return heads, mlps, rest, total


def _output_biases(model: HookedModel) -> dict[int, Float[Tensor, " d_model"]]:
    """b_O by layer, where there is one (a HookedTransformer holds zeros for a model without)."""
    biases = {layer: model.output_bias(layer) for layer in range(model.n_layers)}
    return {layer: bias for layer, bias in biases.items() if bias is not None and bool(bias.any())}


def _shares(
    parts: Sequence[Float[Tensor, "batch d_model"]], direction: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "part batch"]:
    return torch.stack([(part.float() * direction).sum(-1) for part in parts])
