"""Families x methods, on miniatures with random weights: `python -m docs.families [FAMILY ...]` tries each family anew,
on all free cores, and writes assets/results/families.json, of which `make tables` makes the table of
docs/concepts/families.md.

A family's miniature is three layers of its own config class (`tests/miniatures.py`); `check_model` computes with it and
asks each method, and a student of it is saved, read back and compared.
"""

import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.miniatures import FAMILIES, miniature
from workbench import storage
from workbench.errors import InputError
from workbench.experiment.pool import Pool, free_cores
from workbench.models.hooked_model import Student
from workbench.patching.conformance import check_model, random_pairs

FILE = Path(__file__).parents[1] / "assets/results/families.json"
SAVING = "saving a student"
ROUNDING = 1e-4
"""By how much of the largest logit a saved student may differ once it is read back."""


def row(family: str) -> dict[str, Any]:
    """What each method says of a family, or why it is refused: nothing in it depends on the machine."""
    with tempfile.TemporaryDirectory() as place:
        folder = miniature(family, FAMILIES[family], Path(place) / family)
        try:
            found = check_model(folder)
        except InputError as error:
            return {"refused": _plain(str(error), folder)}
        methods = {
            ability.method: {"possible": ability.possible, "how": _plain(ability.how, folder)}
            for ability in found.abilities
        }
        if methods[SAVING]["possible"] and not _comes_back(folder, Path(place) / "saved"):
            methods[SAVING] = {"possible": False, "how": "what is read back gives other logits"}
    return {"architecture": found.architecture, "engine": found.engine, "wrong": list(found.wrong), "methods": methods}


def _plain(text: str, folder: Path) -> str:
    """Without the folder's name and what was measured."""
    return re.sub(r" \((largest )?difference[^()]*\)", "", text.replace(str(folder), folder.name))


def _comes_back(folder: Path, saved: Path) -> bool:
    student = Student.load(folder, check=False)
    pairs = random_pairs(student)
    try:
        student.save(saved)
        other = Student.load(saved)
    except InputError:
        return False
    with torch.no_grad():
        expected, actual = (one.final_logits(pairs.clean, pairs.mask) for one in (student, other))
    return bool((actual - expected).abs().max() <= ROUNDING * expected.abs().max())


def main(families: Iterable[str]) -> None:
    """Try families anew (all of them, where none is named) and write what was found."""
    chosen = list(families) or list(FAMILIES)
    rows: Mapping[str, Any] = storage.read_json(FILE)["families"] if FILE.exists() else {}
    rows = dict(rows)
    for family in chosen:
        if family not in FAMILIES:
            raise SystemExit(f"no miniature of {family!r}; there are {', '.join(FAMILIES)}.")

    def keep(number: int, found: dict[str, Any]) -> None:
        family = chosen[number]
        rows[family] = found
        sys.stdout.write(f"{family}: {found.get('engine', found.get('refused'))}\n")
        sys.stdout.flush()
        ordered = {name: rows[name] for name in (*FAMILIES, *rows) if name in rows}
        storage.write_json(FILE, {"command": "python -m docs.families", "families": ordered})

    Pool(workers=free_cores(), unit="family", what="families").run(row, [(family,) for family in chosen], keep)


if __name__ == "__main__":
    main(sys.argv[1:])
