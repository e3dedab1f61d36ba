"""The road, stage by stage: discover in teacher and student, match, distil under a condition, evaluate. Each stage
writes into a run folder and is skipped when its files are there.

`Experiment` is the whole road; each class below it can do the stages up to its own: `Setting` -> `Finding` ->
`Matching` -> `Experiment`.
"""

from workbench.experiment.conditions import CONDITIONS, ConditionSpec
from workbench.experiment.matching import mean_cka_and_floor
from workbench.experiment.prompts import Prompts
from workbench.experiment.training import Experiment
from workbench.storage import located

__all__ = ["CONDITIONS", "ConditionSpec", "Experiment", "Prompts", "located", "mean_cka_and_floor"]
