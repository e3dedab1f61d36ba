"""What circuits are worth for distillation, by the method that found them: `python -m docs.worth`.

Theory of mind on the mixture's models. Of each method's rankings (assets/results/discovery) the first 9 of the
teacher's 32 heads and the first 7 of the student's 24 are matched by similarity, and the student trains on 300 stories
with cross-entropy alone and with CKA at the last token. Measured on 200 validation stories, which no study tests on.
Done trainings are kept, so that an interrupted run goes on. `python -m docs.worth SEED ...` does those seeds.
"""

import logging
import sys
from typing import Any

import torch

import workbench as wb
from docs.methods import FOLDER
from workbench import storage
from workbench.circuits.circuit import Circuit, Member
from workbench.patching.ablation import plain_logits
from workbench.storage.provenance import provenance
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import METRICS
from workbench.values.refs import head_named

FILE = FOLDER / "mind-worth.json"
METHODS = ("elimination", "mean_ablation", "elimination_by_gates", "learned_gates", "eap_ig", "gim", "relp")
HEADS = {"teacher": 9, "student": 7}
TRAIN, VALIDATION, STEPS, BATCH, WEIGHT = 300, 200, 100, 32, 0.3
log = logging.getLogger("worth")


def main() -> int:
    """The named seeds, or the first."""
    teacher, student = wb.Teacher.load("mixture-teacher"), wb.Student.load("mixture-student")
    task = wb.task("theory_of_mind")
    stories = task.pairs(teacher, scenes=TRAIN + VALIDATION, split="train")
    matched_on = task.pairs(teacher, scenes=60)
    train, validation = stories.rows(slice(0, TRAIN)), stories.rows(slice(TRAIN, None))
    rows: dict[str, Any] = storage.read_json(FILE)["rows"] if FILE.exists() else {}
    for seed in map(int, sys.argv[1:] or ["0"]):
        for method in METHODS:
            theirs, ours = (first(method, who) for who in ("teacher", "student"))
            matching = None
            for arm, weight in (("circuit CE", 0.0), ("CE + CKA", WEIGHT)):
                if (key := f"{method}, {arm}, seed {seed}") in rows:
                    continue
                matching = matching or wb.match(
                    student, teacher, ours, theirs, matched_on, rule="similarity", one_to_one=True, positions="last"
                )
                trained = wb.distill(
                    student,
                    teacher,
                    matching,
                    train,
                    weight=weight,
                    seed=seed,
                    steps=STEPS,
                    batch=BATCH,
                    learning_rate=1e-3,
                )
                rows[key] = {
                    "method": method,
                    "arm": arm,
                    "seed": seed,
                    "accuracy": accuracy(plain_logits(trained.student, validation), validation),
                    "cka_before": matching.mean_cka,
                }
                log.info("%s: %.3f", key, rows[key]["accuracy"])
                write(rows, accuracy(plain_logits(student, validation), validation))
    return 0


def first(method: str, who: str) -> Circuit:
    """The first heads of a method's ranking."""
    ranked = storage.read_json(FOLDER / f"mind-{who}.json")["methods"][method]["ranking"]
    shape = {"teacher": (4, 8), "student": (3, 8)}[who]
    heads = [head_named(name) for name in ranked[: HEADS[who]]]
    return Circuit.of((Member(head, method, "all") for head in heads), shape=shape, method=method)


def accuracy(logits: torch.Tensor, pairs: PromptPairs) -> float:
    """Over the vocabulary."""
    return float(METRICS["accuracy"](logits, pairs.answers, pairs.distractors).mean())


def write(rows: dict[str, Any], base: float) -> None:
    """What is done so far."""
    about = {
        "command": "python -m docs.worth",
        "commit": provenance()["commit"],
        "base": base,
        "heads": HEADS,
        "stories": {"train": TRAIN, "validation": VALIDATION},
        "training": {"steps": STEPS, "batch": BATCH, "learning_rate": 1e-3, "weight": WEIGHT, "positions": "last"},
    }
    storage.write_json(FILE, {**about, "rows": rows})


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    sys.exit(main())
