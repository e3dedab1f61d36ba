"""What stands in for an ablated head when the caller names no more than a set of prompts, or nothing at all.

By default: the head's mean over the pairs' own corrupt prompts. They have the form of the clean ones and carry none of
what the answer depends on, and every set of pairs has them. A corrupt prompt that is also a clean one of the same pairs
is left out, so the mean never holds an evaluated prompt.
"""

from typing import Any, Literal

import torch

from workbench.errors import InputError, nearest
from workbench.models.hooked_model import HookedModel, Teacher
from workbench.patching.replacement import Replacement, Zero, counterfactual_outputs, reference_means
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import require_readings

Reference = PromptPairs | Literal["counterfactual", "zero"] | Replacement | None
"""Prompts whose clean side gives the means; a kind of ablation by name; a replacement made beforehand; or None: the
pairs' corrupt prompts."""
KINDS = ("counterfactual", "zero")


def reading(model: HookedModel, pairs: PromptPairs) -> PromptPairs:
    """The pairs in this model's tokens: a teacher's own reading where the pairs hold two."""
    return pairs.for_teacher if isinstance(model, Teacher) else pairs


def corrupt_prompts(pairs: PromptPairs) -> PromptPairs:
    """The corrupt prompts as reference prompts, without those that are clean prompts of the same pairs.

    Errors: `InputError` when none is left.
    """
    swapped, clean = pairs.swapped(), pairs.prompts()
    apart = [
        row
        for row, (tokens, mask) in enumerate(zip(swapped.clean, swapped.mask, strict=True))
        if tokens[mask].cpu().numpy().tobytes() not in clean
    ]
    if not apart:
        raise InputError(
            "every corrupt prompt of these pairs is also a clean one, so they give no means that hold no evaluated "
            "prompt; give other pairs as `reference`, or evaluate fewer of them."
        )
    return swapped.rows(torch.tensor(apart, device=pairs.mask.device))


def replacement_of(model: HookedModel, pairs: PromptPairs, reference: Reference) -> tuple[Replacement, str]:
    """(what an ablated head's output becomes on these pairs, that in words). `pairs` are in the model's own tokens.

    Means are taken position by position where all prompts have one length, else over all tokens.
    """
    if isinstance(reference, str) and reference not in KINDS:
        raise InputError(
            f"no ablation {reference!r}; {nearest(reference, KINDS)} For mean ablation give prompts, or leave "
            "`reference` out."
        )
    if reference == "counterfactual":
        return counterfactual_outputs(model, pairs), "each prompt's own corrupt counterpart"
    if reference == "zero":
        return Zero(), "zero"
    if reference is None or isinstance(reference, PromptPairs):
        prompts = corrupt_prompts(pairs) if reference is None else reading(model, reference)
        one_length = prompts.clean.shape[1] == pairs.clean.shape[1] and bool(prompts.mask.all() and pairs.mask.all())
        which = "the pairs' corrupt prompts" if reference is None else "reference prompts"
        per = "position by position" if one_length else "over all tokens"
        return (
            reference_means(model, prompts, per_position=one_length),
            f"mean over {len(prompts)} prompts ({which}), {per}",
        )
    if not all(hasattr(reference, name) for name in ("kind", "identity", "at")):
        raise InputError(
            f"the reference is {_described(reference)}; give pairs whose clean prompts are averaged, 'counterfactual', "
            "'zero', or leave it out."
        )
    return reference, f"{reference.kind} ablation, made beforehand"


def require_model(model: Any, kind: type[HookedModel] = HookedModel, *, role: str = "model") -> None:
    """Refuse what is no loaded model (a path, a `transformers` model) and name the remedy."""
    if not isinstance(model, kind):
        word = {HookedModel: "Teacher.load(...) or Student.load(...)"}.get(kind, f"{kind.__name__}.load(...)")
        raise InputError(f"the {role} is {_described(model)}; it must be what {word} gives.")


def require_pairs(pairs: Any, *models: HookedModel) -> None:
    """Refuse what are no pairs, none at all, and pairs in the tokens of one of two different tokenizers."""
    if not isinstance(pairs, PromptPairs):
        raise InputError(
            f"the pairs are {_described(pairs)}; make them with task(...).pairs(model) or read_pairs(file, model)."
        )
    if not len(pairs):
        raise InputError("there are no pairs; draw more scenes, or take a slice that holds some.")
    if len(models) == 2:
        require_readings(pairs, models[0].tokenizer, models[1].tokenizer)


def _described(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"of type {type(value).__name__}"
