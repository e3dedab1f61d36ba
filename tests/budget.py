"""How long the tests take: `python -m tests.budget FILE` reads the report that `make test` leaves (pytest's junit XML)
and writes the table between the marks in CONTRIBUTING.md.

Seconds are those of the clock in the process that ran a test, its fixtures included; on two cores the gate takes about
half their sum.

`python -m tests.budget FILE --slow` writes slow.txt from such a report too: the tests that took long, which count as
marked `slow` and which `make test-fast` leaves out. What stands there already stays, for a report of the fast tests
alone knows nothing of the others.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree

from workbench import storage
from workbench.errors import InputError

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- table: budget -->", "<!-- end -->"
SLOWEST = 10
SLOW = ROOT / "tests/slow.txt"
"""A test function a line (`tests/room/test_file.py::test_name`), with all its parameters."""
LONG = 0.3
"""Seconds from which a test is slow."""


def times(report: Path) -> dict[tuple[str, str], float]:
    """(file, test) -> seconds, of a junit report. Errors: `InputError` where there is none."""
    if not report.exists():
        raise InputError(f"there is no {report}; `make test` writes it.")
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        words = case.get("classname", "").split(".")
        seconds["/".join(words), case.get("name", "")] += float(case.get("time", 0))
    if not seconds:
        raise InputError(f"{report} holds no test; run `make test` again.")
    return dict(seconds)


def table(seconds: dict[tuple[str, str], float]) -> str:
    """Room by room, dearest first, then the slowest tests."""
    rooms: dict[str, list[float]] = defaultdict(list)
    for (file, _), value in seconds.items():
        rooms[file.split("/")[1] if file.count("/") > 1 else file].append(value)
    whole = sum(seconds.values())
    lines = ["| tests of | tests | seconds | share |", "| --- | --- | --- | --- |"]
    for room, values in sorted(rooms.items(), key=lambda each: -sum(each[1])):
        lines.append(f"| {room} | {len(values)} | {sum(values):.0f} | {sum(values) / whole:.0%} |")
    lines += [f"| all | {len(seconds)} | {whole:.0f} | |", "", "| the slowest | seconds |", "| --- | --- |"]
    for (file, test), value in sorted(seconds.items(), key=lambda each: -each[1])[:SLOWEST]:
        lines.append(f"| {file.removeprefix('tests/')}: `{test}` | {value:.0f} |")
    return "\n".join(lines)


def written(page: str, lines: str) -> str:
    """A page with the table between its marks. Errors: `InputError` where it has none."""
    if BEGIN not in page:
        raise InputError(f"the page has no {BEGIN}; put it and {END} where the table belongs.")
    return re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{lines}\n{END}", page, count=1, flags=re.DOTALL
    )


def slow_tests() -> frozenset[str]:
    """What slow.txt holds; nothing where it is not there."""
    return frozenset(SLOW.read_text().split()) if SLOW.exists() else frozenset()


def function_of(name: str) -> str:
    """A test's name without its parameters."""
    return name.partition("[")[0]


def slow_in(seconds: dict[tuple[str, str], float], known: Collection[str] = ()) -> list[str]:
    """The functions that took long with one of their parameters, and those known already whose file is still there."""
    found = {f"{_file(file)}::{function_of(test)}" for (file, test), value in seconds.items() if value >= LONG}
    return sorted(found | {line for line in known if (ROOT / line.partition("::")[0]).exists()})


def _file(words: str) -> str:
    """`tests/room/test_file.py`, with the test's class behind it where it has one, of how the report calls them."""
    place, _, last = words.rpartition("/")
    return f"{place}.py::{last}" if last[:1].isupper() else f"{words}.py"


def main(report: Path, page: Path = ROOT / "CONTRIBUTING.md") -> None:
    """Write the table."""
    storage.write_text(page, written(page.read_text(), table(times(report))))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--slow"]
    file = Path(words[0]) if words else ROOT / "runs/tests.xml"
    if "--slow" in sys.argv:
        storage.write_text(SLOW, "".join(f"{line}\n" for line in slow_in(times(file), slow_tests())))
    else:
        main(file)
