"""Run folders: everything that a command found, under one directory, as JSON and safetensors.

    run/
      run.json                 recipe, seed, versions, commit, machine
      scores/<model>-<name>.safetensors
      circuits/<model>.json, <model>-evaluation.json    head_map.json    ckas.json
      conditions/<condition>-<seed>/log.jsonl, checkpoint.safetensors, result.json, student/
      results.json             one object per condition and seed
      report.html

A stage whose file is there has been done; files are written atomically, so a killed run resumes where it stopped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.matching import HeadMap
from workbench.storage.provenance import provenance
from workbench.values.scores import Scores


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

    def begin(self, described: Mapping[str, Any], *, resume: bool) -> None:
        """Write `run.json`, or with `resume` check that it is the same run.

        Errors: `InputError` when the folder holds a run and `resume` is off, or another run than the described one.
        """
        file = self.path / "run.json"
        if file.exists():
            if not resume:
                raise InputError(f"{self.path} already holds a run; resume it with --resume, or choose another --out.")
            if self.described()["recipe"] != described.get("recipe"):
                raise InputError(
                    f"{self.path} was begun with another recipe; resume with that recipe (it is in {file}), or choose "
                    "another --out."
                )
            return
        if resume and any(not path.name.startswith(".") for path in self.path.glob("*")):  # not what a kill leaves
            raise InputError(
                f"{self.path} has no run.json: it is no run folder, or a damaged one. Choose another --out, or delete "
                "it."
            )
        storage.write_json(file, {**described, **provenance()})

    def described(self) -> dict[str, Any]:
        """What `run.json` says. Errors: `InputError` when it is missing or damaged."""
        if not (self.path / "run.json").exists():
            raise InputError(
                f"{self.path} is not a run folder (no run.json); give the folder that `workbench demo` or `workbench "
                "discover` wrote."
            )
        found = storage.read_json(self.path / "run.json")
        recipe = storage.read_field(found, "recipe", what=f"the description of a run ({self.path / 'run.json'})")
        if not isinstance(recipe, Mapping):
            raise InputError(f"{self.path / 'run.json'} is damaged (its recipe is no object); begin the run anew.")
        return found

    def examined_file(self, model: str) -> Path:
        """A circuit's report and faithfulness curve on test prompts."""
        return self.path / "circuits" / f"{model}-evaluation.json"

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

    def circuit(self, model: str) -> Circuit:
        """A model's circuit. Errors: `InputError` when it has not been found yet."""
        return Circuit.from_json(self._read(self.circuit_file(model), "discover"))

    @property
    def head_map_file(self) -> Path:
        """Where the head map lies."""
        return self.path / "head_map.json"

    def head_map(self) -> HeadMap:
        """The matching. Errors: `InputError` when it has not been made yet."""
        found = HeadMap.from_json(self._read(self.head_map_file, "match"))
        for model, heads in (
            ("student", {match.student for match in found.matches}),
            ("teacher", set(found.teacher_heads)),
        ):
            if self.circuit_file(model).exists() and (strangers := heads - set(self.circuit(model).heads)):
                raise InputError(
                    f"{self.head_map_file} matches {', '.join(map(str, sorted(strangers)))}, not in the circuit of "
                    f"the {model} beside it: it was made from another circuit. Delete it and run `workbench match` "
                    "again."
                )
        return found

    def condition(self, name: str, seed: int) -> Path:
        """The folder of a condition and seed."""
        return self.trial_path / "conditions" / f"{name}-{seed}"

    def _read(self, file: Path, stage: str) -> Any:
        if not file.exists():
            raise InputError(
                f"{file.relative_to(self.path)} is not in {self.path}; run `workbench {stage}` into this folder first."
            )
        return storage.read_json(file)
