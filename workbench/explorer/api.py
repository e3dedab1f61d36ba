"""`explore(...)`: models and prompts -> a session, kept under a name, and the widget that shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict, Unpack

from workbench import storage
from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.explorer.budget import BUDGET
from workbench.explorer.command import PROMPTS
from workbench.explorer.material import PLAIN, Given, Material, key_of, material_of_pairs, material_of_task
from workbench.explorer.session import Session
from workbench.explorer.state import Side
from workbench.matching import HeadMap
from workbench.models.hooked_model import HookedModel, Teacher
from workbench.tasks.base import Task
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.tokenizers import SharedWords, refuse_token_indices, same_vocabulary
from workbench.values.settings import configured

if TYPE_CHECKING:
    from workbench.explorer.widget import Explorer

TASKS = ("entity_tracking", "ioi")
"""Tried in this order where neither a task nor pairs are given."""
_SESSIONS: dict[str, tuple[str, Session]] = {}
"""Name -> identity of what the session is about, and the session."""


class ExploreSettings(TypedDict, total=False):
    """What of an exploration can be set besides its models and prompts."""

    options: Mapping[str, Any]
    """Of a task that is named."""
    reference: Given | None
    """Pairs whose clean prompts give the means, beside `pairs` of your own."""
    prompts: int
    """How many of a task."""
    seed: int
    """Of the task's prompts."""
    head_map: HeadMap | None
    """The matches to show as partners."""
    circuits: Mapping[Side, Circuit] | None
    """What to begin with."""
    settings: PromptSettings
    """BOS and chat template."""
    folder: str | Path
    """Where circuits are saved."""
    memory: int
    """Bytes that the runs of the prompts in view may take; what would need more is cut or refused."""
    runs: Sequence[str | Path]
    """Folders of runs, whose circuits can be loaded and whose matches are walked (where no `head_map` is given)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Settings:
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: Given | None = None
    prompts: int = PROMPTS
    seed: int = 0
    head_map: HeadMap | None = None
    circuits: Mapping[Side, Circuit] | None = None
    settings: PromptSettings = PLAIN
    folder: str | Path = "."
    memory: int = BUDGET
    runs: Sequence[str | Path] = ()


def explore(
    teacher: HookedModel | str | Path,
    student: HookedModel | str | Path | None = None,
    *,
    after: HookedModel | str | Path | None = None,
    task: Task | str | None = None,
    pairs: Given | None = None,
    name: str = "explorer",
    theme: Literal["auto", "light", "dark"] = "auto",
    **settings: Unpack[ExploreSettings],
) -> "Explorer":
    """The explorer as a Jupyter widget: a model, or a teacher beside its student (`after`: the student after
    distillation).

    The prompts come from a `task` (by name with `options`, or as an object) or are your own `pairs` (a file, a dataset,
    or `Pair`s), with `reference` pairs for mean ablation. `head_map`: the matches to show as partners. `circuits`: what
    to begin with. `settings`: BOS and chat template. Saved circuits go to `folder`. The state is kept under `name`:
    running the cell again goes on where it was, as long as models and prompts are the same. While the explorer computes
    in the background, other calls of the workbench on the same models wait for it. Errors: `InputError` for what can't
    be explored, and for an unknown setting (see `ExploreSettings`).
    """
    try:
        from workbench.explorer.widget import Explorer
    except ImportError:
        raise InputError(
            'the explorer in Jupyter needs anywidget: pip install "circuit-distillation-workbench[explorer]"; without '
            "Jupyter use `workbench explore`."
        ) from None
    session = session_of(teacher, student, after=after, task=task, pairs=pairs, name=name, **settings)
    return Explorer(session, theme=theme)


def session_of(
    teacher: HookedModel | str | Path,
    student: HookedModel | str | Path | None = None,
    *,
    after: HookedModel | str | Path | None = None,
    task: Task | str | None = None,
    pairs: Given | None = None,
    name: str | None = None,
    **settings: Unpack[ExploreSettings],
) -> Session:
    """The session behind `explore`, without a widget; with a `name` the one that is kept under it, where it is about
    the same things."""
    chosen = configured(_Settings, settings, call="explore")
    given: dict[Side, HookedModel | str | Path | None] = {"teacher": teacher, "student": student, "after": after}
    models: dict[Side, HookedModel] = {side: _model(model) for side, model in given.items() if model is not None}
    if pairs is not None and task is not None:
        raise InputError("give either a task or pairs of your own, not both.")
    if pairs is None:
        material = _of_task(task, list(models.values()), chosen)
    else:
        material = _readable(material_of_pairs(pairs, chosen.reference, chosen.settings), list(models.values()))
    folder, runs = Path(chosen.folder), _run_folders(chosen.runs)
    head_map = chosen.head_map if chosen.head_map is not None else _matches_of(runs)

    def begun() -> Session:
        return Session(
            models,
            material,
            head_map=head_map,
            circuits=chosen.circuits,
            folder=folder,
            memory=chosen.memory,
            runs=runs,
        )

    if name is None:
        return begun()
    identity = _identity(models, material)
    known = _SESSIONS.get(name)
    if known is not None and known[0] == identity:
        known[1].head_map, known[1].folder, known[1].runs = head_map, folder, tuple(runs)
        return known[1]
    forget(name)
    _SESSIONS[name] = (identity, begun())
    return _SESSIONS[name][1]


def forget(name: str = "explorer") -> None:
    """Let go of a kept session: its models, its results and its thread."""
    session = _SESSIONS.pop(name, None)
    if session is not None:
        session[1].close()


def _run_folders(runs: Sequence[str | Path]) -> list[Path]:
    folders = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder} of a run; give one that `workbench run` has written.")
    return folders


def _matches_of(runs: Sequence[Path]) -> HeadMap | None:
    """The matches of the first run that has some."""
    files = [folder / HeadMap.FILE for folder in runs]
    return next((HeadMap.from_json(storage.read_json(file)) for file in files if file.is_file()), None)


def _model(model: HookedModel | str | Path) -> HookedModel:
    return model if isinstance(model, HookedModel) else Teacher.load(model)


def _of_task(task: Task | str | None, models: Sequence[HookedModel], chosen: _Settings) -> Material:
    """Prompts of a task in words that all models know."""
    how: dict[str, Any] = {"prompts": chosen.prompts, "seed": chosen.seed, "settings": chosen.settings}
    tokenizer = models[0].tokenizer
    if _several_tokenizers(models):
        tokenizer = SharedWords(*(model.tokenizer for model in models))
        how["spelled"] = f"SharedWords({', '.join(f'tokenizer_of({model.name!r})' for model in models)})"
    if task is not None:
        return material_of_task(task, chosen.options, tokenizer, **how)
    last: InputError | None = None
    for name in TASKS:
        try:
            return material_of_task(name, chosen.options, tokenizer, **how)
        except InputError as refused:
            last = refused
    raise InputError(
        f"{models[0].name} can't read the prompts of {' or '.join(TASKS)} ({last}); give `pairs` of your own, or a "
        "`task`."
    )


def _several_tokenizers(models: Sequence[HookedModel]) -> bool:
    return not all(same_vocabulary(models[0].tokenizer, model.tokenizer) for model in models)


def _readable(material: Material, models: Sequence[HookedModel]) -> Material:
    """A user's own pairs, unless their positions are token indices for models that have different tokens."""
    if _several_tokenizers(models):
        for number, pair in enumerate(material.shown.pairs, 1):
            refuse_token_indices(number, pair)
    return material


def _identity(models: Mapping[Side, HookedModel], material: Material) -> str:
    """What a session is about: the models' weights and all prompts."""
    drawn = [material.shown, material.evaluated, *([material.reference] if material.reference else [])]
    return repr(
        [(side, model.fingerprint()) for side, model in models.items()]
        + [[key_of(pair) for pair in each.pairs] for each in drawn]
        + [material.settings]
    )
