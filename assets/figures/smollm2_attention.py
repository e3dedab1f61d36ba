"""Where the heads of SmolLM2-135M's committed IOI circuit look, on the recipe's own 100 discovery prompts -> the scores
beside the circuit, and the picture.

python assets/figures/smollm2_attention.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import sys
from pathlib import Path

from workbench import storage
from workbench.circuits.circuit import Circuit
from workbench.circuits.looks import attention_to_positions
from workbench.experiment import Run
from workbench.experiment.recipe import read_recipe
from workbench.experiment.runs import RunFolder
from workbench.plots.export import save_figure
from workbench.plots.looks import looks_figure

ASSETS = Path(__file__).parents[1]

if __name__ == "__main__":
    folder = ASSETS / "results/smollm2_ioi_circuit"
    circuit = Circuit.from_json(storage.read_json(folder / "teacher.json"))
    experiment = Run(read_recipe("smollm2_ioi_circuit", overrides={"teacher": sys.argv[1]}), RunFolder(folder))
    scores = attention_to_positions(experiment.teacher, experiment.prompts.discovery, circuit.members)
    scores.save(folder / "teacher-looks.safetensors")
    save_figure(
        looks_figure(scores, title="Where the heads of SmolLM2's indirect-object circuit look"),
        ASSETS / "smollm2_attention.png",
    )
