"""Logits and answers -> one value per example. Averaging, errors and intervals happen once, in `Scores`.

A `Metric` is a function with its name and unit, so that what was measured is never said apart from how. All take final
logits [batch d_vocab] at the answering position; higher is better for each but `kl_divergence`.

Answers and distractors are one token an example ([batch]) or a set of tokens ([batch member], padded with -1: all years
above, a name and its pronoun). A set counts by its mass, the sum of its members' probabilities, and an answer is right
where the likeliest token is any member.

A package adds a metric of its own as an entry point, which recipes then name too:

    [project.entry-points."workbench.metrics"]
    rank = "my_package.metrics:RANK"          # a Metric
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.values.metric_names import GROUP, OURS, require_metric

MetricFunction = Callable[
    [Float[Tensor, "batch d_vocab"], Int[Tensor, "batch *member"], Int[Tensor, "batch *other"]], Float[Tensor, " batch"]
]
"""(logits, answers, distractors) -> one value per example; higher is better. Answers and distractors are [batch], or
[batch member] padded with -1 where they are sets."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What is measured of the logits: `metric(logits, answers, distractors)` -> one value per example."""

    name: str
    """As a recipe or a result names it: `log_probability`."""
    unit: str
    """What a value is, in words: `log probability`."""
    function: MetricFunction

    def __post_init__(self) -> None:
        if not self.name or not self.unit or not callable(self.function):
            raise InputError("a metric has a name, a unit in words, and a function of (logits, answers, distractors).")

    def __call__(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        answers: Int[Tensor, "batch *member"],
        distractors: Int[Tensor, "batch *other"],
    ) -> Float[Tensor, " batch"]:
        return self.function(logits, answers, distractors)

    @property
    def fingerprint(self) -> str:
        """What the metric is, for the identity of what is computed with it: name, unit, and the function's qualified
        name."""
        return f"{self.name} | {self.unit} | {_qualified(self.function)}"


def _qualified(function: object) -> str:
    if isinstance(function, functools.partial):
        return f"{_qualified(function.func)} of {function.args!r} {sorted(function.keywords.items())!r}"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"


Logits = Float[Tensor, "batch d_vocab"]
Ids = Int[Tensor, "batch *member"]
Others = Int[Tensor, "batch *other"]
PerExample = Float[Tensor, " batch"]


def _summed_exponentials(values: Logits, ids: Ids) -> PerExample:
    """The value of a token; of a set, the log of the sum of its members' exponentials, which of log-probabilities is
    the log of their mass."""
    if ids.ndim == 1:
        return values.gather(-1, ids[:, None]).squeeze(-1)
    return torch.where(ids >= 0, values.gather(-1, ids.clamp(min=0)), -torch.inf).logsumexp(-1)


def mass(logits: Logits, ids: Ids) -> PerExample:
    """Probability of a token, or of any member of a set: the sum of theirs."""
    if ids.ndim == 1:
        return logits.softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    return torch.where(ids >= 0, logits.softmax(-1).gather(-1, ids.clamp(min=0)), 0.0).sum(-1)


def among(tokens: Int[Tensor, " batch"], ids: Ids) -> Bool[Tensor, " batch"]:
    """Whether a token is the answer, or one of the set."""
    return tokens == ids if ids.ndim == 1 else (tokens[:, None] == ids).any(-1)


def log_probability(logits: Logits, answers: Ids, distractors: Others) -> PerExample:
    """Log-probability of the answer, in nats; of a set, the log of its mass."""
    return _summed_exponentials(logits.log_softmax(-1), answers)


def probability(logits: Logits, answers: Ids, distractors: Others) -> PerExample:
    """Probability of the answer; of a set, its mass."""
    return mass(logits, answers)


def logit_difference(logits: Logits, answers: Ids, distractors: Others) -> PerExample:
    """Logit of the answer minus logit of the distractor; of sets, the log of the ratio of their masses (for single
    tokens that is the same)."""
    return _summed_exponentials(logits, answers) - _summed_exponentials(logits, distractors)


def probability_difference(logits: Logits, answers: Ids, distractors: Others) -> PerExample:
    """Probability of the answer minus that of the distractor; of sets, the difference of their masses: the metric of
    greater-than (Hanna et al. 2023), EAP's `prob_diff`."""
    return mass(logits, answers) - mass(logits, distractors)


def accuracy(logits: Logits, answers: Ids, distractors: Others) -> PerExample:
    """1 where the answer, or any of a set, is the most probable token of the whole vocabulary, else 0."""
    return among(logits.argmax(-1), answers).to(logits.dtype)


def kl_divergence(logits: Logits, reference: Logits) -> PerExample:
    """KL(reference || logits) of the next-token distributions, in nats."""
    target = reference.log_softmax(-1)
    return (target.exp() * (target - logits.log_softmax(-1))).sum(-1)


def sequence_log_probability(
    logits: Float[Tensor, "batch token d_vocab"], tokens: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> PerExample:
    """Log-probability of a whole answer, in nats: the sum over its tokens (True in `mask`) of each one's
    log-probability.

    `logits[:, t]` predict `tokens[:, t]`.
    """
    each = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return torch.where(mask, each, torch.zeros_like(each)).sum(-1)


def sequence_accuracy(
    logits: Float[Tensor, "batch token d_vocab"], tokens: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> PerExample:
    """1 where every token of the answer (True in `mask`) is the most probable one at its place, else 0.

    `logits[:, t]` predict `tokens[:, t]`.
    """
    return ((logits.argmax(-1) == tokens) | ~mask).all(-1).to(logits.dtype)


METRICS: dict[str, Metric] = {
    function.__name__: Metric(function.__name__, function.__name__.replace("_", " "), function)
    for function in (log_probability, probability, logit_difference, probability_difference, accuracy)
}
"""Our own metrics; a recipe can name them, and those of installed packages."""
assert tuple(METRICS) == OURS


def metric_named(metric: str | Metric | MetricFunction) -> Metric:
    """The metric of a name (ours, or an installed package's), or the metric itself.

    Errors: `InputError` for an unknown name (with the nearest), an entry point that is no metric, and for a function
    that has no name and unit yet.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        return METRICS[metric] if metric in METRICS else _installed(metric)
    raise InputError(
        f"{metric!r} is no metric by itself: say what it measures, `Metric(name=..., unit=..., function=f)`, or name "
        f"one of {', '.join(METRICS)}."
    )


def _installed(name: str) -> Metric:
    require_metric(name)
    point = next(point for point in entry_points(group=GROUP) if point.name == name)
    metric = point.load()
    if not isinstance(metric, Metric) or metric.name != name:
        raise InputError(
            f"the entry point {name} of {GROUP} is no metric of that name: let {point.value} be "
            f"`Metric(name={name!r}, unit=..., function=f)`."
        )
    return metric


def metrics_named(metrics: str | Metric | Iterable[str | Metric]) -> list[Metric]:
    """Several metrics, each once. Errors: as `metric_named`, and for two of one name."""
    several = [metric_named(each) for each in ([metrics] if isinstance(metrics, str | Metric) else metrics)]
    names = [metric.name for metric in several]
    if len(set(names)) < len(names):
        raise InputError(f"two metrics of one name among {', '.join(names)}; give each its own.")
    return several


def relative_fall(patched: Float[Tensor, "*sweep batch"], clean: PerExample) -> Float[Tensor, "*sweep batch"]:
    """(clean - patched) / clean, the score of Prakash et al. for probabilities with its sign turned (positive: the head
    helps); NaN where clean is 0."""
    return torch.where(clean == 0, torch.nan, (clean - patched) / clean)
