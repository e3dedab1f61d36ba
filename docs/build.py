"""The parts of the site that are kept elsewhere or made: notebooks, texts of the repository, links out of docs/, and
the reference (an mkdocs hook).

The reference has a page for each group of public names (`groups.yaml`), and one for each public module, room by room
(`rooms.yaml`); modules and notebooks are found by looking. Pages of internals weigh little in the search.
"""

import importlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PACKAGE, NOTEBOOKS = ROOT / "workbench", ROOT / "notebooks"
TEXTS = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Texts of the repository that are pages of the site."""
LINK = re.compile(
    r"(?P<open>!?\[(?P<text>[^\]]*)\](?:\(|: ))(?!\w+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?P<end>\)?)"
)
PUBLIC, INTERNAL, NOTEBOOK = 4, 0.01, 0.6
"""Weights in the search: a public name before a page, a page before a notebook, internals last."""


def rooms() -> dict[str, str]:
    """The rooms of the house, lowest first, each with what it holds."""
    return yaml.safe_load((ROOT / "docs/rooms.yaml").read_text())


def groups() -> dict[str, dict[str, Any]]:
    """The groups of public names: title -> `about` and `names`."""
    return yaml.safe_load((ROOT / "docs/groups.yaml").read_text())


def modules(room: str) -> list[str]:
    """The public modules of a room, dotted: its own text first, then its files; an `__init__` counts where it holds
    something."""
    folder, single = PACKAGE / room, PACKAGE / f"{room}.py"
    if single.exists():
        return [f"workbench.{room}"]
    own = {path.parent for path in folder.rglob("__init__.py") if path.read_text().strip()}
    files = {path.with_suffix("") for path in folder.rglob("*.py") if not path.stem.startswith("_")}
    return [".".join(path.relative_to(ROOT).parts) for path in sorted(own | files)]


BADGE = re.compile(r"\A\s*\[!\[Open in Colab\].*\n")


def notebooks() -> list[Path]:
    """All notebooks, in the order of their numbers."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: what mkdocs.yml lists, notebooks, the reference, the project's texts."""
    by_name = [{title: group_page(title)} for title in groups()]
    by_room = [{room: [{short(module): page_of(module)} for module in modules(room)]} for room in rooms()]
    by_room = [entry for entry in by_room if next(iter(entry.values()))]
    assert config.nav is not None
    config.nav += [
        {"Notebooks": [{heading(path): f"notebooks/{path.stem}.md"} for path in notebooks()]},
        {"Reference": ["reference/index.md", *by_name, {"Rooms and modules": ["reference/rooms.md", *by_room]}]},
        {"Project": [{"Changelog": "changelog.md"}, {"Contributing": "contributing.md"}]},
    ]
    return config


def short(module: str) -> str:
    """A module's name inside the package."""
    return module.removeprefix("workbench.")


def page_of(module: str) -> str:
    """Where a module's reference is."""
    return f"reference/{short(module).replace('.', '/')}.md"


def group_page(title: str) -> str:
    """Where a group of public names is."""
    return f"reference/by-name/{title.lower().replace(' ', '-').replace(',', '')}.md"


def heading(path: Path) -> str:
    """A notebook's first heading."""
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1].replace("`", "")  # pyright: ignore[reportOptionalSubscript]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every page that is made, and what the pages link to."""
    linked: set[str] = set()
    made: list[File] = []
    for file in files.documentation_pages():
        text = (ROOT / "docs" / file.src_uri).read_text()
        relinked(text, source=f"docs/{file.src_uri}", page=file.src_uri, linked=linked)
    for source, page in TEXTS.items():
        text = relinked((ROOT / source).read_text(), source=source, page=page, linked=linked)
        made.append(File.generated(config, page, content=weighing(text, NOTEBOOK)))
    for path in notebooks():
        made += _notebook(path, config, linked)
    made += _reference(config)
    made += [File.generated(config, path, abs_src_path=str(ROOT / path)) for path in sorted(linked)]
    for file in made:
        if files.get_file_from_path(file.src_uri) is None:
            files.append(file)
    return files


def weighing(text: str, weight: float) -> str:
    """A page whose words count so much in the search."""
    return f"---\nsearch:\n  boost: {weight}\n---\n\n{text}"


def relinked(text: str, *, source: str, page: str, linked: set[str]) -> str:
    """A text of the repository as a page of the site: links to files lead to their page, or to a copy of the file
    (noted in `linked`); those to folders become plain text.

    `source` is the text's path in the repository, `page` its path in the site.
    """

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["path"]))
        place = _place(path, linked)
        if place is None:
            return found[0] if not (ROOT / path).is_dir() else f"{found['text']} (`{path}`)"
        way = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{found['open']}{way}{found['anchor'] or ''}{found['end']}"

    return LINK.sub(link, text)


def _place(path: str, linked: set[str]) -> str | None:
    """Where a file of the repository stands in the site; None for what does not stand there."""
    if path in TEXTS:
        return TEXTS[path]
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/") and path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    if path.startswith("workbench/") and path.endswith(".py"):
        return page_of(".".join(Path(path).with_suffix("").parts))
    if (ROOT / path).is_file():
        linked.add(path)
        return path
    return None


def _notebook(path: Path, config: MkDocsConfig, linked: set[str]) -> Iterator[File]:
    """A notebook as a page with its pictures, and the notebook itself to download."""
    text, resources = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_filename(str(path))
    page = f"notebooks/{path.stem}.md"
    text = BADGE.sub("", text, count=1)  # a picture of another host
    text = relinked(text, source=f"notebooks/{path.name}", page=page, linked=linked)
    pictures: dict[str, bytes] = resources.get("outputs", {})
    for name, content in pictures.items():
        text = text.replace(f"({name})", f"({path.stem}/{name})")
        yield File.generated(config, f"notebooks/{path.stem}/{name}", content=content)
    text = f"[Download this notebook]({path.name})\n\n{text}"
    yield File.generated(config, page, content=weighing(text, NOTEBOOK))
    yield File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path))


def _reference(config: MkDocsConfig) -> Iterator[File]:
    """The public names by group, then an overview of the rooms and a page a module."""
    yield File.generated(config, "reference/index.md", content=weighing(by_name(groups()), 2))
    for title, group in groups().items():
        yield File.generated(config, group_page(title), content=weighing(group_text(title, group), PUBLIC))
    lines = [
        "# Rooms and modules",
        "",
        "The rooms of the house, lowest first: each imports only from those above it in this list. What you need to "
        "use",
        "the workbench has [public names](index.md); this is what stands behind them.",
        "",
    ]
    for room, about in rooms().items():
        names = [f"[`{short(name)}`]({page_of(name).removeprefix('reference/')})" for name in modules(room)]
        lines += [f"- **{room}**, {about}: {' · '.join(names)}"] if names else []
    yield File.generated(config, "reference/rooms.md", content=weighing("\n".join(lines) + "\n", INTERNAL))
    for room in rooms():
        for module in modules(room):
            yield File.generated(config, page_of(module), content=weighing(f"::: {module}\n", INTERNAL))


def map_of_the_house() -> str:
    """The table of the rooms."""
    rows = [f"| `{room}` | {about} |" for room, about in rooms().items()]
    return "\n".join(["| room | what it holds |", "| --- | --- |", *rows])


def by_name(named: Mapping[str, Mapping[str, Any]]) -> str:
    """The front page of the reference."""
    lines = [
        "# Reference",
        "",
        "`import workbench as wb`: every public name, by what it is for. [Rooms and modules](rooms.md) lists the",
        "modules behind them.",
        "",
    ]
    for title, group in named.items():
        page = group_page(title).removeprefix("reference/")
        names = " · ".join(f"[`wb.{name}`]({page}#{anchor(name)})" for name in group["names"])
        lines += [f"- **[{title}]({page})**: {group['about']}  ", f"  {names}"]
    return "\n".join(lines) + "\n"


def anchor(name: str) -> str:
    """Where a public name stands on its page."""
    return f"wb-{name.lower()}"


def group_text(title: str, group: Mapping[str, Any]) -> str:
    """A page of public names, each under the name by which it is used."""
    parts = [f"# {title}", "", group["about"], ""]
    for name in group["names"]:
        parts += [f"## `wb.{name}` {{ #{anchor(name)} }}", "", *_public(name), ""]
    return "\n".join(parts)


def _public(name: str) -> list[str]:
    value = getattr(importlib.import_module("workbench"), name)
    if not hasattr(value, "__qualname__"):  # a room, such as `wb.plots`
        return [f"The functions of [`{value.__name__}`]({_up(page_of(value.__name__))}).", ""]
    settings = [
        "    options:",
        "      heading_level: 3",
        "      show_root_heading: false",
        "      show_root_toc_entry: false",
    ]
    home = f"In [`{value.__module__}`]({_up(page_of(value.__module__))})."
    return [f"::: {value.__module__}.{value.__qualname__}", *settings, "      show_source: false", "", home]


def _up(page: str) -> str:
    return page.replace("reference/", "../", 1)


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Links of the pages of docs/ to the rest of the repository; and nothing is fetched from elsewhere: a picture from
    another host would be an error."""
    assert not re.search(r"!\[[^\]]*\]\(https?:", markdown), (
        "a page shows a picture of another host; keep it in assets/"
    )
    if page.file.generated_by is not None:
        return markdown
    markdown = markdown.replace("<!-- rooms -->\n", f"<!-- rooms -->\n\n{map_of_the_house()}\n")
    return relinked(markdown, source=f"docs/{page.file.src_uri}", page=page.file.src_uri, linked=set())
