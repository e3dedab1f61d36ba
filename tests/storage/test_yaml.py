"""YAML and settings: every error is one line with file, line, key and remedy, and nothing is guessed."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from workbench.cli import main
from workbench.errors import InputError
from workbench.experiment.recipe import RECIPES, parse_recipe, read_recipe
from workbench.storage.yaml import read_yaml, yaml_value


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "r.yaml"
    file.write_bytes(text if isinstance(text, bytes) else f"teacher: x\n{text}\n".encode("utf-8", "surrogatepass"))
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0]\ntitle: a\nseeds: [1]", r"line 4: the key 'seeds' stands in line 2 already"),
        ("data:\n  seed: 1\n  seed: 2", r"line 4: the key 'seed' stands in line 3 already"),
        ("data: null", r"line 2: recipe key data: .*null stands there"),
        ("data:", r"line 2: recipe key data: .*leave the key out"),
        ("training: null", r"recipe key training: .*null"),
        ("seeds: null", r"recipe key seeds: .*null"),
        ("data: 3", r"line 2: recipe key data: .*object, not 3"),
        ("data: [1]", r"line 2: recipe key data"),
        ("training:\n  steps: true", r"line 3: recipe key training.steps: .*integer, not true"),
        ("training:\n  steps: '3'", r"line 3: recipe key training.steps: .*integer, not \"3\""),
        ("training:\n  steps: 3.0", r"line 3: recipe key training.steps: .*integer, not 3.0"),
        ("training:\n  steps: 1e3", r"line 3: recipe key training.steps: .*integer"),
        ("training:\n  stepz: 3", r"line 3: unknown recipe key 'training.stepz'; did you mean .*'steps'"),
        ("alignment: {weight: yes}", r"line 2: recipe key alignment.weight: .*number, not \"yes\""),
        ("alignment: {weight: .nan}", r"line 2: .nan is not a finite number"),
        ("alignment: {weight: -.inf}", r"line 2: -.inf is not a finite number"),
        ("alignment: {weight: 1e999}", r"line 2: 1e999 is not a finite number"),
        ("data: {seed: 99999999999999999999}", r"line 2: 9+ is beyond 64 bits"),
        (f"data: {{seed: {'9' * 6000}}}", r"line 2: 9+ is beyond 64 bits"),
        ("1: 2", r"line 2: the key 1 is no text; write it in quotes"),
        ("null: 2", r"line 2: the key None is no text"),
        ("? [a]\n: 2", r"line 2: the key \['a'\] is no text"),
        ("title: &t a\ndevice: *t", r"line 3: aliases"),
        ("<<: {title: a}", r"unknown recipe key '<<'"),
        ("title: !!binary aGk=", r"line 2: the tag !!binary is not read"),
        ("title: !!python/name:os.system", r"line 2: the tag .*python/name:os.system is not read"),
        ("stages: !!set {a}", r"line 2: the tag .*set is not read"),
        ("title: [1", r"line \d: not YAML"),
        ("title: a: b", r"line 2: not YAML"),
        ("title: a\n\ttitle: b", r"line \d: not YAML"),
        ("--- a\n--- b", r"line \d: not YAML"),
        ('title: "\\ud800"', r"line 2: .* holds half of a character"),
        ("title: a\x00b", r"not YAML"),
        ("title: 3", r"line 2: recipe key title: .*string, not 3"),
        ("stages:\n  - {name: A, position: last, into: Z, composition: q}", r"stage 'A' writes into 'Z'"),
        (
            "stages:\n  - {name: A, position: last}\n  - {name: B, position: last, into: C, composition: q}",
            r"stage 'B' writes into 'C', which is no stage before it",
        ),
        ("stages:\n  - {name: A, position: last}\n  - {name: A, position: last}", r"two stages 'A'"),
        ("stages:\n  - {name: A, positon: last}", r"line 3: unknown recipe key 'stages.0.positon'; did you mean"),
        ("data: {options: {boxes: 3.5}}", r"option 'boxes' of the task entity_tracking: it is 3.5, not a whole number"),
        ("data: {options: {boxes: [3]}}", r"option 'boxes'.* is \[3\]"),
        ("data: {options: {boxes: true}}", r"option 'boxes'.* is True"),
    ],
)
def test_each_fault_is_one_line_with_its_remedy(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(InputError, match=message) as error:
        read_recipe(file)
    assert str(error.value).splitlines()[0].startswith(str(file))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_only_utf_8_is_read(tmp_path: Path, encoding: str) -> None:
    text = "teacher: x\ntitle: café\n"
    with pytest.raises(InputError, match=r"line \d: byte 0x.. is not UTF-8; save the file as UTF-8"):
        read_recipe(written(tmp_path, text.encode(encoding)))
    for good in ("utf-8", "utf-8-sig"):
        assert read_recipe(written(tmp_path, text.encode(good))).title == "café"


def test_dates_and_sexagesimal_numbers_are_texts(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, "title: 2020-01-01")).title == "2020-01-01"
    assert yaml_value("12:30", where="x") == "12:30"
    assert yaml_value("010", where="x") == 10
    assert yaml_value("1e-3", where="x") == 0.001
    assert yaml_value("[1, 2.5, a, ~, true]", where="x") == [1, 2.5, "a", None, True]


def test_a_few_bytes_of_aliases_cost_nothing(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    start = time.monotonic()
    with pytest.raises(InputError, match=r"line 3: aliases .* are not read"):
        read_recipe(written(tmp_path, bomb))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("text", ["[" * 50_000, "a: " + "{a: " * 2000, "- " * 3000])
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"nested deeper than 40|not YAML"):
        read_yaml(written(tmp_path, text.encode()))


@pytest.mark.parametrize("name", ["absent.yaml", "a\x00b", "x" * 5000, ""])
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        read_recipe(name)
    with pytest.raises(InputError, match=r"can't be read"):
        read_recipe(tmp_path)


SETTINGS = [
    ("title.a=1", r"recipe key title.a: title is the plain value 'a', with nothing below it"),
    ("training.steps.x=1", r"training.steps is the plain value 3"),
    ("data..seed=1", r"the key 'data..seed' has an empty part"),
    ("=1", r"empty part"),
    (".=1", r"empty part"),
    ("seeds.0=1", r"seeds is the plain value"),
    ("training.steps=[1", r"--set training.steps, line 1: not YAML"),
    ("training.steps=.nan", r"--set training.steps, line 1: .nan is not a finite number"),
    ("training.steps=", r"recipe key training.steps: .*null stands there"),
    ("training.steps=true", r"recipe key training.steps: .*integer, not true"),
    ("trainning.steps=3", r"unknown recipe key 'trainning'; did you mean 'training'"),
    ("data=3", r"recipe key data"),
]


@pytest.mark.parametrize(("setting", "message"), SETTINGS)
def test_settings_of_the_command_line(
    tmp_path: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "title: a\ntraining: {steps: 3}\nseeds: [0]")
    assert main(["plan", str(file), "--set", setting]) == 2

    assert re.search(message, capsys.readouterr().err)


def test_a_setting_forgets_the_line_of_what_it_replaces(tmp_path: Path) -> None:
    file = written(tmp_path, "training:\n  steps: 3\n  batch: 5")
    assert read_recipe(file, overrides={"training.steps": 7}).training.steps == 7
    assert read_recipe(file, overrides={"training": {"steps": 9}}).training.batch != 5
    with pytest.raises(InputError, match=r"line 2: recipe key training.steps"):
        read_recipe(file, overrides={"training.steps": True})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**64, {1: 2}, object(), "\ud800", b"x", {"a": {2: 3}}])
def test_values_of_python_that_json_cannot_say(value: Any) -> None:
    with pytest.raises(InputError, match=r"recipe key data.options.x"):
        parse_recipe({"teacher": "x", "data": {"options": {"x": value}}})


def test_every_bundled_recipe_has_no_alias_and_no_repeated_key() -> None:
    for file in RECIPES.glob("*/*.yaml"):
        if file.parent.name != "accelerate":
            assert read_yaml(file)
