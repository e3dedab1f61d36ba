"""Does the workbench compute with a user's own model exactly? The self-check of loading, and patching against what it
must equal.

Random tokens will do: whatever a model is trained for, patching everything gives the corrupt run, and every path equals
hooked forwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench import seeds
from workbench.errors import InputError
from workbench.models.hooked_model import Dtype, HookedModel, Teacher
from workbench.patching.engine.hooked import HookedPatcher
from workbench.patching.path import PathPatcher
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Embedding, Head, Mlp, Receiver

ROUNDINGS = 1e2
"""How many roundings of the dtype two ways of computing the same logits may differ by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison: the largest difference found, what is allowed, and the size of the effect that it is a comparison
    of."""

    what: str
    difference: float
    allowed: float
    effect: float

    @property
    def passed(self) -> bool:
        """Within rounding, of an effect that is large beside it."""
        return self.difference <= self.allowed and self.effect >= 10 * self.allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """What is supported of a model."""

    model: str
    architecture: str
    shape: str
    engine: str
    """`replay` (fast) or `hooks` (slow, for blocks whose arithmetic is not known)."""
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all checks are."""
        return all(check.passed for check in self.checks)

    def text(self) -> str:
        """For the screen."""
        engine = (
            "replay, exact and fast"
            if self.engine == "replay"
            else "hooked forwards, exact and slow: its blocks do more than the replay knows"
        )
        lines = [
            f"{self.model}: {self.architecture}, {self.shape}",
            "  loading: logits, head outputs and attention rows equal transformers'",
        ]
        lines.append(f"  patching goes through {engine}")
        for check in self.checks:
            verdict = "ok" if check.passed else "FAILS"
            lines.append(
                f"  {verdict}: {check.what} (largest difference {check.difference:.1e}, allowed {check.allowed:.1e}, "
                f"effect {check.effect:.1e})"
            )
        return "\n".join(lines)


def check_model(source: str | Path, *, device: str = "cpu", dtype: Dtype = "float32", seed: int = 0) -> Conformance:
    """Load a model with its self-check, then patch it: everything (= the corrupt run), and two random heads (= hooked
    forwards).

    Errors: `InputError` with the reason for a model that can't be supported exactly.
    """
    model = Teacher.load(source, device=device, dtype=dtype)
    pairs = random_pairs(model, seed=seed)
    patcher, slow = PathPatcher(model, pairs), HookedPatcher(model, pairs)
    config: Any = model.model.cfg
    shape = f"{model.n_layers} layers, {model.n_heads} heads in {model.n_kv_heads} key-value groups of {model.d_head}"
    return Conformance(
        model=model.name,
        architecture=str(getattr(config, "original_architecture", None) or getattr(config, "architecture", "unknown")),
        shape=shape + (", parallel blocks" if model.has_parallel_blocks else ""),
        engine=patcher.engine,
        checks=(_everything(patcher), *_paths(patcher, slow, seed=seed)),
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
    found = patcher.logits(senders)
    return _check("patching everything gives the corrupt run", found, patcher.corrupt_logits, patcher.clean_logits)


def _paths(patcher: PathPatcher, slow: HookedPatcher, *, seed: int) -> Sequence[Check]:
    model, draw = patcher.model, seeds.chooser(seed, "conformance heads")
    low, high = (Head(layer, draw.randrange(model.n_heads)) for layer in (0, model.n_layers - 1))
    checks = []
    for sender in (low, high):
        expected = slow.logits([sender])
        checks.append(
            _check(
                f"path {sender} -> logits equals hooked forwards",
                patcher.logits([sender]),
                expected,
                patcher.clean_logits,
            )
        )
    if model.n_layers < 2:
        return checks
    for composition in ("q", "k", "v"):
        receiver = Receiver(high, composition)
        found = patcher.logits([low], receivers=[receiver])
        expected = slow.logits([low], receivers=[receiver])
        checks.append(_check(f"path {low} -> {receiver} equals hooked forwards", found, expected, patcher.clean_logits))
    return checks


def _check(what: str, found: Tensor, expected: Tensor, clean: Tensor) -> Check:
    scale = max(1.0, float(expected.abs().max()))
    rounding = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    return Check(
        what=what,
        difference=float((found - expected).abs().max()),
        allowed=ROUNDINGS * rounding * scale,
        effect=float((expected - clean).abs().max()),
    )


def require_conformance(found: Conformance) -> None:
    """Raise `InputError` naming the checks that fail."""
    failed = [check.what for check in found.checks if not check.passed]
    if failed:
        raise InputError(
            f"{found.model} is not supported exactly: {'; '.join(failed)}. Report it with the model's config; do not "
            "patch it meanwhile."
        )
