"""What a view may take of the machine's memory, said before any tensor is made.

A sweep keeps two runs of its prompts (clean and corrupt) with the activations of every layer; of each token and layer
that is about `WIDTHS` vectors of the residual stream's width, the MLP's hidden layer and a row of attention for each
head, and of each token the logits of the vocabulary:

    bytes = 2 · prompts · tokens · (layers · (WIDTHS · d_model + d_mlp + heads · tokens) + d_vocab) · element

One prompt that needs more than the budget is refused; of several, those that fit are taken.
"""

from collections.abc import Sequence
from dataclasses import replace

from workbench.errors import InputError
from workbench.explorer.material import Drawn, Material
from workbench.models.hooked_model import HookedModel
from workbench.tasks.pairs import Pair
from workbench.tasks.prompts import PromptSettings

BUDGET = 4 * 2**30
"""Bytes, where nothing else is said (`--memory`, `memory=`)."""
WIDTHS = 12
RUNS = 2


def bytes_of_runs(model: HookedModel, prompts: int, tokens: int) -> int:
    """What the clean and the corrupt runs of so many prompts of so many tokens hold, about."""
    cfg = model.model.cfg
    width, hidden, vocabulary = cfg.d_model, getattr(cfg, "d_mlp", None) or 4 * cfg.d_model, cfg.d_vocab
    layer = WIDTHS * width + hidden + model.n_heads * tokens
    element = next(value for _, value in model.model.named_parameters()).element_size()
    return RUNS * prompts * tokens * (model.n_layers * layer + vocabulary) * element


def refuse_large(model: HookedModel, tokens: int, budget: int) -> None:
    """Refuse a prompt whose views would take more than the budget."""
    need = bytes_of_runs(model, 1, tokens)
    if need > budget:
        raise InputError(
            f"a prompt of {tokens} tokens would take about {gigabytes(need)} in {model.name}, and the explorer's "
            f"budget is {gigabytes(budget)}; give a shorter prompt, or a larger --memory."
        )


def within(material: Material, models: Sequence[HookedModel], budget: int) -> Material:
    """The material with as many pairs of each draw as the budget holds at once, and what was cut in words.

    Errors: `InputError` where not even one fits.
    """
    shown, shown_cut = _fitting(material.shown, "pairs to look at", models, material.settings, budget)
    evaluated, evaluated_cut = _fitting(material.evaluated, "test prompts", models, material.settings, budget)
    reference, reference_cut = material.reference, None
    if reference is not None:
        reference, reference_cut = _fitting(reference, "reference prompts", models, material.settings, budget)
    cuts = [each for each in (shown_cut, evaluated_cut, reference_cut) if each is not None]
    said = f"{'; '.join(cuts)}: more than the budget of {gigabytes(budget)} (--memory) holds at once." if cuts else None
    return replace(material, shown=shown, evaluated=evaluated, reference=reference, cut=said)


def _fitting(
    drawn: Drawn, name: str, models: Sequence[HookedModel], settings: PromptSettings, budget: int
) -> tuple[Drawn, str | None]:
    longest = max((tokens_of(pair, model, settings) for model in models for pair in drawn.pairs), default=0)
    count = len(drawn.pairs)
    for model in models:
        if longest:
            refuse_large(model, longest, budget)
            count = min(count, budget // bytes_of_runs(model, 1, longest))
    if count == len(drawn.pairs):
        return drawn, None
    fewer = Drawn(pairs=drawn.pairs[:count], python=f"{drawn.python}[:{count}]")
    return fewer, f"{count} of {len(drawn.pairs)} {name} are used"


def tokens_of(pair: Pair, model: HookedModel, settings: PromptSettings) -> int:
    """Tokens of the longer of a pair's prompts."""
    texts = (pair.clean, pair.corrupt)
    counts = (len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return max(counts) + settings.prepend_bos


def gigabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GB" if count >= 0.1 * 2**30 else f"{count / 2**20:.1f} MB"
