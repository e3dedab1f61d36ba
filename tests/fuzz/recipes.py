"""Recipes with something wrong: as text (YAML) and as settings of the command line."""

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.case import Case, damaged, mutated
from workbench.cli import main
from workbench.errors import InputError
from workbench.experiment.recipe import RECIPES, parse_config, read_recipe, read_yaml
from workbench.pretraining.finetuning import FinetuningConfig
from workbench.study.config import read_study

TEXTS = (
    "seeds: [0, 1, 0]\nseeds: [1]",
    "data: null",
    "data:\n  boxes: true",
    "alignment: {weight: .nan}",
    "alignment: {weight: .inf}",
    "training: {steps: 99999999999999999999999}",
    "training: {learning_rate: -.inf}",
    "title: 2020-01-01",
    "title: !!python/object/apply:os.system ['true']",
    "title: !!binary aGk=",
    "1: 2",
    "null: 2",
    "? [1, 2]\n: 3",
    "stages: [{name: A, title: a, position: last, into: Z, composition: q}]",
    "stages: [{name: A, title: a, position: last}, {name: A, title: b, position: last}]",
    "stages: null",
    "stages: 3",
    "conditions: circuit_ce",
    "seeds: 3",
    "seeds: [true]",
    "seeds: ['0']",
    "a: &a [x, x]\nb: [*a, *a]",
    "<<: {title: x}",
    "title: &t x\ndevice: *t",
    "data: {task: entity_tracking, options: {boxes: [1]}}",
    'title: "\\ud800"',
    "- 1",
    "just words",
    "%YAML 9.9",
    "--- a\n--- b",
    "data: {pairs: 3}",
    "evaluation: {transfer: {task: x}}",
    "alignment: {options: {1: 2}}",
)
SETTINGS = (
    "title.a=1",
    "data=1",
    "data.boxes.x=1",
    "data.boxes=true",
    "training.steps=[1",
    "training.steps=",
    "=3",
    ".=3",
    "data..boxes=3",
    "seeds.0=1",
    "training.steps=.nan",
    "alignment.weight=.inf",
    "data.boxes=3.5",
    "data.options.x={a: 1}",
    "stages=null",
    "training.steps=!!python/name:os.system",
    "title=2020-01-01",
    "training.steps=1e9999",
)


def cases(seed: int, count: int) -> Iterator[Case]:
    """Bundled recipes with one thing wrong, blocks that are wrong in themselves, and settings."""
    draw, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="recipes-"))
    bundled = sorted(RECIPES.glob("[rsf]*/*.yaml"))
    try:
        for number in range(count):
            file = bundled[draw.randrange(len(bundled))]
            path = folder / f"{number}.yaml"
            kind = number % 10
            if kind < 5:
                value, said = mutated(yaml.safe_load(file.read_text()), draw)
                path.write_bytes(_yaml(value))
            elif kind < 8:
                content, said = damaged(file.read_bytes(), draw)
                path.write_bytes(content)
            elif kind == 8:
                said = draw.choice(TEXTS)
                path.write_text(f"teacher: x\n{said}\n", errors="replace")
            else:
                said = draw.choice(SETTINGS)
                path.write_bytes(file.read_bytes())
                yield Case(name=f"--set {said}", run=_command(path, said))
                continue
            yield Case(name=f"{file.stem}: {said}", run=_read(path, file.parent.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return repr(value).encode("utf-8", "surrogatepass")


def _read(path: Path, kind: str) -> Callable[[], object]:
    if kind == "studies":
        return lambda: read_study(path)
    if kind == "finetunings":
        return lambda: parse_config(FinetuningConfig, read_yaml(path))
    return lambda: read_recipe(path)


def _command(path: Path, setting: str) -> Callable[[], object]:
    """As the command line reads it; what it answers with its exit code is a refusal."""

    def run() -> None:
        out = path.with_suffix("")
        code = main(["plan", str(path), "--set", setting, "--threads", "1", "--tokenizer", str(out)])
        if code:
            raise InputError("said by the command")

    return run
