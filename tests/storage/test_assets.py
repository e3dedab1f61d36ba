"""Bundled models and results are found from every folder, by a name that means the same everywhere."""

import json
import logging
import os
from pathlib import Path

import pytest

from workbench.experiment.recipe import read_recipe, read_yaml, written_recipe
from workbench.models.sources import local_directory
from workbench.storage import assets
from workbench.storage.assets import ASSETS, MODELS, located, short_name
from workbench.study.config import written_study

RESULTS = ASSETS / "results"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    assets._warn_of_namesake.cache_clear()
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_every_bundled_model_is_there_by_name_and_by_the_path_of_before(name: str, elsewhere: Path) -> None:
    folder = Path(located(name))
    assert (folder / "model.safetensors").is_file()
    assert Path(located(f"assets/models/{name}")) == folder == local_directory(name)
    assert short_name(f"assets/models/{name}") == name == short_name(name)


def test_a_name_is_the_bundled_model_and_a_path_is_the_users_own(
    elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = elsewhere / "teacher"
    own.mkdir()
    with caplog.at_level(logging.WARNING, "workbench"):
        assert Path(located("teacher")) == ASSETS / "models" / "teacher"
        located("teacher")
    assert [record.getMessage() for record in caplog.records] == [
        "teacher is the bundled model, not the folder of that name here; for that one give ./teacher"
    ]
    for given in ("./teacher", Path("teacher"), Path("./teacher"), str(own)):
        assert os.path.samefile(located(given), own), given
        assert os.path.samefile(local_directory(given), own), given


def test_under_assets_the_working_directory_comes_first(elsewhere: Path) -> None:
    assert Path(located("assets/results/study_entity")) == ASSETS / "results" / "study_entity"
    (elsewhere / "assets/results/study_entity").mkdir(parents=True)
    assert located("assets/results/study_entity") == "assets/results/study_entity"


@pytest.mark.parametrize("name", ["assets/models/nothing", "docs", "pyproject.toml", "owner/teacher", "/teacher"])
def test_nothing_else_is_looked_for_in_the_source_tree(name: str, elsewhere: Path) -> None:
    assert located(name) == name == short_name(name)


def test_recipes_name_the_bundled_models_and_their_files_are_there(elsewhere: Path) -> None:
    recipe = read_recipe("demo")
    assert (recipe.teacher, recipe.student) == ("teacher", "student")
    lineage = read_yaml("study_lineage")
    named = [lineage["overrides"]["teacher"], *(student["source"] for student in lineage["students"].values())]
    assert all((Path(located(name)) / "config.json").is_file() for name in named)
    assert Path(located(read_yaml("smollm2_ioi")["data"]["pairs"])).is_file()


@pytest.mark.parametrize("run", sorted(RESULTS.glob("*/run.json")), ids=lambda file: file.parent.name)
def test_runs_of_before_name_the_models_of_today(run: Path) -> None:
    """Their `run.json` has the bundled models' paths; resumed, it is the same recipe as one with the names."""
    value = json.loads(run.read_text())["recipe"]
    recipe = written_recipe(value)
    named = {role: value[role] for role in ("teacher", "student") if value[role] is not None}
    assert all(getattr(recipe, role) == short_name(name) for role, name in named.items())
    if str(named["teacher"]).startswith("assets/"):
        assert recipe.teacher in MODELS
        assert recipe == written_recipe({**value, "teacher": recipe.teacher, "student": recipe.student})


def test_a_study_of_before_names_the_models_of_today() -> None:
    study = read_yaml("study_entity")
    before = {**study, "students": {"sibling": {"source": "assets/models/student"}, "own": {"source": "mine/student"}}}
    assert [student.source for student in written_study(before).students.values()] == ["student", "mine/student"]
    assert before["students"]["sibling"]["source"] == "assets/models/student", "what was read stays as it is"
