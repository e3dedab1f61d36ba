"""Fine-tuning a language model on a task, or on rows of text: cross-entropy on the answers alone, on scenes of the
training split, new ones in each step. Any architecture that the workbench loads.

The pairs of a scene ask about one text. They go through the model as one tree: their common beginning once, then what
is each pair's own as a branch that sees the beginning and itself, at the positions it has in its own prompt. The loss
is exactly that of the separate prompts, for a third of their tokens with three questions a scene, and the vocabulary is
only multiplied where an answer is read.

A model whose attention does not follow the positions and masks that it is given (ALiBi) takes its prompts one by one,
which a comparison of the two says before it trains.

Every batch, learning rate and dropout is a function of (seed, step) alone, so an interrupted training resumes to the
same bits. That is why the loop is our own: the trainers of `transformers` and TRL save the state of global generators
and of a sampler's epoch, and neither knows trees. Their schedules are used; for their other features give them the
model and the rows (`CircuitAlignment` in `workbench.distillation.trainers`).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import get_scheduler

from workbench import seeds, storage
from workbench.errors import InputError
from workbench.models import sources
from workbench.models.devices import require_device
from workbench.models.export import save_plain
from workbench.patching.progress import progress_bar
from workbench.pretraining.config import FinetuningConfig
from workbench.pretraining.models import with_layers
from workbench.pretraining.rows import rows_of
from workbench.storage import checkpoint
from workbench.storage.provenance import provenance
from workbench.tasks.base import Split, Task
from workbench.tasks.registry import task_named
from workbench.tasks.trees import PADDING, Trees, trees_of

Log = list[dict[str, float | int]]


class Finetuning:
    """A model in training on a task, resumable to the bit."""

    def __init__(self, config: FinetuningConfig) -> None:
        require_device(config.device)
        source = sources.open_source(config.model, dtype=getattr(torch, config.dtype))
        self.config, self.tokenizer = config, source.tokenizer
        self.model = source.model if config.keep_layers is None else _shallower(source.model, config.keep_layers)
        self.model = self.model.to(config.device)
        self.task: Task | None = task_named(config.task, config.options) if config.rows is None else None
        self.rows = None if config.rows is None else rows_of(config, self.tokenizer)
        self.leaves = _trained(self.model, config.trains)
        self.optimizer = torch.optim.AdamW(
            self.leaves.values(), lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)
        )
        self.log: Log = []
        self.share = share_of_rate(config.schedule, self.optimizer, warmup=config.warmup, steps=config.steps)
        self.identity = _identity(config, self.model)
        self.takes_trees = self.rows is None and self._takes_trees()

    def scenes(self, split: Split, count: int, *labels: str | int) -> Trees:
        """Scenes of a split as trees; which ones is a function of the seed and the labels."""
        drawn = self._drawn(split, count, *labels)
        each = len(drawn) // count if self.takes_trees else 1
        return trees_of(drawn, self.tokenizer, each=each).to(self.config.device)

    def _drawn(self, split: Split, count: int, *labels: str | int) -> list[Any]:
        if self.task is not None:
            seed = seeds.derive(self.config.seed, *labels)
            return list(self.task.pairs(self.tokenizer, split=split, scenes=count, seed=seed))
        assert self.rows is not None
        rows = self.rows[split]
        return seeds.chooser(self.config.seed, split, *labels).sample(rows, min(count, len(rows)))

    @torch.no_grad()
    def _takes_trees(self) -> bool:
        """Whether the model computes a tree as it computes its prompts one by one."""
        pairs = self._drawn("train", 1, "tree")
        whole, alone = (trees_of(pairs, self.tokenizer, each=each).to(self.config.device) for each in (len(pairs), 1))
        expected = self._alone(alone)
        try:
            logits = self._in_trees(whole)
        except (TypeError, ValueError, RuntimeError, IndexError):  # it takes no such mask
            return False
        rounding = 1e3 * max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)
        return bool((logits - expected).abs().max() <= max(rounding, 1e-3) * max(1.0, float(expected.abs().max())))

    def logits(self, trees: Trees) -> Float[Tensor, "answers d_vocab"]:
        """Logits at the tokens that predict the answers'."""
        return self._in_trees(trees) if self.takes_trees else self._alone(trees)

    def _alone(self, trees: Trees) -> Float[Tensor, "answers d_vocab"]:
        """The same of trees of one prompt each, which are padded on the right."""
        real = trees.branch != PADDING
        kind = torch.device(self.config.device).type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.model(trees.tokens, attention_mask=real.long(), use_cache=False)
        return output.logits[trees.rows, trees.places].to(self.model.dtype)

    def _in_trees(self, trees: Trees) -> Float[Tensor, "answers d_vocab"]:
        read_at, place = trees.places.unique(return_inverse=True)
        kind = torch.device(self.config.device).type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.model(
                trees.tokens,
                attention_mask=trees.mask(self.model.dtype),
                position_ids=trees.positions,
                logits_to_keep=read_at,
                use_cache=False,
            )
        return output.logits[trees.rows, place].to(self.model.dtype)  # autocast gives bfloat16

    def advance(self) -> None:
        """One optimizer step on the scenes of this step, and the accuracy where it is due."""
        step, config = len(self.log), self.config
        rate = config.learning_rate * self.share(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        trees = self.scenes("train", config.scenes, "scenes", step)
        self.model.train()
        with seeds.local(config.seed, "dropout", step, device=config.device):
            logits = self.logits(trees)
        self.model.eval()
        loss = nn.functional.cross_entropy(logits, trees.targets)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.leaves.values(), config.clip)
        if not bool(norm.isfinite()):
            raise InputError(
                f"the gradient is {norm.item()} at step {step}: lower `learning_rate`; the last checkpoint is kept."
            )
        self.optimizer.step()
        if not all(bool(leaf.detach().isfinite().all()) for leaf in self.leaves.values()):
            raise InputError(
                f"the weights are not finite after step {step}: lower `learning_rate`; the last checkpoint is kept."
            )
        right = trees.right(logits).float().mean().item()
        self.log.append(
            {"step": step, "loss": loss.item(), "accuracy": right, "gradient_norm": norm.item(), "learning_rate": rate}
        )
        if (step + 1) % config.evaluate_every == 0:
            self.log[-1]["held_out_accuracy"] = self.accuracy("calibration")

    @torch.no_grad()
    def accuracy(self, split: Split) -> float:
        """Share of the pairs of held-out scenes whose whole answer has the highest logits, token by token."""
        trees = self.scenes(split, self.config.evaluation_scenes, "held out")
        return float(torch.cat([part.right(self.logits(part)) for part in trees.batches(16)]).float().mean())

    @property
    def finished(self) -> bool:
        """All steps, or good enough."""
        reached = self.log[-1].get("held_out_accuracy", 0.0) if self.log else 0.0
        return len(self.log) >= self.config.steps or (
            self.config.stop_at is not None and reached >= self.config.stop_at
        )

    def save(self, folder: Path) -> None:
        """Write an exact checkpoint, after the log that goes with it. Errors: `InputError` when the model's logits are
        not finite any more."""
        with torch.no_grad():
            logits = self.logits(self.scenes("train", 1, "scenes", len(self.log) - 1))
        if not bool(logits.isfinite().all()):
            raise InputError(
                f"the logits are not finite after step {len(self.log) - 1}: lower `learning_rate`; the last checkpoint "
                "is kept."
            )
        storage.write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))
        checkpoint.save(
            folder / "checkpoint.safetensors",
            step=len(self.log),
            leaves=self.leaves,
            optimizer=self.optimizer,
            identity=self.identity,
        )

    def resume(self, folder: Path) -> None:
        """Go on from the last checkpoint, if there is one. Errors: `InputError` for one of another configuration."""
        file = folder / "checkpoint.safetensors"
        if not file.exists():
            return
        step, values = checkpoint.load(file, leaves=self.leaves, optimizer=self.optimizer, identity=self.identity)
        self.log = _read_log(folder / "log.jsonl", step)
        with torch.no_grad():
            for key, leaf in self.leaves.items():
                leaf.copy_(values[key])

    def export(self, target: Path) -> None:
        """Write a Hugging Face directory with `training.json` (what made it, and its test accuracy) and
        `training_log.jsonl`."""
        origin = {
            "finetuning": self.config.described(),
            "steps": len(self.log),
            "test_accuracy": self.accuracy("test"),
            **provenance(),
        }

        def fill(temporary: Path) -> None:
            save_plain(self.model, self.tokenizer, temporary)
            storage.write_json(temporary / "training.json", origin)
            storage.write_text(temporary / "training_log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))

        storage.replace_directory(target, fill)


def _read_log(file: Path, steps: int) -> Log:
    """The log up to a checkpoint. Errors: `InputError` when it is missing, damaged or shorter than that."""
    try:
        log = [json.loads(line) for line in file.read_text().splitlines()[:steps]]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} is missing or damaged ({error}); put it back, or delete {file.parent} to train this anew."
        ) from None
    if [line.get("step") for line in log] != list(range(steps)):
        raise InputError(
            f"{file} holds {len(log)} of the {steps} steps of its checkpoint: it was cut off. Put it back, or "
            f"delete {file.parent} to train this anew."
        )
    return log


def finetune(config: FinetuningConfig, target: Path, work: Path) -> dict[str, Any]:
    """Train to the end, from the last checkpoint in `work` if there is one; returns what `training.json` in `target`
    says.

    A finished model in `target` is not trained again. Errors: `InputError`, before anything is trained, when it was
    made with another configuration, or when `target` can't be written or holds what this program has not written.
    """
    if (storage.recovered(target) / "training.json").exists():
        return _finished(config, target)
    storage.require_replaceable(target)
    storage.hold(work)
    training = Finetuning(config)
    training.resume(work)
    _run(training, work)
    training.export(target)
    return _finished(config, target)


def _finished(config: FinetuningConfig, target: Path) -> dict[str, Any]:
    """What the `training.json` of a finished model says. Errors: `InputError` for a model that other settings made."""
    origin = storage.read_json(target / "training.json")
    if not isinstance(origin, dict) or origin.get("finetuning") != json.loads(json.dumps(config.described())):
        raise InputError(
            f"{target} holds a model that was trained with other settings (its training.json has them); choose another "
            "--out."
        )
    return origin


def _run(training: Finetuning, work: Path) -> None:
    with progress_bar(total=training.config.steps, initial=len(training.log), desc="fine-tuning", unit="step") as bar:
        while not training.finished:
            training.advance()
            bar.update()
            bar.set_postfix(loss=f"{training.log[-1]['loss']:.3f}")
            if len(training.log) % training.config.checkpoint_every == 0 or training.finished:
                training.save(work)


def _shallower(model: Any, layers: Sequence[int]) -> Any:
    """The model with these layers alone."""
    total = model.config.get_text_config().num_hidden_layers
    if not layers or max(layers) >= total:
        raise InputError(f"`keep_layers` is {list(layers)}, but the model has the layers 0 to {total - 1}.")
    return with_layers(model, layers).eval()


def share_of_rate(
    schedule: str, optimizer: torch.optim.Optimizer, *, warmup: int, steps: int
) -> Callable[[int], float]:
    """Step -> the factor of the learning rate: a rise over the warm-up that begins above 0, then the schedule of
    `transformers`."""
    if schedule == "constant":
        return lambda step: min(1.0, (step + 1) / max(1, warmup))
    scheduler = get_scheduler(schedule, optimizer, warmup, steps)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    falling = scheduler.lr_lambdas[0]
    return lambda step: min(1.0, (step + 1) / warmup) if step < warmup else falling(step)


def _identity(config: FinetuningConfig, model: Any) -> str:
    """The configuration and the weights that training begins with: a checkpoint of another start refuses to be
    resumed."""
    weights = (value for _, value in sorted(model.state_dict().items()))
    return storage.digest(json.dumps(config.described(), sort_keys=True), *weights, separator="")


def _trained(model: Any, trains: Literal["blocks", "all"]) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; the others take no gradient."""
    embeddings = () if trains == "all" else (model.get_input_embeddings(), model.get_output_embeddings())
    frozen = {id(parameter) for module in embeddings for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
