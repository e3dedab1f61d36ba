"""`python -m tests.fuzz DOOR --seed 0 --count 500`: what a door of the workbench does with input that nobody meant.

Good input is accepted and bad input is refused with an `InputError` that names the remedy; everything else is a raw
traceback, and each kind of it is printed. The same seed gives the same cases.
"""

import argparse
import importlib
import sys
from collections import Counter

from tests.fuzz.case import outcome_of

DOORS = {
    "rows": "a user's own pairs: JSONL, CSV, Parquet, datasets",
    "recipes": "YAML and --set",
    "runfiles": "files of a run, and whole run folders",
}
"""Modules of this package with a function `cases(seed, count)`; a new door is declared here."""


def main() -> int:
    """Prints the three counts; exits with 1 where there was a raw traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("door", choices=sorted(DOORS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--verbose", action="store_true", help="print every case with its answer")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    raw: dict[str, list[str]] = {}
    for case in importlib.import_module(f"tests.fuzz.{options.door}").cases(options.seed, options.count):
        outcome, said = outcome_of(case)
        counts[outcome] += 1
        if options.verbose:
            print(f"{outcome:9}{case.name[:100]!r}  {said[:300]!r}")
        if outcome == "raw":
            raw.setdefault(said.split("\n")[0][:60], []).append(case.name)
    for said, names in sorted(raw.items(), key=lambda each: -len(each[1])):
        print(f"{len(names):5}  {said!r}  e.g. {names[0][:100]!r}")
    print(
        f"{options.door}, seed {options.seed}: {counts['accepted']} accepted, {counts['refused']} refused by "
        f"InputError, {counts['raw']} raw tracebacks of {counts.total()}"
    )
    return int(bool(raw))


if __name__ == "__main__":
    sys.exit(main())
