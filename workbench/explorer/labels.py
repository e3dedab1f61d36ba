"""What the page says of each choice: titles, what was done, and which sign means what."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from workbench.explorer.state import Method, Outside
from workbench.plots.theme import DARK, HELPS, HURTS, LIGHT, Theme
from workbench.values.metrics import METRICS
from workbench.values.scores import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodWords:
    """A method of the heat map in words."""

    title: str
    does: str
    sign: str
    order: Order


NOISE = 1e-4
"""Effects below this are rounding, which differs between two ways to compute the same: the page draws no bar."""
_WITHOUT = (
    f"Positive ({HELPS}): the metric falls without the head, so the head helps. Negative ({HURTS}): it works against "
    "the answer."
)
_CORRUPT = (
    f"Positive ({HELPS}): the metric falls when the head says what it says on the corrupt prompt, so the head helps. "
    f"Negative ({HURTS}): it works against the answer."
)
METHODS: Mapping[Method, MethodWords] = {
    "path": MethodWords(
        title="path patching to the logits",
        sign=_CORRUPT,
        order="highest",
        does="The head takes its output on the corrupt prompt at the last token; all other heads stay as on the clean "
        "prompt, MLPs follow. Shown is the fall of the metric, the direct effect.",
    ),
    "activation": MethodWords(
        title="activation patching (z)",
        sign=_CORRUPT,
        order="highest",
        does="The head takes its output on the corrupt prompt; everything after it follows. Shown is the fall of the "
        "metric, the total effect.",
    ),
    "counterfactual": MethodWords(
        title="ablation: counterfactual",
        sign=_WITHOUT,
        order="highest",
        does="The head takes its output on the corrupt prompt; shown is the fall of the metric.",
    ),
    "mean": MethodWords(
        title="ablation: mean",
        sign=_WITHOUT,
        order="highest",
        does="The head takes its mean output over reference prompts (by position where they are as long); shown is the "
        "fall of the metric.",
    ),
    "zero": MethodWords(
        title="ablation: zero",
        sign=_WITHOUT,
        order="highest",
        does="The head's output is set to zero; shown is the fall of the metric.",
    ),
}
METRIC_TITLES: Mapping[str, str] = {
    "logit_difference": "logit difference (answer - distractor)",
    "log_probability": "log-probability of the answer (nats)",
    "probability": "probability of the answer",
}
OUTSIDE_TITLES: Mapping[Outside, str] = {
    "counterfactual": "their output on the corrupt prompt",
    "mean": "their mean over reference prompts",
    "zero": "zero",
}
assert set(METRIC_TITLES) <= set(METRICS)
assert set(METHODS) == set(get_args(Method))


def choices(*, with_mean: bool) -> dict[str, Any]:
    """The choices of the page with their words; without reference prompts there are no means to choose."""
    return {
        "noise": NOISE,
        "methods": [{"value": name, **asdict(words)} for name, words in METHODS.items() if with_mean or name != "mean"],
        "metrics": [{"value": name, "title": title} for name, title in METRIC_TITLES.items()],
        "outsides": [
            {"value": name, "title": title} for name, title in OUTSIDE_TITLES.items() if with_mean or name != "mean"
        ],
    }


def colours() -> dict[str, Any]:
    """The two themes of the figures, for the page."""
    return {"light": _theme(LIGHT), "dark": _theme(DARK)}


def _theme(theme: Theme) -> dict[str, Any]:
    colours = asdict(theme)
    return {**colours, "wash": list(theme.wash), "helps": theme.helps, "hurts": theme.hurts}
