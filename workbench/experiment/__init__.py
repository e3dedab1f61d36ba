"""The road, stage by stage: discover in teacher and student, match, distil under a condition, evaluate.

A `Run` is a recipe at work in a run folder; each stage is a function on it, in a file of its name (`discover.py`,
`match.py`, `distill.py`, `evaluate.py`), writes into the folder and is skipped when its files are there. `arms.py`
walks all of them.
"""

from workbench.experiment.conditions import CONDITIONS, Condition
from workbench.experiment.prompts import Prompts
from workbench.experiment.run import Run
from workbench.storage import located

__all__ = ["CONDITIONS", "Condition", "Prompts", "Run", "located"]
