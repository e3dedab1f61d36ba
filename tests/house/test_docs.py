"""The site: built strictly from what is there, a page for every public module that names its public members, and no
request leaves it."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house.test_house import ROOMS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "workbench"


def loaded(name: str) -> Any:
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def public_modules() -> dict[str, Path]:
    """Dotted name -> file, found without the site's own search; an empty `__init__` is none."""
    files = [
        path
        for path in PACKAGE.rglob("*.py")
        if path.read_text().strip() and not (path.stem.startswith("_") and path.stem != "__init__")
    ]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    return {name: path for name, path in names.items() if name != "workbench"}


def public_members(path: Path) -> set[str]:
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name for node in nodes if not node.name.startswith("_") and ast.get_docstring(node)}


def test_the_order_of_the_reference_is_that_of_the_house() -> None:
    order = {room: place for place, room in enumerate(ROOMS)}
    build = loaded("build")
    found = [room for room in build.rooms() if build.modules(room)]
    assert set(found) <= set(ROOMS)
    assert [order[room] for room in found] == sorted(order[room] for room in found)


@pytest.mark.slow
def test_every_public_module_is_in_the_docs_with_its_members(site: Path) -> None:
    index = (site / "reference" / "index.html").read_text()
    for name, path in public_modules().items():
        page = site / "reference" / f"{name.removeprefix('workbench.').replace('.', '/')}.html"
        assert page.exists(), f"{name} has no page"
        text = page.read_text()
        missing = {member for member in public_members(path) if f'id="{name}.{member}"' not in text}
        assert not missing, f"the page of {name} says nothing of {missing}"
        assert page.relative_to(site / "reference").as_posix() in index


@pytest.mark.slow
def test_home_is_the_readme_and_every_notebook_is_there_with_its_pictures(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert all(heading in home for heading in re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE))
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        pictures = re.findall(rf'src="({notebook.stem}/[^"]+)"', page)
        assert len(pictures) == notebook.read_text().count('"image/png":')
        assert all((site / "notebooks" / picture).exists() for picture in pictures)
        assert (site / "notebooks" / notebook.name).read_text() == notebook.read_text()


@pytest.mark.slow
def test_no_page_asks_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 100
    asked = [
        (page.name, found)
        for page in pages
        for found in re.findall(
            r"<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'> ]+)", page.read_text()
        )
    ]
    assert not asked
    assert not [
        found
        for sheet in site.rglob("*.css")
        for found in re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"' ]+", sheet.read_text())
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("X [*batch m p] and Y [*batch m q], symmetric", "X `[*batch m p]` and Y `[*batch m q]`, symmetric"),
        ("says: [layer][head].", "says: `[layer][head]`."),
        (
            "`[m p]` stays, [a link](page.md) and [`name`][there] too",
            "`[m p]` stays, [a link](page.md) and [`name`][there] too",
        ),
        ("    code [m]", "    code [m]"),
    ],
)
def test_shapes_are_code(text: str, expected: str) -> None:
    assert loaded("shapes").with_shapes(text) == expected
