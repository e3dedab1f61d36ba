"""What a study found: three sentences of its own numbers, and each cell's conditions as a table.

A difference is a gain or a loss where its 95 % interval over seeds leaves out 0, and could be none elsewhere; of a
single seed, which has no such interval, nothing is said.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from workbench.experiment.conditions import CONDITIONS, METHOD, PLAIN, TITLES
from workbench.plots.table import condition_title
from workbench.values.display import plain

PARTS = {"full": "full model", "circuit": "circuit alone"}
WRONG = [name for name, each in CONDITIONS.items() if each.aligns in ("random", "shuffled")]
"""Alignment to heads that nothing speaks for: what any alignment does."""
GAIN, LOSS = "a gain", "a loss"
FEW = 2
"""Cells that are spoken of one by one."""


def study_opening(summary: Mapping[str, Any]) -> list[str]:
    """What alignment of the matched heads gained over circuit CE, what alignment to the wrong ones did, and whether the
    gain could be known before training."""
    cells = summary["cells"]
    wrong = next((name for name in WRONG if any(_against_plain(cell, name) for cell in cells)), None)
    sentences = [_gains(cells, METHOD, "Alignment of the matched heads"), _foresight(summary["diagnostic"])]
    if wrong is not None:
        sentences.insert(1, _gains(cells, wrong, f"The control, {TITLES[wrong]},"))
    return sentences


def cell_title(cell: Mapping[str, Any]) -> str:
    """`sibling, 10 scenes`."""
    return f"{cell['student']}, {cell['train_scenes']} scenes"


def cell_html(cell: Mapping[str, Any]) -> str:
    """The conditions with their intervals over seeds, and what each is beyond circuit CE, as an HTML table with all
    text escaped."""
    columns = ("Condition", "Full model", "Circuit alone", "Random circuit", "Full, beyond circuit CE", "p")
    columns += ("Alone, beyond circuit CE", "p", "Mean CKA", "CKA floor", "Trained")
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    rows = "\n".join(
        _row(name, condition, _against_plain(cell, name)) for name, condition in cell["conditions"].items()
    )
    caption = (
        "Means over seeds with 95 % t intervals; p: McNemar's exact test, two-sided, pooled over seeds on the same "
        "prompts."
    )
    return (
        f'<table class="results">\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table>"
    )


def _against_plain(cell: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return cell["comparisons"].get(PLAIN, {}).get(name)


def _gains(cells: Sequence[Mapping[str, Any]], condition: str, subject: str) -> str:
    """A condition against circuit CE: cell by cell where they are few, else how many gained, and the extremes."""
    compared = [(cell, against) for cell in cells if (against := _against_plain(cell, condition)) is not None]
    if not compared:
        return f"{subject} was not compared with circuit CE in this study."
    if len(compared) <= FEW:
        return f"{subject} against circuit CE: {'; '.join(_cell(cell, against) for cell, against in compared)}."
    return f"{subject} against circuit CE: {'; '.join(_over(compared, part) for part in PARTS)}."


def _cell(cell: Mapping[str, Any], against: Mapping[str, Any]) -> str:
    parts = (f"{label} {_difference(against[part])}" for part, label in PARTS.items())
    return f"{cell_title(cell)}: {', '.join(parts)}"


def _over(compared: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], part: str) -> str:
    verdicts = [_verdict(against[part]["over_seeds"]) for _, against in compared]
    counts = " and ".join(_counted(verdicts.count(kind), kind) for kind in (GAIN, LOSS))
    ends = sorted(compared, key=lambda pair: pair[1][part]["over_seeds"]["mean"])
    least, most = (
        f"{_mean_and_interval(against[part]['over_seeds'], '+.3f')} in {cell_title(cell)}"
        for cell, against in (ends[0], ends[-1])
    )
    return f"{PARTS[part]}, {counts} in {len(compared)} cells (from {least} to {most})"


def _counted(count: int, kind: str) -> str:
    noun = kind.removeprefix("a ")
    return f"{count} {noun if count == 1 else noun.replace('loss', 'losse') + 's'}"


def _difference(compared: Mapping[str, Any]) -> str:
    """`+0.025 [+0.003, +0.047], a gain`."""
    seeds = compared["over_seeds"]
    verdict = _verdict(seeds)
    return _mean_and_interval(seeds, "+.3f") + (f", {verdict}" if verdict else "")


def _verdict(over: Mapping[str, Any]) -> str:
    if over["low"] is None:
        return ""
    return GAIN if over["low"] > 0 else LOSS if over["high"] < 0 else "which could be none"


def _mean_and_interval(value: Mapping[str, Any], form: str) -> str:
    spread = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}}{spread}"


def _foresight(diagnostic: Mapping[str, Any]) -> str:
    correlation, trainings = diagnostic["rank_correlation"], len(diagnostic["points"])
    if correlation is None:
        return "Whether the gain could be known before training can't be said: too few trainings align."
    return (
        f"Known before training: the rank correlation of the gain with the pairs' CKA above its floor is "
        f"{correlation:.2f} over {trainings} trainings."
    )


def _row(name: str, condition: Mapping[str, Any], against: Mapping[str, Any] | None) -> str:
    cells = [_mean_and_interval(condition[part], ".3f") for part in PARTS]
    cells.append(f"{condition['random_circuit']['mean']:.3f}")
    for part in PARTS:
        difference = None if against is None else against[part]
        cells.append("" if difference is None else _mean_and_interval(difference["over_seeds"], "+.3f"))
        cells.append("" if difference is None else f"{difference['pooled_p']:.1g}")
    cells += ["" if condition[key] is None else plain(condition[key]["mean"], 2) for key in ("cka", "cka_floor")]
    cells.append(f"{condition['trained_fraction']:.1%}".replace("%", " %"))
    opening = '<tr class="method">' if name == METHOD else "<tr>"
    body = "".join(f"<td>{escape(text)}</td>" for text in cells)
    return f'{opening}<th scope="row">{escape(condition_title(name))}</th>{body}</tr>'
