"""Does the workbench compute with a user's own model exactly? The self-check of loading, and patching against what it
must equal.

Random tokens will do: whatever a model is trained for, patching everything gives the corrupt run, and every path equals
hooked forwards. A path without an effect shows neither that nor its opposite: others are tried, and when none has one
the check is inconclusive, which is no fault. In half precision rounding hides what is to be seen, so the arithmetic is
judged in float32, and how much the precision loses is said beside it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from workbench import seeds
from workbench.errors import InputError
from workbench.models.hooked_model import Dtype, HookedModel, Teacher
from workbench.patching.abilities import Ability, abilities
from workbench.patching.ablation import ablated_logits, counterfactual_outputs
from workbench.patching.activation import activation_patch
from workbench.patching.engine.hooked import HookedPatcher
from workbench.patching.execution import Execution
from workbench.patching.path import PathPatcher
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import METRICS
from workbench.values.refs import Embedding, Head, Mlp, Receiver

ROUNDINGS = 1e2
"""How many roundings of the dtype two ways of computing the same logits may differ by."""
TEETH = 10
"""How much larger than what is allowed an effect must be to show anything; or ten times that than what is found."""
TRIES = 8
"""How many heads are tried for one whose path has an effect."""
HALVES = (torch.bfloat16, torch.float16)
Verdict = Literal["ok", "inconclusive", "WRONG"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison: the largest difference found, what is allowed, and the size of the effect that it is a comparison
    of."""

    what: str
    difference: float
    allowed: float
    effect: float

    @property
    def verdict(self) -> Verdict:
        """`WRONG`: more than rounding; `ok`: within rounding, of an effect that is large beside it; else there is no
        evidence."""
        if not self.difference <= self.allowed:
            return "WRONG"
        rounding = self.allowed / ROUNDINGS
        enough = min(TEETH * self.allowed, TEETH**2 * max(self.difference, rounding / TEETH))
        return "ok" if self.effect >= enough else "inconclusive"

    @property
    def passed(self) -> bool:
        """Within rounding, of an effect that is large beside it."""
        return self.verdict == "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """What is supported of a model."""

    model: str
    architecture: str
    shape: str
    engine: str
    """`replay` (fast) or `hooks` (slow, for blocks whose arithmetic is not known)."""
    checks: tuple[Check, ...]
    abilities: tuple[Ability, ...] = ()
    """Method by method."""
    precision: str = ""
    """What the asked-for precision loses, where it is a half."""

    @property
    def passed(self) -> bool:
        """Whether all checks are."""
        return all(check.passed for check in self.checks)

    @property
    def wrong(self) -> tuple[str, ...]:
        """The checks that found a difference."""
        return tuple(check.what for check in self.checks if check.verdict == "WRONG")

    def text(self) -> str:
        """For the screen."""
        lines = [
            f"{self.model}: {self.architecture}, {self.shape}",
            "  loading: logits, head outputs and attention rows equal transformers'",
            *(f"  {ability.text()}" for ability in self.abilities),
        ]
        if self.precision:
            lines.append(f"  {self.precision}")
        for check in self.checks:
            lines.append(
                f"  {check.verdict}: {check.what} (largest difference {check.difference:.1e}, allowed "
                f"{check.allowed:.1e}, effect {check.effect:.1e})"
            )
        if any(check.verdict == "inconclusive" for check in self.checks):
            lines.append(
                "  inconclusive is no fault: on random tokens these paths hardly change the logits (an untrained "
                "model?), "
                "so that there is nothing to compare"
            )
        return "\n".join(lines)


def check_model(
    source: str | Path, *, device: str = "cpu", dtype: Dtype = "float32", seed: int = 0, **placing: Any
) -> Conformance:
    """Load a model with its self-check, then patch it: everything (= the corrupt run), and heads of the first and the
    last layer (= hooked forwards); and ask each method what it can do. Half precision is judged in float32, and its
    loss is said. `placing`: `quantisation` and `device_map`, as `Teacher.load` takes them.

    Errors: `InputError` with the reason for a model that can't be supported exactly.
    """
    loaded = Teacher.load(source, device=device, dtype=dtype, **placing)
    is_half = loaded.dtype in HALVES
    half = _clean_logits(loaded, seed) if is_half else None
    model = Teacher.load(source, device=device, dtype="float32", **placing) if is_half else loaded
    pairs = random_pairs(model, seed=seed)
    patcher, slow = PathPatcher(model, pairs), HookedPatcher(model, pairs)
    config: Any = model.model.cfg
    shape = f"{model.n_layers} layers, {model.n_heads} heads in {model.n_kv_heads} key-value groups of {model.d_head}"
    return Conformance(
        model=model.name,
        architecture=str(getattr(config, "original_architecture", None) or getattr(config, "architecture", "unknown")),
        shape=shape + _kind(model),
        engine=patcher.engine,
        checks=(_everything(patcher), _ablated(slow), _embedded(patcher), *_paths(patcher, slow, seed=seed)),
        abilities=abilities(model, pairs, engine=patcher.engine),
        precision="" if half is None else _loss(half, patcher.clean_logits, loaded.dtype),
    )


def _kind(model: HookedModel) -> str:
    parallel = ", parallel blocks" if model.has_parallel_blocks else ""
    return parallel + (", norms after attention" if model.has_post_norms else "")


def _clean_logits(model: HookedModel, seed: int) -> Tensor:
    pairs = random_pairs(model, seed=seed)
    return model.final_logits(pairs.clean, pairs.mask).float()


def _loss(half: Tensor, full: Tensor, dtype: torch.dtype) -> str:
    largest, size = float((half - full).abs().max()), float(full.abs().max())
    name = str(dtype).removeprefix("torch.")
    return (
        f"judged in float32: in {name} the same logits (up to {size:.1e}) come out up to {largest:.1e} apart, and "
        "effects "
        "smaller than that are rounding"
    )


def random_pairs(model: HookedModel, *, prompts: int = 4, length: int = 12, seed: int = 0) -> PromptPairs:
    """Pairs of random tokens that differ in half of their places; the last prompt is padded in front."""
    draw = seeds.generator(seed, "conformance")
    clean, other = (torch.randint(0, model.d_vocab, (prompts, length), generator=draw) for _ in range(2))
    corrupt = torch.where(torch.rand(prompts, length, generator=draw) < 0.5, other, clean)
    mask = torch.ones(prompts, length, dtype=torch.bool)
    mask[-1, : length // 4] = False
    last = torch.zeros_like(mask)
    last[:, -1] = True
    answers = torch.randint(0, model.d_vocab, (prompts,), generator=draw)
    positions = {"last": last, "all": mask}
    return PromptPairs(
        clean=clean, corrupt=corrupt, mask=mask, answers=answers, distractors=answers.roll(1), positions=positions
    ).to(model.device)


def _everything(patcher: PathPatcher) -> Check:
    model = patcher.model
    senders = [Embedding(), *model.heads, *map(Mlp, range(model.n_layers))]
    logits = patcher.logits(senders)
    return _check("patching everything gives the corrupt run", logits, patcher.corrupt_logits, patcher.clean_logits)


def _ablated(slow: HookedPatcher) -> Check:
    """Every head at its output on the corrupt prompt, by ablation and as senders of paths."""
    model, pairs = slow.model, slow.pairs
    scope = {head: ["all"] for head in model.heads}
    actual = ablated_logits(model, pairs, scope, counterfactual_outputs(model, pairs))
    what = "ablating all heads equals patching them"
    return _check(what, actual, slow.logits(model.heads), slow.clean_logits)


def _embedded(patcher: PathPatcher) -> Check:
    """The residual stream that enters the first layer is all that a forward reads. In single precision, which is what
    scores are kept in."""
    model, pairs = patcher.model, patcher.pairs
    scores = activation_patch(
        model, pairs, "resid_pre", metric=METRICS["log_probability"], execution=Execution(progress=False)
    )
    clean, corrupt = (
        METRICS["log_probability"](logits, pairs.answers, pairs.distractors).cpu().float()
        for logits in (patcher.clean_logits, patcher.corrupt_logits)
    )
    what = "patching what enters the first layer gives the corrupt run"
    return _check(what, clean - scores.values[0], corrupt, clean)


def _paths(patcher: PathPatcher, slow: HookedPatcher, *, seed: int) -> Iterator[Check]:
    """Of a head of the first layer and one of the last to the logits, and of one into the other."""
    model, draw = patcher.model, seeds.chooser(seed, "conformance heads")
    low, high = (_shuffled(model, layer, draw) for layer in (0, model.n_layers - 1))

    def compare(sender: Head, receivers: list[Receiver]) -> Check:
        end = str(receivers[0]) if receivers else "logits"
        logits, expected = (way.logits([sender], receivers=receivers) for way in (patcher, slow))
        return _check(f"path {sender} -> {end} equals hooked forwards", logits, expected, patcher.clean_logits)

    for heads in (low, high):
        yield _first_with_evidence(heads, lambda head: compare(head, []))
    if model.n_layers < 2:
        return
    for composition in ("q", "k", "v"):
        ends = ((one, Receiver(other, composition)) for other, one in itertools.product(high, low))
        yield _first_with_evidence(ends, lambda end: compare(end[0], [end[1]]))


def _shuffled(model: HookedModel, layer: int, draw: Any) -> list[Head]:
    """The heads of a layer in a random order."""
    first = draw.randrange(model.n_heads)
    return [Head(layer, (first + step) % model.n_heads) for step in range(model.n_heads)]


def _first_with_evidence(candidates: Iterable[Any], compare: Callable[[Any], Check]) -> Check:
    """The first check that says something, of so many; else the one of the largest effect."""
    checks: list[Check] = []
    for candidate in itertools.islice(candidates, TRIES):
        checks.append(compare(candidate))
        if checks[-1].verdict != "inconclusive":
            return checks[-1]
    return max(checks, key=lambda check: check.effect)


def _check(what: str, logits: Tensor, expected: Tensor, clean: Tensor) -> Check:
    scale = max(1.0, float(expected.abs().max()))
    rounding = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
    return Check(
        what=what,
        difference=float((logits - expected).abs().max()),
        allowed=ROUNDINGS * rounding * scale,
        effect=float((expected - clean).abs().max()),
    )


def require_conformance(report: Conformance) -> None:
    """Raise `InputError` naming the checks that found a difference; a check without evidence is no fault."""
    if report.wrong:
        raise InputError(
            f"{report.model} is not supported exactly: {'; '.join(report.wrong)}. Report it with the model's "
            "config; do not patch it meanwhile."
        )
