"""Files of a run with something wrong: each by its own reader, and whole run folders by the report."""

import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.case import Case, damaged, mutated
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.curves import FaithfulnessCurve
from workbench.circuits.evaluation import CircuitReport
from workbench.distillation.reports import read_log
from workbench.experiment.results import read_results, table
from workbench.experiment.runs import RunFolder
from workbench.matching import HeadMap
from workbench.report.run import run_report
from workbench.report.run_matches import read_ckas
from workbench.report.study import study_report
from workbench.storage import read_json, write_tensors
from workbench.study.diagnostic import read_known
from workbench.study.grid import opened_study
from workbench.values.refs import Head
from workbench.values.scores import Scores

RESULTS = Path(__file__).parents[2] / "assets" / "results"
REPORTED = {"step": 0, "loss": 1.0, "task_loss": 1.0, "alignment_loss": None, "ckas": {"L0H0 -> L0H0": 0.5}}
Door = tuple[Any, Callable[[Path], object], str]
"""A good value, its reader and the name of its file."""


def cases(seed: int, count: int) -> Iterator[Case]:
    """Two of three: one file by its reader; the third: a run folder of the committed results, damaged in one file."""
    draw, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="runfiles-"))
    doors = _doors()
    try:
        for number in range(count):
            place = folder / str(number)
            if number % 12 == 11:
                yield _folder_case(place, draw)
            elif number % 6 == 5:
                yield _scores_case(place, draw)
            else:
                yield _file_case(place, draw, *doors[draw.randrange(len(doors))])
            shutil.rmtree(place, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _doors() -> list[Door]:
    circuit = Circuit.of([Member(Head(1, 2), "A", "last")], shape=(3, 4), method="by hand")
    evaluation = read_json(RESULTS / "demo" / "student-evaluation.json")
    return [
        (circuit.to_json(), lambda path: Circuit.from_json(read_json(path)), "circuit.json"),
        (
            read_json(RESULTS / "demo" / "head_map.json"),
            lambda path: HeadMap.from_json(read_json(path)).summary(),
            "head_map.json",
        ),
        (
            read_json(RESULTS / "demo" / "results.json"),
            lambda path: table(read_results(path)),
            "results.json",
        ),
        (evaluation["curve"], lambda path: FaithfulnessCurve.from_json(read_json(path)).cpr, "curve.json"),
        (evaluation["report"], lambda path: CircuitReport.from_json(read_json(path)), "report.json"),
        (
            read_json(RESULTS / "study_entity" / "sibling" / "ckas.json"),
            lambda path: read_ckas(path.parent),
            "ckas.json",
        ),
        (
            {**REPORTED, "gradient_norm": 1.0, "learning_rate": 0.1, "weight": 1.0, "accuracy": 0.5},
            read_log,
            "log.jsonl",
        ),
        (read_json(RESULTS / "study_entity" / "study.json"), lambda path: opened_study(path.parent), "study.json"),
        (
            read_json(RESULTS / "study_entity" / "summary.json"),
            lambda path: (read_known(path.parent), study_report(path.parent)),
            "summary.json",
        ),
        (
            read_json(RESULTS / "demo" / "run.json"),
            lambda path: RunFolder(path.parent).begin({"recipe": {}}, resume=True),
            "run.json",
        ),
    ]


def _file_case(place: Path, draw: random.Random, value: Any, read: Callable[[Path], object], name: str) -> Case:
    place.mkdir()
    file = place / name
    if draw.random() < 0.8:
        changed, said = mutated(value, draw)
        file.write_text(json.dumps(changed) if name != "log.jsonl" else json.dumps(changed) + "\n")
    else:
        content, said = damaged(json.dumps(value).encode(), draw)
        file.write_bytes(content)
    return Case(name=f"{name}: {said}", run=lambda: read(file))


def _scores_case(place: Path, draw: random.Random) -> Case:
    """Scores as `save` writes them, with other metadata, other tensors or damaged bytes."""
    place.mkdir()
    file = place / "scores.safetensors"
    described: Any = {"axes": ["layer", "head"], "labels": {"layer": ["0", "1"]}, "unit": "nats", "baseline": None}
    values, said = torch.zeros(2, 3), "as they are"
    if draw.random() < 0.7:
        described, said = mutated(described, draw)
    elif draw.random() < 0.5:
        values = draw.choice((torch.zeros(2), torch.zeros(2, 3, dtype=torch.int64), torch.tensor(1.0)))
        said = f"values {tuple(values.shape)} {values.dtype}"
    write_tensors(file, {"values": values}, metadata={"scores": json.dumps(described)})
    if said == "as they are":
        content, said = damaged(file.read_bytes(), draw)
        file.write_bytes(content)
    return Case(name=f"scores: {said}", run=lambda: Scores.load(file).mean())


def _folder_case(place: Path, draw: random.Random) -> Case:
    """A whole run folder, laid out as a run writes it."""
    source = RESULTS / draw.choice(("study_entity/sibling", "smollm2_boxes", "demo"))
    shutil.copytree(source, place)
    (place / "run.json").exists() or shutil.copy(RESULTS / "demo" / "run.json", place)
    (place / "circuits").mkdir(exist_ok=True)
    for name in ("teacher", "student", "teacher-evaluation", "student-evaluation"):
        if (place / f"{name}.json").exists():
            shutil.move(place / f"{name}.json", place / "circuits" / f"{name}.json")
    files = sorted(file for file in place.rglob("*.json") if file.is_file())
    file = files[draw.randrange(len(files))]
    if draw.random() < 0.6:
        changed, said = mutated(json.loads(file.read_text()), draw)
        file.write_text(json.dumps(changed))
    else:
        content, said = damaged(file.read_bytes(), draw)
        file.write_bytes(content)

    def run() -> None:
        with redirect_stdout(io.StringIO()):
            run_report(RunFolder(place))

    return Case(name=f"{source.name}/{file.relative_to(place)}: {said}", run=run)
