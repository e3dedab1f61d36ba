"""The paper's run at its full size, with random weights: `python -m docs.full_size FOLDER` on an accelerator of 80 GB
or more writes assets/results/full_size.json.

Llama-3.1-8B and Llama-3.2-1B are made in FOLDER from the bundled configs (every size as in the original, weights drawn
at random in bfloat16, a byte-pair tokenizer of the task's own words in place of Llama's), then the recipe
`llama3_1b_entity` is run as it stands, but for fewer prompts and steps (`SMALL`). What each stage took stands beside
what `workbench plan` says of the same recipe. Random weights answer nothing right; time and memory don't know that.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from workbench import storage
from workbench.experiment.arms import run_condition
from workbench.experiment.discover import discover
from workbench.experiment.distill import distill
from workbench.experiment.match import match
from workbench.experiment.recipe import read_recipe
from workbench.experiment.run import Run
from workbench.experiment.runs import RunFolder
from workbench.models.sources import quiet
from workbench.plan.road import plan_of
from workbench.plan.shapes import CONFIGS
from workbench.storage.provenance import provenance
from workbench.tasks.vocabulary import mixture_words

RESULT = Path(__file__).parents[1] / "assets/results/full_size.json"
RECIPE = "llama3_1b_entity"
STEPS = 100
SMALL: dict[str, Any] = {
    "data.reference_scenes": 4,
    "data.discovery_scenes": 2,
    "data.train_scenes": 20,
    "data.validation_scenes": 2,
    "data.test_scenes": 4,
    "discovery.least_effect": 0.0,  # a circuit is found in noise
    "discovery.confidence": 0.01,
    "matching.resamples": 0,
    "training.steps": STEPS,
    "training.evaluate_every": STEPS,
    "training.checkpoint_every": STEPS,
    "evaluation.random_circuits": 1,
    "evaluation.curve": False,
}
CONDITIONS = ("circuit_ce", "circuit_ce_cka", "full_ce")
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ "
    "message['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def byte_pairs() -> PreTrainedTokenizerFast:
    """Byte-level byte pairs as in Llama 3; every word of the tasks is one token after a space, as the tasks ask."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator([f"{word} {word}. {word}, {word}" for word in mixture_words() for _ in range(3)], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1], padding_side="left"
    )
    made.chat_template = CHAT
    return made


def random_model(
    name: str, folder: Path, *, device: str, seed: int, dtype: torch.dtype = torch.bfloat16, **sizes: float
) -> Path:
    """The bundled config of a model (`meta-llama/Llama-3.2-1B`) with random weights, saved; made once."""
    if (folder / "config.json").exists():
        return folder
    stored = json.loads((CONFIGS / f"{name.split('/')[-1].lower()}.json").read_text())
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(**{**stored, **ids, **sizes})
    with torch.random.fork_rng(), quiet(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    byte_pairs().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def timed(measured: dict[str, float], name: str, work: Callable[[], Any], device: str) -> Any:
    """What some work returns; how many seconds it took goes into `measured`."""
    start = time.perf_counter()
    result = work()
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    measured[name] = time.perf_counter() - start
    logging.info("%s: %.1f s", name, measured[name])
    return result


def planned(overrides: dict[str, Any], folders: dict[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    """Operations and peak bytes by what is measured here, from the plan of the same recipe."""
    operations: dict[str, float] = {}
    memory: dict[str, float] = {}
    plan = plan_of(RECIPE, overrides=overrides, configs=folders, tokenizer=folders["meta-llama/Llama-3.1-8B"])
    for stage in plan.stages:
        words = stage.name.split(":")[0]
        name = words if words.startswith(("discover", "match")) else stage.name
        operations[name] = operations.get(name, 0.0) + stage.operations
        memory[name] = max(memory.get(name, 0.0), stage.memory)
    return operations, memory


def main(folder: Path, *, device: str = "cuda", sizes: dict[str, int] | None = None, result: Path = RESULT) -> None:
    """Make the models, run the stages, write what they took."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = read_recipe(RECIPE, overrides=SMALL)
    assert recipe.student is not None
    names = {"teacher": recipe.teacher, "student": recipe.student}
    measured: dict[str, float] = {}
    folders = {name: str(folder / role) for role, name in names.items()}
    for seed, (role, name) in enumerate(names.items()):
        make = partial(random_model, name, folder / role, device=device, seed=seed, **(sizes or {}))
        timed(measured, f"make {role}", make, device)
    own = {
        **SMALL,
        "device": device,
        "teacher": folders[names["teacher"]],
        "student": folders[names["student"]],
        "conditions": list(CONDITIONS),
    }
    run = Run(read_recipe(RECIPE, overrides=own), RunFolder(folder / "run"))
    run.begin(resume=True)
    timed(measured, "load teacher", lambda: run.teacher, device)
    timed(measured, "load student", lambda: run.student, device)
    timed(measured, "discover", lambda: discover(run), device)
    timed(measured, "match", lambda: match(run), device)
    for condition in CONDITIONS:
        timed(measured, f"train {condition}", partial(distill, run, condition, 0, resume=False), device)
        timed(measured, f"evaluate {condition}", partial(run_condition, run, condition, 0, resume=True), device)
    plain = {key: value for key, value in own.items() if key not in ("device", "teacher", "student")}
    operations, memory = planned(plain, folders)
    at_most = torch.accelerator.max_memory_allocated() if torch.device(device).type != "cpu" else None
    circuits = {side: len(run.circuit(side).heads) for side in ("teacher", "student")}
    storage.write_json(
        result,
        {
            "recipe": RECIPE,
            "overrides": plain,
            "prompts": {"discovery": len(run.prompts.discovery), "train": len(run.prompts.train)},
            "tokens": run.prompts.discovery.clean.shape[1],
            "circuits": circuits,
            "seconds": measured,
            "operations": operations,
            "planned_bytes": memory,
            "bytes": at_most,
            **provenance(),
        },
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m docs.full_size FOLDER")
    main(Path(sys.argv[1]))
