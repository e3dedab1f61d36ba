"""How the tables of README and site say numbers, and where the committed results lie."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.experiment.conditions import METHOD
from workbench.experiment.results import TITLES

ROOT = Path(__file__).parents[1]
RESULTS, MODELS = ROOT / "assets/results", ROOT / "assets/models"
RANDOM, PAPER = "circuit_ce_random_cka", "circuit_ce_paper_cka"
ARMS = {METHOD: "matched partners", RANDOM: "random partners", PAPER: "paper's matching"}
"""Arms that align, by their partners."""
DASH, MINUS, HARD = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float | None, digits: int = 3) -> str:
    """`0.123`; a dash for what there is not."""
    return DASH if value is None else f"{value:.{digits}f}"


def with_interval(found: Mapping[str, Any], digits: int = 3) -> str:
    """`0.123 [0.10, 0.14]` of a mean over seeds; without an interval where there was nothing to repeat."""
    interval = "" if found["low"] is None else f" [{found['low']:.2f},{HARD}{found['high']:.2f}]"
    return number(found["mean"], digits) + interval


def mean(values: Sequence[float | None]) -> float | None:
    """Of what is there; None of nothing."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def over_floor(cka: float | None, floor: float | None) -> str:
    """`0.91 (0.00)`: a CKA and what it is with the prompts shuffled."""
    return DASH if cka is None else f"{cka:.2f} ({floor:.2f})".replace("-0.00", "0.00")


def difference(found: Mapping[str, Any]) -> str:
    """`+0.012 [0.003, 0.021]`, with real minus signs; without an interval where nothing was repeated."""
    interval = "" if found["low"] is None else f" {reach(found)}"
    return f"{found['mean']:+.3f}{interval}".replace("-0.000", "+0.000").replace("-", MINUS)


def reach(found: Mapping[str, Any]) -> str:
    """`[0.003, 0.021]`, with real minus signs."""
    if found["low"] is None:
        return DASH
    return f"[{found['low']:.3f},{HARD}{found['high']:.3f}]".replace("-0.000", "0.000").replace("-", MINUS)


def probability(value: float) -> str:
    """`0.03`; `< 0.0001` below that."""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


def titled(condition: str) -> str:
    """A condition in the paper's words, the method in bold."""
    return f"**{TITLES[condition]}**" if condition == METHOD else TITLES[condition]


@cache
def summary(study: str) -> dict[tuple[str, int], Mapping[str, Any]]:
    """A study's cells by (student, training scenes)."""
    return {
        (cell["student"], cell["train_scenes"]): cell
        for cell in storage.read_json(RESULTS / study / "summary.json")["cells"]
    }


@cache
def diagnostic(study: str) -> Mapping[str, Any]:
    """The forecast's part of a study's summary: every aligned training."""
    return storage.read_json(RESULTS / study / "summary.json")["diagnostic"]


def start(study: str, student: str, scenes: int) -> Mapping[str, Any]:
    """A training with matched partners as the diagnostic has it: `cka` and `floor` of its untrained pairs."""
    of = (student, scenes, METHOD)
    points = diagnostic(study)["points"]
    return next(each for each in points if (each["student"], each["train_scenes"], each["condition"]) == of)
