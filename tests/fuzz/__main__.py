"""`python -m tests.fuzz DOOR [--seed 0] [--count 200]`: figures; the exit code is 1 when a case was harmful."""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' shared modules

import torch

from . import DOORS, figures


def main() -> int:
    """Prints the counts and each harmful case; exits with 1 where there was one."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    doors = "; ".join(f"{name}: {what}" for name, what in DOORS.items())
    parser.add_argument("door", choices=sorted(DOORS), help=doors)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counted = figures(options.door, seed=options.seed, count=options.count, limit=60)
    print(counted.text())
    return int(bool(counted.harmful))


if __name__ == "__main__":
    sys.exit(main())
