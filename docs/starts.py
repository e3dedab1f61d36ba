"""What is known of a study's students before they train: `python -m docs.starts [STUDY ...] --work FOLDER`.

Of every student of the studies of bundled models, at its study's first data size, on the discovery prompts: the CKA of
the matched pairs as the study stores it, and the same of differences h(clean) - h(corrupt); and causal consistency
(interchange intervention accuracy, Geiger et al. 2021, arXiv 2106.02997),

    share of prompts with argmax f_S(clean; z_S := z_S(corrupt)) = argmax f_T(clean; z_T := z_T(corrupt)),

z the matched heads at their aligned tokens; then what the circuits carry alone on the test prompts. It is written to
assets/results/forecast/starts.json student by student, and a student that is there is not measured again unless its
study is named. Circuits and head maps stay in FOLDER, one study in each folder of it.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from docs.forms import RESULTS, ROOT, start
from docs.studies import OF_ONE_TASK
from workbench import storage
from workbench.circuits.evaluation import CircuitReport
from workbench.distillation.config import AlignmentConfig
from workbench.distillation.counterfactual import sites_of
from workbench.experiment.match import aligned, aligned_ckas, mean_cka_and_floor
from workbench.experiment.run import Run
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.head_rows import Readings, difference, reading_once
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import plain_logits
from workbench.patching.counterfactual import early_corrupt_activations
from workbench.patching.interchange import interchanged_logits
from workbench.storage.provenance import provenance
from workbench.study.config import read_study
from workbench.study.grid import Cell, Study
from workbench.tasks.base import PromptPairs

FILE = RESULTS / "forecast/starts.json"
STUDIES = (*OF_ONE_TASK["entity tracking"], *OF_ONE_TASK["theory of mind"])
NEAR = 2e-3
"""By how much a CKA may differ from the one that the study has stored."""
TOGETHER = AlignmentConfig(interchanged="all")
log = logging.getLogger("starts")


def main() -> int:
    """The studies that are named, or every student that is not measured yet."""
    parser = argparse.ArgumentParser(prog="python -m docs.starts", description="What is known before training.")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"measured anew: {', '.join(STUDIES)}")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/starts", help="where circuits and head maps stay")
    asked = parser.parse_args()
    if unknown := [name for name in asked.studies if name not in STUDIES]:
        parser.error(f"no study {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    known: dict[str, dict[str, Any]] = storage.read_json(FILE)["studies"] if FILE.exists() else {}
    for name in asked.studies or STUDIES:
        done = {} if name in asked.studies else known.get(name, {})
        if not set(read_study(name).students) <= set(done):
            with storage.command():
                for cell in cells(name, asked.work):
                    if cell.student not in done:
                        known.setdefault(name, {})[cell.student] = measured(name, cell)
                        write(known)
    return 0


def write(known: dict[str, dict[str, Any]]) -> None:
    """What is measured so far."""
    studies = {name: known[name] for name in STUDIES if name in known}
    about = {"command": "python -m docs.starts", "commit": provenance()["commit"]}
    storage.write_json(FILE, {**about, "studies": studies})


def cells(name: str, work: Path) -> Iterator[Cell]:
    """The students of a study at its first data size; lambda, on which nothing here hangs, is its first, so that no
    training chooses it."""
    config = read_study(name)
    first = {"train_scenes": config.train_scenes[:1], "weights": config.weights[:1]}
    study = Study(replace(config, **first, learning_rates=(), best=()), work / Path(name).stem)
    study.begin(resume=True)
    yield from study.cells()


def measured(study: str, cell: Cell) -> dict[str, Any]:
    """All that is known of a cell's student; a warning where its CKA is not the stored one."""
    run = cell.run
    known = similarities(run) | stored(study, cell.student, cell.scenes)
    if not near(known["cka"], known["stored_cka"]) or not near(known["cka_floor"], known["stored_floor"]):
        log.warning("%s, %s: %s is not what was stored", study, cell.student, known)
    pairs = aligned(run, run.head_map())
    values = {
        "train_scenes": cell.scenes,
        "discovery_prompts": len(run.prompts.discovery),
        **known,
        **agreements(run, pairs),
        **circuits(run),
        "matched": len(pairs),
    }
    log.info("%s, %s: %s", study, cell.student, values)
    return values


def stored(study: str, student: str, scenes: int) -> dict[str, float | None]:
    """The start that the study's summary holds, of the matched arm."""
    known = start(study, student, scenes)
    return {"stored_cka": known["cka"], "stored_floor": known["floor"]}


def near(value: float | None, other: float | None) -> bool:
    """Whether both are there, and the same up to rounding."""
    return value is not None and other is not None and abs(value - other) <= NEAR


class Differences(Readings):
    """A model read as h(clean) - h(corrupt)."""

    def read(self, prompts: PromptPairs, names: Sequence[str]) -> dict[str, Tensor]:
        """By hook name; NaN at tokens without a counterpart."""
        return difference(super().read(prompts, names), early_corrupt_activations(self.model, prompts, names))


def similarities(run: Run) -> dict[str, float | None]:
    """Debiased CKA of the matched pairs with its floor, of activations and of differences at the same tokens."""
    cka, floor = similarity(run)
    with reading_once(Differences(run.student), Differences(run.teacher)):
        of_differences, their_floor = similarity(run)
    return {
        "cka": cka,
        "cka_floor": floor,
        "cka_of_differences": of_differences,
        "cka_of_differences_floor": their_floor,
    }


def similarity(run: Run) -> tuple[float | None, float | None]:
    """(mean CKA of the matched pairs, mean floor) of the untrained student."""
    return mean_cka_and_floor(aligned_ckas(run, run.student, run.head_map(), run.prompts.discovery))


def agreements(run: Run, pairs: Sequence[AlignedPair]) -> dict[str, float | None]:
    """How often the untrained student's most likely next token is the teacher's, as they are and with their matched
    heads interchanged; None over no prompts. Errors: as `interchanged_logits`."""
    (theirs, theirs_changed), (ours, ours_changed) = (
        answers(model, run.read_by(model, run.prompts.discovery), pairs, side)
        for side, model in (("teacher", run.teacher), ("student", run.student))
    )
    agree, changes = ours_changed == theirs_changed, theirs_changed != theirs
    return {
        "plain_agreement": share(ours == theirs),
        "interchange_agreement": share(agree),
        "interchange_changes": share(changes),
        "interchange_agreement_where_changed": share(agree[changes]),
    }


def answers(model: HookedModel, prompts: PromptPairs, pairs: Sequence[AlignedPair], side: str) -> tuple[Tensor, Tensor]:
    """The most likely next token of each prompt, as it is and with the heads of one side (`teacher` or `student`) at
    the values of its corrupt counterpart: [batch] each."""
    sites = sites_of(pairs, side, prompts, torch.arange(len(prompts)), TOGETHER)
    return plain_logits(model, prompts).argmax(-1), interchanged_logits(model, prompts, sites).argmax(-1)


def share(of: Tensor) -> float | None:
    """Of prompts; None of none."""
    return float(of.double().mean()) if len(of) else None


def circuits(run: Run) -> dict[str, Any]:
    """Sizes of both circuits, and their faithfulness as the run's own evaluation has it."""
    values: dict[str, Any] = {}
    for side in ("student", "teacher"):
        report = CircuitReport.from_json(storage.read_json(run.folder.examined_file(side))["report"])
        values |= {
            f"{side}_faithfulness": report.faithfulness,
            f"{side}_circuit": report.heads,
            f"{side}_heads": report.total_heads,
        }
    return values


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    sys.exit(main())
