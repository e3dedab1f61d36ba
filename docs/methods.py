"""Every method of discovery on the bundled models and tasks: `python -m docs.methods` writes assets/results/discovery.

Each method ranks the heads of a model on its discovery prompts, with its default options but for those in `OPTIONS`;
what the first 5, 10 and 20 % of the heads keep of the logit difference is measured on fresh prompts, everything else
mean-ablated, heads kept at all positions; CPR and CMD are the areas over all sizes, by heads. A subject whose file is
there is not done again. `python -m docs.methods SUBJECT ...` does some.
"""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import workbench as wb
from workbench import storage
from workbench.circuits.config import DiscoveryConfig
from workbench.circuits.curves import Faithfulness, default_sizes, faithfulness_curve
from workbench.circuits.methods.base import Inquiry
from workbench.circuits.methods.registry import OURS, method_named
from workbench.patching.ablation import reference_means
from workbench.patching.execution import Execution
from workbench.storage.provenance import provenance
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import METRICS

FOLDER = Path(__file__).parents[1] / "assets/results/discovery"
SHARES = (0.05, 0.1, 0.2)
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "elimination": {"to_the_end": True},
    "elimination_by_gates": {"to_the_end": True},
    "greedy": {"ranking": "eap_ig"},
}
QUIET = Execution(progress=False)
log = logging.getLogger("methods")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A bundled model and a task, with the scenes of each use (the tasks ask about a scene once, or once a box)."""

    model: str
    task: str
    options: Mapping[str, Any]
    reference: int
    discovery: int
    test: int


SUBJECTS: Mapping[str, Subject] = {
    "entity-teacher": Subject(
        model="teacher", task="entity_tracking", options={"boxes": 5}, reference=8, discovery=6, test=16
    ),
    **{
        f"{short}-{part}": Subject(model=f"mixture-{part}", task=task, options={}, reference=40, discovery=40, test=80)
        for part in ("teacher", "student")
        for short, task in (("mind", "theory_of_mind"), ("ioi", "ioi"), ("operations", "entity_operations"))
    },
}


def main() -> int:
    """The subjects that are named, or all."""
    names = sys.argv[1:] or list(SUBJECTS)
    if unknown := [name for name in names if name not in SUBJECTS]:
        log.error("no subject %s; there are %s", ", ".join(unknown), ", ".join(SUBJECTS))
        return 2
    for name in names:
        if not (FOLDER / f"{name}.json").exists():
            storage.write_json(FOLDER / f"{name}.json", compared(name))
    return 0


def compared(name: str) -> dict[str, Any]:
    """All methods on one subject."""
    subject = SUBJECTS[name]
    model = wb.Teacher.load(subject.model)
    task = wb.task(subject.task, **subject.options)
    calibration = task.pairs(model, scenes=subject.reference + subject.discovery)
    test = task.pairs(model, scenes=subject.test, split="test")
    cut = subject.reference * len(calibration) // (subject.reference + subject.discovery)
    reference, discovery = calibration.rows(slice(0, cut)), calibration.rows(slice(cut, None))
    per_position = bool(
        calibration.mask.all() and test.mask.all() and calibration.clean.shape[1] == test.clean.shape[1]
    )
    means = reference_means(model, reference, per_position=per_position)
    inquiry = Inquiry(
        model=model,
        pairs=discovery,
        metric=METRICS["logit_difference"],
        config=DiscoveryConfig(metric="logit_difference"),
        stand_in=lambda pairs: (means, f"mean over {len(reference)} reference prompts"),
        stages=task.stages,
        execution=QUIET,
    )
    whole = Faithfulness(model, test, means, metric="logit_difference", execution=QUIET)
    rows = {method: row for method in OURS if (row := _row(method, inquiry, whole)) is not None}
    return {
        "command": f"python -m docs.methods {name}",
        "commit": provenance()["commit"],
        "model": subject.model,
        "task": subject.task,
        "heads": len(model.heads),
        "prompts": {"reference": len(reference), "discovery": len(discovery), "test": len(test)},
        "accuracy": _accuracy(model, test),
        "metric": "logit difference",
        "ablation": "mean, position by position" if per_position else "mean, over all tokens",
        "scope": "everywhere",
        "methods": rows,
    }


def _row(method: str, inquiry: Inquiry, whole: Faithfulness) -> dict[str, Any] | None:
    """A method's ranking on fresh prompts."""
    if method == "path_patching" and not inquiry.stages:
        return None  # its stages are not known
    plain, start = _forward(inquiry), time.process_time()
    finder = method_named(method, OPTIONS.get(method, {}))
    result = finder.find(inquiry)
    seconds, total = time.process_time() - start, len(inquiry.model.heads)
    counts = {share: max(1, round(share * total)) for share in SHARES}
    curve = faithfulness_curve(
        whole, result.ranking, sizes=(*default_sizes(total), *counts.values()), random_rankings=0
    )
    value = dict(zip(curve.sizes, curve.faithfulness, strict=True))
    return {
        "faithfulness": {f"{share:g}": value[count] for share, count in counts.items()},
        "sizes": {f"{share:g}": count for share, count in counts.items()},
        "cpr": curve.cpr,
        "cmd": curve.cmd,
        "runs_at_most": finder.runs(total, inquiry.model.n_layers),
        "seconds_in_forwards": seconds / plain,
        "circuit": [str(head) for head in result.circuit.heads],
        "ranking": [str(head) for head in result.ranking],
        "options": dict(OPTIONS.get(method, {})),
    }


def _forward(inquiry: Inquiry) -> float:
    """Processor seconds of a plain forward over the discovery prompts: the median of three."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        with torch.no_grad():
            inquiry.model.final_logits(inquiry.pairs.clean, inquiry.pairs.mask)
        seconds.append(time.process_time() - start)
    return sorted(seconds)[1]


def _accuracy(model: wb.Teacher, pairs: PromptPairs) -> float:
    with torch.no_grad():
        logits = model.final_logits(pairs.clean, pairs.mask)
    return float(METRICS["accuracy"](logits, pairs.answers, pairs.distractors).mean())


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(main())
