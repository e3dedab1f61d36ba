"""The model card of a saved student (`README.md`): what was trained and on what, what it gained, by which recipe and
commit, and the licences that others' cards state.

A licence is repeated where the card of a model's own folder states it, and never guessed. Of a student from the hub the
metadata name the base; a local folder is named in the text alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from workbench.storage.assets import MODELS, located, short_name
from workbench.storage.provenance import commit

FILE = "README.md"
PAPER = "https://arxiv.org/abs/2509.25002"
RESULTS = "Results"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentDescription:
    """What a card says of a student. What is not known is left out."""

    base: str
    """What was loaded: a hub id, a folder, a bundled model's name."""
    teacher: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    """What was trained and how, by name."""
    results: tuple[Sequence[str], ...] = ()
    """A table with its head."""
    circuits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Whose -> its heads."""
    matches: Sequence[str] = ()
    """Aligned pairs, student~teacher."""
    recipe: str = ""
    """YAML."""
    files: Mapping[str, Any] = field(default_factory=dict)
    """JSON values by file name, saved beside the weights: circuits and head map, which `Circuit.load` and
    `HeadMap.load` read."""

    def with_results(self, frame: pd.DataFrame) -> "StudentDescription":
        """The same with a table of results, such as `compare(...).to_frame()`; a pair of numbers is an interval."""
        rows = [tuple(map(_cell, row)) for row in frame.itertuples(index=False)]
        return replace(self, results=(tuple(name.replace("_", " ") for name in frame.columns), *rows))


def model_card(student: StudentDescription) -> ModelCard:
    """The card, as `huggingface_hub` reads and writes it."""
    named = {name: shown(name) for name in (student.base, student.teacher) if name is not None}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=licence_of(student.base),
        base_model=student.base if _is_hub_id(student.base) else None,
        tags=["circuit-distillation"],
    )
    title = f"{named[student.base]}, distilled" if student.teacher else named[student.base]
    parts = [
        f"# {title}",
        f"A student saved by the circuit-distillation workbench, after [Circuit Distillation]({PAPER}).",
        "## What was trained",
        _table(("", ""), _facts(student, named)),
    ]
    if student.results:
        parts += [f"## {RESULTS}", *_results(student.results)]
    if student.circuits:
        heads = [(name, str(len(heads)), ", ".join(heads)) for name, heads in student.circuits.items()]
        parts += ["## Circuits", _table(("model", "heads", "which"), heads)]
        if student.files:
            parts.append(f"As files beside the weights: {', '.join(f'`{name}`' for name in student.files)}.")
    if student.matches:
        parts += ["## Aligned pairs (student~teacher)", ", ".join(student.matches)]
    if student.recipe:
        parts += ["## Recipe", f"```yaml\n{student.recipe.strip()}\n```"]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def with_results(card: str, table: Sequence[Sequence[str]]) -> str:
    """A card that `model_card` made with this table (and its head) in place of the one that it has, or after what was
    trained."""
    above, *sections = card.split("\n## ")
    others = [section for section in sections if not section.startswith(f"{RESULTS}\n")]
    section = "\n\n".join([RESULTS, *_results(table)]) + "\n"
    return "\n## ".join([above, *others[:1], section, *others[1:]])


def _results(table: Sequence[Sequence[str]]) -> list[str]:
    note = "In brackets: 95 % intervals over prompts, of one training each; seeds vary beside them."
    return [_table(table[0], table[1:]), note]


def licence_of(source: str) -> str | None:
    """The licence that a model's own card states, by the name that it was loaded by; None where none is to be seen.

    A card is looked for beside the weights, and of a hub id in the local cache.
    """
    folder = Path(located(source)).expanduser()
    file: Any = folder / FILE
    if not folder.is_dir():
        if not _is_hub_id(source):
            return None
        file = try_to_load_from_cache(source, FILE)
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    try:
        stated = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict().get("license")
    except (ValueError, OSError, yaml.YAMLError):  # a card of somebody's own making
        return None
    return stated if isinstance(stated, str) else None


def shown(source: str) -> str:
    """A hub id or a bundled model's name as it is; of a path its last part, as where it lay says nothing elsewhere."""
    return short_name(source) if _is_hub_id(source) or short_name(source) in MODELS else Path(source).name


def _is_hub_id(source: str) -> bool:
    if source in MODELS or Path(source).exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        return False
    try:
        try_to_load_from_cache(source, FILE)
    except HFValidationError:
        return False
    return not source.endswith(".gguf")


def _facts(student: StudentDescription, named: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    yield "student", _with_licence(student.base, named[student.base])
    if student.teacher is not None:
        yield "teacher", _with_licence(student.teacher, named[student.teacher])
    yield from student.facts.items()
    yield "commit of the workbench", commit() or "not from a checkout"


def _with_licence(source: str, name: str) -> str:
    licence = licence_of(source)
    return f"{name} ({'no licence is stated beside it' if licence is None else f'its card states: {licence}'})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; a bar in a cell is escaped, a line break is a space."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_cell(each) for each in value)}]"
    if value is None or value != value:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
