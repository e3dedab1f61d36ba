"""Recipes and results that were written before are read as they were meant: settings nested, `boxes` an option."""

import json
from pathlib import Path

import pytest

from workbench.errors import InputError
from workbench.experiment.conditions import BASELINES, CONDITIONS, TABLE, TITLES
from workbench.experiment.recipe import RECIPES, parse_recipe, read_recipe, read_yaml, to_plain, written_recipe
from workbench.experiment.results import ConditionResult
from workbench.experiment.runs import RunFolder
from workbench.study.config import read_study
from workbench.study.grid import opened_study

RESULTS = Path(__file__).parents[2] / "assets" / "results"
RUNS = sorted(file.parent.name for file in RESULTS.glob("*/run.json"))


@pytest.mark.parametrize("name", RUNS)
def test_every_committed_run_opens(name: str) -> None:
    file = RESULTS / name / "run.json"
    before, recipe = json.loads(file.read_text())["recipe"], RunFolder(file.parent).described()["recipe"]
    assert parse_recipe(recipe) == written_recipe(before)
    if "boxes" in before["data"] and before["data"]["task"] == "entity_tracking":
        assert recipe["data"]["options"]["boxes"] == before["data"]["boxes"]
    flat = before["data"].get("prompts", before["data"])  # nested by now
    assert recipe["data"]["prompts"]["prepend_bos"] == flat["prepend_bos"]
    assert recipe["alignment"]["weight"] == before["alignment"]["weight"]
    assert recipe["training"]["steps"] == before["training"]["steps"]
    assert recipe["training"]["alignment"] is None


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/results.json")), ids=lambda file: file.parent.name)
def test_every_committed_row_opens(file: Path) -> None:
    rows = [ConditionResult.from_json(row) for row in json.loads(file.read_text())]
    assert rows
    assert all(row.condition in TITLES for row in rows)


def test_the_committed_study_opens() -> None:
    study = opened_study(RESULTS / "study_entity")
    assert study.config.students
    assert set(study.config.conditions) <= set(CONDITIONS)


@pytest.mark.parametrize("name", [file.stem for file in sorted(RECIPES.glob("runs/*.yaml"))])
def test_bundled_recipes_are_of_today(name: str) -> None:
    assert not {"boxes", "prepend_bos", "chat"} & set(read_yaml(name).get("data", {}))
    assert parse_recipe(to_plain(read_recipe(name))) == read_recipe(name)


@pytest.mark.parametrize("name", [file.stem for file in sorted(RECIPES.glob("studies/*.yaml"))])
def test_bundled_studies_open(name: str) -> None:
    assert read_study(name).students


def test_settings_of_before_are_those_of_today() -> None:
    flat = {"data.boxes": 5, "data.prepend_bos": True, "data.multi_token": True}
    nested = {"data.options.boxes": 5, "data.prompts.prepend_bos": True, "data.prompts.multi_token": True}
    assert read_recipe("demo", overrides=flat) == read_recipe("demo", overrides=nested)
    assert read_recipe("demo", overrides=flat).data.options == {"boxes": 5}
    unboxed = {"data.boxes": 5, "data.task": "ioi", "data.options": {}}
    assert read_recipe("demo", overrides=unboxed).data.options == {}
    file = {"teacher": "none", "data": {"boxes": 5, "options": {"boxes": 4}, "chat": "none", "prompts": {}}}
    assert parse_recipe(file).data.options == {"boxes": 4}, "as before"
    other = {"task": "entity_tracking", "scenes": 6}
    transfer = read_recipe("demo", overrides={"data.boxes": 5, "evaluation.transfer": [other]}).evaluation.transfer
    assert transfer[0].options == {"boxes": 5}, "other tasks took the recipe's boxes"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.weight": 3.0}, "set alignment.weight in its place"),
        ({"training.alignment": {"weight": 1}}, "set `alignment`"),
        ({"data.prompts.chatt": "user"}, "unknown recipe key 'data.prompts.chatt'.*'chat'"),
        ({"data.options.boxxes": 3}, "does not take these options"),
        ({"stages": [{"name": "A", "position": "last", "inta": "B"}]}, "inta"),
        ({"conditions": ["circuit_c"]}, "no condition 'circuit_c'.*'circuit_ce'"),
    ],
)
def test_what_has_no_meaning_is_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe("demo", overrides=overrides)


def test_a_run_of_before_whose_setting_had_no_effect_still_opens() -> None:
    plain = to_plain(read_recipe("demo"))
    plain["training"]["weight"] = 3.0
    assert written_recipe(plain) == read_recipe("demo")


def test_one_table_says_everything_of_a_condition() -> None:
    assert [condition.name for condition in TABLE] == list(CONDITIONS) == list(TITLES)[:-1]
    assert BASELINES == ("full_ce", "circuit_ce")
    assert all(name in CONDITIONS and name != each.name for each in TABLE for name in each.compared_with)
    assert read_recipe("demo", overrides={"conditions": list(CONDITIONS)}).conditions == tuple(CONDITIONS)
