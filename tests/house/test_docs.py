"""The site: built strictly from what is there, a page for every public module that names its public members, and no
request leaves it."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import workbench
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
    index = (site / "reference" / "rooms.html").read_text()
    for name, path in public_modules().items():
        page = site / "reference" / f"{name.removeprefix('workbench.').replace('.', '/')}.html"
        assert page.exists(), f"{name} has no page"
        text = page.read_text()
        missing = {member for member in public_members(path) if f'id="{name}.{member}"' not in text}
        assert not missing, f"the page of {name} says nothing of {missing}"
        assert page.relative_to(site / "reference").as_posix() in index


@pytest.mark.slow
def test_every_public_name_is_on_a_page_by_its_name(site: Path) -> None:
    build = loaded("build")
    named = [name for group in build.groups().values() for name in group["names"]]
    assert sorted(named) == sorted(workbench.__all__), "docs/groups.yaml lists the public names, each once"
    front = (site / "reference/index.html").read_text()
    for title, group in build.groups().items():
        page = (site / build.group_page(title).replace(".md", ".html")).read_text()
        for name in group["names"]:
            assert f'id="{build.anchor(name)}"' in page
            assert f"#{build.anchor(name)}" in front


@pytest.mark.slow
def test_the_parts_of_the_site_are_there(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert all(f'href="{page}' in home for page in ("start.html", "guides/", "concepts/", "results/", "architecture"))
    architecture = (site / "architecture.html").read_text()
    assert all(f"<code>{room}</code>" in architecture for room in ROOMS), "the map comes from rooms.yaml"
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        pictures = re.findall(rf'src="({notebook.stem}/[^"]+)"', page)
        assert len(pictures) == notebook.read_text().count('"image/png":')
        assert all((site / "notebooks" / picture).exists() for picture in pictures)
        assert (site / "notebooks" / notebook.name).read_text() == notebook.read_text()


@pytest.mark.slow
def test_what_pages_show_and_link_to_is_there(site: Path) -> None:
    for page in (path for path in site.rglob("*.html") if path.name != "404.html" and "reference" not in path.parts):
        for link in re.findall(r'(?:src|href)="(?!https?:|data:|mailto:|#|javascript:)([^"#?]+)', page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(site)} leads to {link}"


@pytest.mark.parametrize(
    ("source", "path", "leads_to"),
    [
        ("docs/guides/patching.md", "../../benchmarks/results.json", "../benchmarks/results.json"),
        ("docs/results/mind.md", "../guides/patching.md#x", "../guides/patching.md#x"),
        ("docs/start.md", "../workbench/seeds.py", "reference/seeds.md"),
        ("docs/start.md", "../notebooks/02_find_a_circuit.ipynb", "notebooks/02_find_a_circuit.md"),
        ("docs/architecture.md", "../CONTRIBUTING.md", "contributing.md"),
    ],
)
def test_links_out_of_the_docs_lead_to_their_page_or_a_copy(source: str, path: str, leads_to: str) -> None:
    page = source.removeprefix("docs/")
    text = loaded("build").relinked(f"[a]({path})", source=source, page=page, linked=set())
    assert text == f"[a]({leads_to})"


@pytest.mark.slow
def test_no_page_asks_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 100
    assert not [page.name for page in pages if "unpkg.com" in page.read_text()], "the search's worker is our own"
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


ROOMS_OF_CODE = ("workbench", "tests", "docs", "benchmarks", "notebooks", "assets")
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _value(name: str) -> object | None:
    """What a dotted name stands for; None where nothing of that name is."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part, None)
        return value
    return None


def _stale(text: str) -> list[str]:
    """Names of code and of files in a text that are not there, or live elsewhere than a reference says."""
    linked = re.findall(r"\]\[(workbench[\w.]*)\]", text)
    named = [re.sub(r"^wb\b", "workbench", name) for name in re.findall(r"`((?:workbench|wb)(?:\.\w+)+)(?=[`(])", text)]
    groups = {"workbench.tasks", "workbench.discovery"}  # of entry points: names, no modules
    stale = [name for name in [*linked, *named] if name not in groups and _value(name) is None]
    for name in linked:
        home, value = name.rpartition(".")[0], _value(name)
        if hasattr(value, "__qualname__") and home != value.__module__:  # a class or function
            stale.append(f"{name} (it is {value.__module__}.{value.__qualname__})")
    files = {path.relative_to(ROOT).as_posix() for room in ROOMS_OF_CODE for path in (ROOT / room).rglob("*.py")}
    wanted = re.findall(r"`([\w/]+\.py)`", text)
    return stale + [name for name in wanted if not any(f"/{file}".endswith(f"/{name}") for file in files)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_text_names_of_the_code_is_there(path: Path) -> None:
    assert not _stale(path.read_text())


def test_stale_names_are_noticed() -> None:
    assert _stale("see `workbench.circuits.no_such`, `wb.no_such(`, `no_such_file.py`, [x][workbench.no_such.y]") == [
        "workbench.no_such.y",
        "workbench.circuits.no_such",
        "workbench.no_such",
        "no_such_file.py",
    ]
    assert _stale("[`DiscoveryConfig`][workbench.circuits.discovery.DiscoveryConfig]"), "it lives in config.py"
    assert not _stale("[`path_patch`][workbench.patching.path.path_patch], `wb.plots.heads`, `path.py`")
