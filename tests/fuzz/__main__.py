"""`python -m tests.fuzz DOOR [--seed 0] [--count 200]`: figures; the exit code is 1 when a case was harmful."""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' shared modules

import torch

from . import DOORS, figures

torch.set_num_threads(1)
made = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
made.add_argument("door", choices=sorted(DOORS), help="; ".join(f"{name}: {what}" for name, what in DOORS.items()))
made.add_argument("--seed", type=int, default=0)
made.add_argument("--count", type=int, default=200)
options = made.parse_args()
found = figures(options.door, seed=options.seed, count=options.count, limit=60)
print(found.text())
sys.exit(bool(found.harmful))
