"""A recipe from its first stage to its table, in one call."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.experiment import arms
from workbench.experiment.recipe import Recipe, read_recipe
from workbench.experiment.results import ConditionResult, table
from workbench.experiment.run import Run
from workbench.experiment.runs import RunFolder
from workbench.values.tables import accuracy_text, html_table, number


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeResults:
    """The results table of a recipe, and the folder that holds all that it is made of."""

    rows: tuple[ConditionResult, ...]
    folder: Path

    def __getitem__(self, condition: str) -> ConditionResult:
        """The first row of a condition. Errors: `InputError` with the conditions that there are."""
        for row in self.rows:
            if row.condition == condition:
                return row
        raise InputError(
            f"there is no condition {condition!r} here, only {', '.join(row.condition for row in self.rows)}."
        )

    def __repr__(self) -> str:
        return table(self.rows)

    def _repr_html_(self) -> str:
        head = ("condition", "seed", "full accuracy", "circuit accuracy", "random", "faithful", "CKA", "floor")
        rows = [
            (
                row.condition,
                str(row.seed),
                accuracy_text(row.full_accuracy, row.full_interval),
                accuracy_text(row.circuit_accuracy, row.circuit_interval),
                number(row.random_circuit_accuracy),
                number(row.faithfulness, 2),
                number(row.mean_cka, 2),
                number(row.cka_floor, 2),
            )
            for row in self.rows
        ]
        return html_table(head, rows, title=str(self.folder))


def run_recipe(
    recipe: str | Path | Recipe, out: str | Path, *, resume: bool = False, workers: int | None = None, **overrides: Any
) -> RecipeResults:
    """Discover, match, train and evaluate all that a recipe names, in the run folder `out`.

    `recipe`: a YAML file, the name of a bundled one (`demo`), or a `Recipe`. `overrides`: keys of the recipe, nested
    ones with two underscores, e.g. `training__steps=20`. `resume`: go on in a folder that holds a run. `workers`:
    processes that the trainings are spread over, one thread each (a script that asks for them guards its own lines with
    `if __name__ == "__main__":`); None: one after another in this process. Errors: `InputError` naming an unknown key's
    nearest.
    """
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    if isinstance(recipe, Recipe):
        if dotted:
            raise InputError("overrides belong to a recipe that is read; change this one with `dataclasses.replace`.")
    else:
        recipe = read_recipe(recipe, overrides=dotted)
    run = Run(recipe, RunFolder(Path(out)))
    run.begin(resume=resume)
    return RecipeResults(rows=tuple(arms.run_recipe(run, resume=resume, workers=workers)), folder=Path(out))
