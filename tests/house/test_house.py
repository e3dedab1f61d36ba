"""The shape of the house: imports only point down, hook names have one home, nothing can execute what it loads."""

import ast
import re
from pathlib import Path

import pytest
import yaml

PACKAGE = Path(__file__).parents[2] / "workbench"
ROOMS = tuple(yaml.safe_load((Path(__file__).parents[2] / "docs/rooms.yaml").read_text()))
"""Lowest first: a file imports only from rooms above its own in this list, or from its own room."""
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "cli" if name == "__main__" else name  # `python -m workbench` is the command line


def imported_rooms(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "workbench":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("workbench.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    if room(path) == "__init__":
        return
    upward = {other for other in imported_rooms(path) if ROOMS.index(other) > ROOMS.index(room(path))}
    assert not upward, f"{path.name} in {room(path)} imports from above: {upward}"


def test_the_import_check_would_notice() -> None:
    assert {"distillation", "models"} <= imported_rooms(PACKAGE / "experiment" / "distill.py")
    assert ROOMS.index("models") < ROOMS.index("tasks") < ROOMS.index("experiment")


def test_every_room_stands() -> None:
    assert {room(path) for path in FILES} - {"__init__"} <= set(ROOMS)


@pytest.mark.parametrize(
    ("pattern", "homes"),
    [
        (r"""["'](f?blocks\.|hook_)""", {"hooks.py"}),
        (r"\bcuda\b", {"hooked_model.py"}),
        (r"\btqdm\(", {"bar.py"}),
        (r"import transformer_lens|from transformer_lens", {"transformer_lens.py"}),
        (
            r"torch\.load\(|import "
            r"pickle|pickle\.load|trust_remote_code=True|weights_only=False|\beval\(['\"]|\bexec\(",
            set(),
        ),
        (r"from __future__ import annotations", set()),
        (r"manual_seed_all|np\.random\.seed|random\.seed\(", set()),
    ],
    ids=[
        "hook names",
        "cuda",
        "progress bars",
        "TransformerLens",
        "code execution",
        "future annotations",
        "global seeding",
    ],
)
def test_one_home(pattern: str, homes: set[str]) -> None:
    users = {path.name for path in FILES if re.search(pattern, path.read_text())}
    assert users <= homes, f"{pattern} belongs in {homes or 'no file'}, found in {users - homes}"
