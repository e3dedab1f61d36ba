"""What is distributed: the wheel, installed alone, works from an empty folder; the source distribution makes the same
wheel."""

import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

from workbench import __version__
from workbench.storage.assets import MODELS

ROOT = Path(__file__).parents[2]
MOST = 20e6
"""Bytes of the wheel."""
SHORT = {
    "training.steps": 2,
    "training.batch": 28,
    "data.reference_scenes": 4,
    "data.discovery_scenes": 2,
    "data.train_scenes": 4,
    "data.test_scenes": 2,
    "evaluation.random_circuits": 1,
    "evaluation.curve": "false",
    "evaluation.edges": 0,
    "conditions": "[base,circuit_ce_cka]",
}
pytestmark = pytest.mark.slow


def done(*words: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; it must succeed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, env={**clean, **environment})
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(distribution: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that holds the wheel, and sees this one's packages but for the workbench."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=True, symlinks=True)
    wheel = next(distribution.glob("*.whl"))
    done(place / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=place)
    site = Path(
        done(place / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip()
    )
    (site / "dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # a path alone: its .pth files stay out
    return place / "bin"


def test_the_wheel_holds_the_package_and_what_its_commands_read(distribution: Path) -> None:
    (wheel,) = distribution.glob("*.whl")
    assert wheel.stat().st_size < MOST
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "workbench").rglob("*.py")}
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "workbench/recipes").rglob("*.*")}
    static = {str(path.relative_to(ROOT)) for path in (ROOT / "workbench/explorer/static").iterdir()}
    assert sources | recipes | static | {"workbench/py.typed"} <= names
    assert {f"workbench/assets/models/{name}/model.safetensors" for name in MODELS} <= names
    assert "workbench/assets/results/study_entity/summary.json" in names
    assert "workbench/assets/results/study_entity/sibling/results.json" in names, "the last notebook reads it"
    assert "workbench/assets/data/ioi_20.jsonl" in names
    assert {name.split("/")[0] for name in names} == {
        "workbench",
        f"circuit_distillation_workbench-{__version__}.dist-info",
    }
    assert not [name for name in names if name.endswith((".png", ".pyc")) or "conditions" in name.split("/")]


def _members(source: Path) -> list[str]:
    with tarfile.open(source) as archive:
        return archive.getnames()


def test_the_source_distribution_holds_the_project(distribution: Path) -> None:
    (source,) = distribution.glob("*.tar.gz")
    assert source.stat().st_size < MOST
    names = {"/".join(name.split("/")[1:]) for name in _members(source)}
    assert {"pyproject.toml", "Makefile", "constraints.txt", "assets/models/teacher/model.safetensors"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/", "site/"))]


def test_the_long_description_and_the_metadata_are_in_order(distribution: Path) -> None:
    files = [str(path) for path in distribution.iterdir() if path.is_file()]
    done(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=distribution)


def test_the_installed_workbench_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    said = done(installed / "python", "-c", "import workbench; print(workbench.__file__)", cwd=tmp_path)
    assert str(installed.parent) in said
    assert str(ROOT) not in said
    assert done(installed / "workbench", "--version", cwd=tmp_path).split() == ["workbench", __version__]
    assert "study_entity" in done(installed / "workbench", "recipes", cwd=tmp_path)


def test_every_bundled_name_is_found_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom workbench.storage.assets import MODELS, located\n"
        "from workbench.experiment.recipe import bundled_recipes, read_recipe, read_yaml\n"
        "from workbench.study.config import read_study\nfrom workbench.study.diagnostic import BUNDLED, read_known\n"
        "assert all((Path(located(name)) / 'config.json').is_file() for name in MODELS)\n"
        "assert (Path(located('assets/models/teacher')) / 'config.json').is_file()\n"
        "assert Path(located(read_yaml('smollm2_ioi')['data']['pairs'])).is_file()\n"
        "for each in bundled_recipes():\n"
        "    if each.kind == 'run': read_recipe(each.name)\n"
        "    if each.kind == 'study':\n"
        "        for student in read_study(each.name).students.values():\n"
        "            made_first = student.source.startswith('runs/')  # by commands that stand in the recipe\n"
        "            assert made_first or (Path(located(student.source)) / 'config.json').is_file(), student\n"
        "assert all(read_known(folder).starts for folder in BUNDLED.values())\nprint('all there')"
    )
    assert "all there" in done(installed / "python", "-c", code, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    settings = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    cache = tmp_path / "cache"
    printed = done(installed / "workbench", "demo", *settings, cwd=tmp_path, WORKBENCH_CACHE=str(cache))
    assert "circuit / CE + CKA" in printed
    assert "%|" not in printed
    assert (tmp_path / "runs/demo/report.html").is_file()
    assert (tmp_path / "runs/demo/results.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "cache"}


def test_the_explorer_is_served_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "workbench"), "explore", "--prompts", "4"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(address, timeout=60) as page:
            assert "explorer" in page.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()
