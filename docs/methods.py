"""Every method of discovery on the bundled models and tasks: `python -m docs.methods` writes assets/results/discovery.

Each method ranks the heads of a model on its discovery prompts, with its default options but for those in `OPTIONS`;
what the first 5, 10 and 20 % of the heads keep of the logit difference is measured on fresh prompts, everything else
ablated, heads kept at all positions; CPR and CMD are the areas over all sizes, by heads. A method whose row is there,
with the options that it has today, is not done again. `python -m docs.methods SUBJECT ...` does some;
`python -m docs.methods smollm2-ioi=PATH.gguf smollm2-boxes=FOLDER` those of models that are not bundled (the folder is
what `workbench finetune --recipe smollm2_boxes_teacher` makes: the model as it is can't track boxes).
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
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
from workbench.patching.replacement import Replacement, counterfactual_outputs
from workbench.storage.provenance import provenance
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import METRICS

FOLDER = Path(__file__).parents[1] / "assets/results/discovery"
SHARES = (0.05, 0.1, 0.2, 0.3)
SMOLLM2, FINETUNED = "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct, fine-tuned on boxes"
GIVEN = (SMOLLM2, FINETUNED)
"""Models that are not bundled."""
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "elimination": {"to_the_end": True},
    "elimination_by_gates": {"to_the_end": True},
    "greedy": {"ranking": "eap_ig"},
}
QUIET = Execution(progress=False)
log = logging.getLogger("methods")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model and a task, with the scenes of each use (the tasks ask about a scene once, or once a box)."""

    model: str
    """Bundled; or a name, for which the command gives a path."""
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: int
    discovery: int
    test: int
    counterfactual: bool = False
    """Ablated heads take their output on the prompt's corrupt counterpart, in place of the reference prompts' mean."""
    methods: tuple[str, ...] = tuple(OURS)
    """Those that this model's size allows."""


AFFORDABLE = tuple(name for name in OURS if name not in ("elimination", "learned_gates", "greedy"))
"""For 270 heads: exact elimination would take up to 36,000 forwards, learned gates and `greedy` measure every size."""
SUBJECTS: Mapping[str, Subject] = {
    "entity-teacher": Subject(
        model="teacher", task="entity_tracking", options={"boxes": 5}, reference=8, discovery=6, test=16
    ),
    **{
        f"{short}-{part}": Subject(model=f"mixture-{part}", task=task, reference=40, discovery=40, test=80)
        for part in ("teacher", "student")
        for short, task in (("mind", "theory_of_mind"), ("ioi", "ioi"), ("operations", "entity_operations"))
    },
    "smollm2-ioi": Subject(
        model=SMOLLM2, task="ioi", reference=1, discovery=8, test=12, counterfactual=True, methods=AFFORDABLE
    ),
    "smollm2-boxes": Subject(
        model=FINETUNED,
        task="entity_tracking",
        options={"boxes": 5},
        reference=1,
        discovery=2,
        test=4,
        counterfactual=True,
        methods=AFFORDABLE,
    ),
}


def main() -> int:
    """The subjects that are named, or all of bundled models."""
    named = {name: path for name, _, path in (word.partition("=") for word in sys.argv[1:])}
    named = named or {name: "" for name, subject in SUBJECTS.items() if subject.model not in GIVEN}
    if unknown := [name for name in named if name not in SUBJECTS]:
        log.error("no subject %s; there are %s", ", ".join(unknown), ", ".join(SUBJECTS))
        return 2
    for name, path in named.items():
        if SUBJECTS[name].model in GIVEN and not path:
            log.error("%s needs %s: python -m docs.methods %s=PATH", name, SUBJECTS[name].model, name)
            return 2
        compare(name, path or SUBJECTS[name].model)
    return 0


def compare(name: str, model: str) -> None:
    """All methods on one subject; its file is written after each."""
    subject, file = SUBJECTS[name], FOLDER / f"{name}.json"
    rows = storage.read_json(file)["methods"] if file.exists() else {}
    missing = [method for method in subject.methods if rows.get(method, {}).get("options") != options_now(method)]
    inquiry, whole, about = (None, None, {}) if not missing else _asked(subject, model)
    for method in missing:
        assert inquiry is not None
        assert whole is not None
        log.info("%s: %s", name, method)
        rows[method] = _row(method, inquiry, whole)
        rows = {known: rows[known] for known in OURS if known in rows}
        command = {"command": f"python -m docs.methods {name}", "commit": provenance()["commit"], "seed": 0}
        storage.write_json(file, {**command, **about, "methods": rows})


def options_now(method: str) -> dict[str, Any]:
    """All options of a method as this table sets them."""
    return json.loads(json.dumps(asdict(method_named(method, OPTIONS.get(method, {})))))  # pyright: ignore[reportArgumentType]


def _asked(subject: Subject, source: str) -> tuple[Inquiry, Faithfulness, dict[str, Any]]:
    """(what the methods are asked, how their rankings are measured, the file's words about both)."""
    model = wb.Teacher.load(source)
    task = wb.task(subject.task, **subject.options)
    calibration = task.pairs(model, scenes=subject.reference + subject.discovery)
    test = task.pairs(model, scenes=subject.test, split="test")
    cut = subject.reference * len(calibration) // (subject.reference + subject.discovery)
    reference, discovery = calibration.rows(slice(0, cut)), calibration.rows(slice(cut, None))
    per_position = bool(
        calibration.mask.all() and test.mask.all() and calibration.clean.shape[1] == test.clean.shape[1]
    )
    if subject.counterfactual:
        words = "the prompt's own corrupt run"
        stand_in: Callable[[PromptPairs], Replacement] = partial(counterfactual_outputs, model)
    else:
        words = "mean, position by position" if per_position else "mean, over all tokens"
        means = reference_means(model, reference, per_position=per_position)
        stand_in = lambda pairs: means  # noqa: E731
    inquiry = Inquiry(
        model=model,
        pairs=discovery,
        metric=METRICS["logit_difference"],
        config=DiscoveryConfig(metric="logit_difference"),
        stand_in=lambda pairs: (stand_in(pairs), words),
        stages=task.stages,
        execution=QUIET,
    )
    whole = Faithfulness(model, test, stand_in(test), metric="logit_difference", execution=QUIET)
    about = {
        "model": subject.model,
        "task": subject.task,
        "heads": len(model.heads),
        "prompts": {"reference": len(reference), "discovery": len(discovery), "test": len(test)},
        "accuracy": _accuracy(model, test),
        "metric": "logit difference",
        "ablation": words,
        "scope": "everywhere",
    }
    return inquiry, whole, about


def _row(method: str, inquiry: Inquiry, whole: Faithfulness) -> dict[str, Any]:
    """A method's ranking on fresh prompts."""
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
        "circuit_faithfulness": whole.of(result.circuit.heads),
        "ranking": [str(head) for head in result.ranking],
        "options": options_now(method),
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
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    sys.exit(main())
