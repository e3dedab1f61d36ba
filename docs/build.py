"""The parts of the site that are kept elsewhere: README as home page, notebooks, and a reference page for each public
module (an mkdocs hook).

Everything is found by looking: rooms in the order of the README's map, modules and notebooks by glob.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PACKAGE, NOTEBOOKS = ROOT / "workbench", ROOT / "notebooks"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Texts of the repository that are pages of the site."""
LINK = re.compile(r"(?P<open>!?\[(?P<text>[^\]]*)\]\()(?!https?:|#)(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)")


def rooms() -> list[str]:
    """The rooms of the house, lowest first."""
    return list(yaml.safe_load((ROOT / "docs/rooms.yaml").read_text()))


def modules(room: str) -> list[str]:
    """The public modules of a room, dotted: its own text first, then its files; an `__init__` counts where it holds
    something."""
    folder, single = PACKAGE / room, PACKAGE / f"{room}.py"
    if single.exists():
        return [f"workbench.{room}"]
    own = {path.parent for path in folder.rglob("__init__.py") if path.read_text().strip()}
    files = {path.with_suffix("") for path in folder.rglob("*.py") if not path.stem.startswith("_")}
    return [".".join(path.relative_to(ROOT).parts) for path in sorted(own | files)]


def notebooks() -> list[Path]:
    """All notebooks, in the order of their numbers."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: home and method, notebooks, the reference room by room, changes."""
    reference = [
        {room: [{module.removeprefix("workbench."): page_of(module)} for module in modules(room)]}
        for room in rooms()
        if modules(room)
    ]
    flat = [next(iter(entry.values()))[0] if len(next(iter(entry.values()))) == 1 else entry for entry in reference]
    assert config.nav is not None
    config.nav += [
        {"Notebooks": [{title(path): f"notebooks/{path.stem}.md"} for path in notebooks()]},
        {"Reference": ["reference/index.md", *flat]},
        {"Project": [{"Changelog": "changelog.md"}, {"Contributing": "contributing.md"}]},
    ]
    return config


def page_of(module: str) -> str:
    """Where a module's reference is."""
    return f"reference/{module.removeprefix('workbench.').replace('.', '/')}.md"


def title(path: Path) -> str:
    """A notebook's first heading."""
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1].replace("`", "")  # pyright: ignore[reportOptionalSubscript]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every page that is made, and what they link to."""
    linked: set[str] = set()
    made: list[File] = []
    for source, page in PAGES.items():
        made.append(File.generated(config, page, content=_relinked((ROOT / source).read_text(), linked)))
    for path in notebooks():
        made += _notebook(path, config, linked)
    made += _reference(config)
    made += [File.generated(config, path, abs_src_path=str(ROOT / path)) for path in sorted(linked)]
    for file in made:
        if files.get_file_from_path(file.src_uri) is None:
            files.append(file)
    return files


def _relinked(text: str, linked: set[str], *, up: str = "") -> str:
    """Links to files of the repository lead to their page, or to a copy of the file (noted in `linked`); those to
    folders become plain text.

    `up` is the way from the text to the root of the repository (`../`); links that do not begin with it stay as they
    are.
    """

    def new(found: re.Match[str]) -> str:
        if not found["path"].startswith(up):
            return found[0]
        opening, path, anchor = found["open"] + up, found["path"].removeprefix(up), found["anchor"] or ""
        if path in PAGES:
            return f"{opening}{PAGES[path]}{anchor})"
        if path.endswith(".ipynb"):
            return f"{opening}{path.removesuffix('.ipynb')}.md{anchor})"
        if path.startswith("workbench/") and path.endswith(".py"):
            return f"{opening}{page_of('.'.join(Path(path).with_suffix('').parts))})"
        if (ROOT / path).is_file():
            copy = path.removeprefix("docs/") if path.startswith("docs/") else path
            linked.update({path} if copy == path else ())
            return f"{opening}{copy})"
        return f"{found['text']} (`{path}`)"

    return LINK.sub(new, text)


def _notebook(path: Path, config: MkDocsConfig, linked: set[str]) -> Iterator[File]:
    """A notebook as a page with its pictures, and the notebook itself to download."""
    text, resources = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_filename(str(path))
    pictures: dict[str, bytes] = resources.get("outputs", {})
    for name, content in pictures.items():
        text = text.replace(f"({name})", f"({path.stem}/{name})")
        yield File.generated(config, f"notebooks/{path.stem}/{name}", content=content)
    text = f"[Download this notebook]({path.name})\n\n{_relinked(text, linked, up='../')}"
    yield File.generated(config, f"notebooks/{path.stem}.md", content=text)
    yield File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path))


def _reference(config: MkDocsConfig) -> Iterator[File]:
    """An overview in the order of the map, and a page a module."""
    lines = [
        "# Reference",
        "",
        "The rooms of the house, lowest first: each imports only from those above it in this list.",
        "",
    ]
    for room in rooms():
        names = [
            f"[`{name.removeprefix('workbench.')}`]({page_of(name).removeprefix('reference/')})"
            for name in modules(room)
        ]
        lines += [f"- **{room}**: {' · '.join(names)}"] if names else []
    yield File.generated(config, "reference/index.md", content="\n".join(lines) + "\n")
    for room in rooms():
        for module in modules(room):
            yield File.generated(config, page_of(module), content=f"::: {module}\n")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Nothing is fetched from elsewhere: a picture from another host would be an error."""
    assert not re.search(r"!\[[^\]]*\]\(https?:", markdown), (
        "a page shows a picture of another host; keep it in assets/"
    )
    return markdown
