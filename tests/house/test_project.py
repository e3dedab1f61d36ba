"""What is said of the project in several places is said alike."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests import budget
from workbench import __version__

ROOT = Path(__file__).parents[2]
TOML = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT: dict[str, Any] = TOML.loads((ROOT / "pyproject.toml").read_text())["project"]
CLASSIFIED = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
"""The Pythons that the project says it runs on."""


def pins(name: str, python: str) -> dict[str, str]:
    """Package -> version that a file of pins gives a Python."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        environment = {"python_version": python, "python_full_version": f"{python}.9"}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in found, f"{requirement.name} is pinned twice for Python {python}"
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[requirement.name] = specifier.version
    return found


def test_the_citation_is_sound_and_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "references"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["references"][0]["url"] == PROJECT["urls"]["Paper"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_there_is_one_version() -> None:
    assert "version" in PROJECT["dynamic"]
    Version(__version__)
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_pythons_are_the_same_everywhere() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == CLASSIFIED
    resolved = re.search(r"^PYTHONS = (\(.*\))$", (ROOT / ".ci/resolve.py").read_text(), re.MULTILINE)
    assert resolved is not None
    assert re.findall(r'"(3\.\d+)\.\d+"', resolved[1]) == CLASSIFIED
    assert PROJECT["requires-python"] == f">={CLASSIFIED[0]}"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-tl3.txt"])
@pytest.mark.parametrize("python", CLASSIFIED)
def test_every_python_has_a_pin_for_what_is_installed(python: str, name: str) -> None:
    """By name; that they hold together is `make resolve`'s to say, which needs the indexes."""
    there = {package.lower().replace("_", "-") for package in pins(name, python)}
    extras = PROJECT["optional-dependencies"]
    asked = {"constraints.txt": ("dev",), "constraints-tl3.txt": ("adapters", "contract")}[name]
    wanted = [Requirement(line) for part in asked for line in extras[part]]
    for requirement in wanted:
        if requirement.name == PROJECT["name"]:
            wanted += [Requirement(line) for extra in requirement.extras for line in extras[extra]]
    names = {each.name for each in [*wanted, *map(Requirement, PROJECT["dependencies"])]} - {PROJECT["name"]}
    assert names <= there
    assert pins(name, python)["torch"] == "2.13.0"


def test_the_hook_before_a_commit_has_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pinned = pins("constraints.txt", CLASSIFIED[-1])["ruff"]
    assert [hook["additional_dependencies"] for hook in hooks] == [[f"ruff=={pinned}"]] * 2


def test_what_a_message_says_to_install_is_an_extra() -> None:
    named = {
        extra
        for path in (ROOT / "workbench").rglob("*.py")
        for extra in re.findall(r"circuit-distillation-workbench\[(\w+)\]", path.read_text())
    }
    assert {"completion", "explorer", "figures"} <= named <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_what_the_forge_reads_is_yaml(path: Path) -> None:
    value = yaml.safe_load(path.read_text())
    assert isinstance(value, dict)
    if path.parent.name == "ISSUE_TEMPLATE" and "body" in value:
        assert {"name", "description"} <= set(value)
        assert len({part["id"] for part in value["body"]}) == len(value["body"])


def test_every_test_that_was_measured_as_slow_is_there() -> None:
    """`python -m tests.budget FILE --slow` keeps what it knows, so a test that was renamed has to be taken out."""
    for line in budget.slow_tests():
        file, _, name = line.partition("::")
        text = (ROOT / file).read_text() if (ROOT / file).exists() else ""
        assert all(re.search(rf"^ *(?:def|class) {part}\b", text, re.MULTILINE) for part in name.split("::")), line
