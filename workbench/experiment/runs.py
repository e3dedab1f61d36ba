"""Run folders: everything that a command found, under one directory, as JSON and safetensors.

    run/
      run.json                 recipe, seed, versions, commit, machine
      left_out.json            the bad rows of a file of pairs, where they are left out
      scores/<model>-<name>.safetensors
      circuits/<model>.json, <model>-search.json, <model>-evaluation.json    head_map.json    ckas.json
      conditions/<condition>-<seed>/log.jsonl, checkpoint.safetensors, training.json, result.json, student/
      results.json             one object per condition and seed
      report.html

A stage whose file is there has been done; files are written atomically, so a killed run resumes where it stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.experiment.origins import KEY, Origin, require_origin
from workbench.experiment.recipe import Recipe, to_plain, written_recipe
from workbench.matching import HeadMap
from workbench.storage.provenance import provenance
from workbench.tasks.records import RowError
from workbench.values.scores import Scores

LEFT_OUT = "left_out.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A directory that holds one run."""

    path: Path
    trial: str = ""
    """A subfolder for conditions that share this folder's circuits and head map with those of other trials (data sizes,
    weights of the alignment)."""

    @property
    def trial_path(self) -> Path:
        """Where conditions and their results lie."""
        return self.path / self.trial

    def record_left_out(self, source: str, rows: Sequence[RowError]) -> None:
        """Write which rows of a file of pairs are left out, and why."""
        storage.write_json(
            self.trial_path / LEFT_OUT,
            {"source": source, "left_out": len(rows), "rows": [row.to_json() for row in rows]},
        )

    def begin(self, described: Mapping[str, Any], *, resume: bool, lock: bool = True) -> None:
        """Write `run.json`, or with `resume` check that it is the same run; from then on this process holds the folder.

        A folder that holds nothing but `run.json` (a run that failed before its first result) is begun anew. Errors:
        `InputError` when another process works in the folder, when it holds a run and `resume` is off, or another run
        than the described one.
        """
        file = self.path / "run.json"
        _require_usable(self.path)
        if lock:
            within_study = (self.path.parent / "study.json").exists()
            storage.hold(self.path.parent if within_study else self.path, lambda: leave_free(self.path, file.name))
        if file.exists() and holds_nothing_but(self.path, file.name):
            storage.discard(file)
        if file.exists():
            if not resume:
                raise InputError(f"{self.path} already holds a run; resume it with --resume, or choose another --out.")
            if self._recipe(storage.read_json(file)) != written_recipe(described["recipe"]):
                raise InputError(
                    f"{self.path} was begun with another recipe; resume with that recipe (it is in {file}), or choose "
                    "another --out."
                )
            return
        if resume and not holds_nothing_but(self.path):
            raise InputError(
                f"{self.path} has no run.json: it is no run folder, or a damaged one. Choose another --out, or delete "
                "it."
            )
        storage.write_json(file, {**described, **provenance()})

    def _recipe(self, described: Any) -> Recipe:
        file, remedy = self.path / "run.json", "choose another --out, or delete the folder"
        recipe = storage.read_field(described, "recipe", what=f"the description of a run ({file})", remedy=remedy)
        if not isinstance(recipe, Mapping):
            raise InputError(f"{file} is damaged (its recipe is no object); {remedy}.")
        try:
            return written_recipe(recipe)
        except InputError as error:
            raise InputError(f"{file} is damaged or of another version ({error}); {remedy}.") from None

    def described(self) -> dict[str, Any]:
        """What `run.json` says, its recipe in the form of today. Errors: `InputError` when it is missing or damaged."""
        if not (self.path / "run.json").exists():
            raise InputError(
                f"{self.path} is not a run folder (no run.json); give the folder that `workbench demo` or `workbench "
                "discover` wrote."
            )
        description = storage.read_json(self.path / "run.json")
        recipe = to_plain(self._recipe(description))
        return {**description, "recipe": recipe}

    def examined_file(self, model: str) -> Path:
        """A circuit's report and faithfulness curve on test prompts."""
        return self.path / "circuits" / f"{model}-evaluation.json"

    def search_file(self, model: str) -> Path:
        """How a model's circuit was found: the ranking with its curve, and what the prompts can't tell."""
        return self.path / "circuits" / f"{model}-search.json"

    def scores_file(self, model: str, name: str) -> Path:
        """Where scores of a model (`teacher` or `student`) lie."""
        return self.path / "scores" / f"{model}-{name}.safetensors"

    def scores(self, model: str) -> dict[str, Scores]:
        """All scores of a model, by name."""
        files = sorted((self.path / "scores").glob(f"{model}-*.safetensors"))
        return {file.stem.removeprefix(f"{model}-"): Scores.load(file) for file in files}

    def circuit_file(self, model: str) -> Path:
        """Where a model's circuit lies."""
        return self.path / "circuits" / f"{model}.json"

    def circuit(self, model: str, expected: Origin | None = None) -> Circuit:
        """A model's circuit. Errors: `InputError` when it has not been found yet, or is not of the expected origin."""
        return Circuit.from_json(self._read(self.circuit_file(model), "discover", expected))

    @property
    def head_map_file(self) -> Path:
        """Where the head map lies."""
        return self.path / "head_map.json"

    def head_map(self, expected: Origin | None = None) -> HeadMap:
        """The matching. Errors: `InputError` when it has not been made yet, or is not of the expected origin or of the
        circuits beside it."""
        head_map = HeadMap.from_json(self._read(self.head_map_file, "match", expected))
        for model, heads in (
            ("student", {match.student for match in head_map.matches}),
            ("teacher", set(head_map.teacher_heads)),
        ):
            if self.circuit_file(model).exists() and (strangers := heads - set(self.circuit(model).heads)):
                raise InputError(
                    f"{self.head_map_file} matches {', '.join(map(str, sorted(strangers)))}, not in the circuit of "
                    f"the {model} beside it: it was made from another circuit. Delete it and run `workbench match` "
                    "again."
                )
        return head_map

    def condition(self, name: str, seed: int) -> Path:
        """The folder of a condition and seed."""
        return self.trial_path / "conditions" / f"{name}-{seed}"

    def _read(self, file: Path, stage: str, expected: Origin | None) -> Any:
        if not file.exists():
            raise InputError(
                f"{file.relative_to(self.path)} is not in {self.path}; run `workbench {stage}` into this folder first."
            )
        value = storage.read_json(file)
        if expected is not None and isinstance(value, dict):
            require_origin(file, value.get(KEY), expected)
        return {name: each for name, each in value.items() if name != KEY} if isinstance(value, dict) else value


def holds_nothing_but(folder: Path, *names: str) -> bool:
    """Whether a folder holds no file beside those of these names (and a lock, checksums, and what a kill leaves)."""
    return all(
        path.name.startswith(".") or (path.parent == folder and path.name in names)
        for path in folder.rglob("*")
        if not path.is_dir()
    )


def leave_free(folder: Path, name: str) -> None:
    """Take the description out of a folder that has no result, and the folder itself where nothing else is in it."""
    if folder.is_dir() and holds_nothing_but(folder, name):
        storage.discard(folder / name)


def _require_usable(folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise InputError(
            f"{folder} is a link to {folder.readlink()}, which does not exist; make that, or choose another --out."
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out.")
