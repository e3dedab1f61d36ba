"""Fine-tuning on trees of prompts: a tree is worth its prompts one by one, and training resumes to the bit."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.conftest import ModelFolder
from tests.miniatures import FAMILIES, miniature
from workbench.cli import main
from workbench.errors import InputError
from workbench.experiment.recipe import parse_config, read_yaml
from workbench.models.sources import quiet
from workbench.pretraining.finetuning import Finetuning, FinetuningConfig, finetune
from workbench.pretraining.rows import _prompt
from workbench.tasks.entity_tracking import EntityTracking, split_of
from workbench.tasks.trees import joined, tree, trees_of

TOLERANCE = 2e-5
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 6, 7, 8, 11, 12]]
ANSWERS = [[20, 21, 22], [23], [24, 25]]


def tuning(folder: Path, **settings: Any) -> FinetuningConfig:
    defaults = {
        "options": {"boxes": 3},
        "scenes": 3,
        "steps": 6,
        "evaluate_every": 3,
        "evaluation_scenes": 4,
        "checkpoint_every": 2,
        "warmup": 2,
    }
    return FinetuningConfig(model=str(folder), **(defaults | settings))


def predictions(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Logits at the tokens that predict the answer's, of the prompt alone: the slow reference."""
    whole = torch.tensor([[*prompt, *answer]])
    return model(whole).logits[0, len(prompt) - 1 : -1]


def furthest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


def weights(training: Finetuning) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in training.model.named_parameters()}


def test_a_tree_computes_what_its_prompts_compute(architecture: str, model_folder: ModelFolder) -> None:
    """Branches of several lengths, answers of several tokens, and padding, against one forward a prompt."""
    training = Finetuning(tuning(model_folder(architecture)))
    trees = joined([tree(PROMPTS, ANSWERS), tree([[30, 31], [30, 32]], [[33], [34]])])
    assert trees.tokens.shape == (2, 3 + 4 + 1 + 4)
    expected = torch.cat(
        [
            predictions(training.model, *each)
            for each in zip([*PROMPTS, [30, 31], [30, 32]], [*ANSWERS, [33], [34]], strict=True)
        ]
    )
    found = training.logits(trees)
    assert trees.targets.tolist() == [20, 21, 22, 23, 24, 25, 33, 34]
    assert furthest(found, expected) <= TOLERANCE
    leaky = replace(trees, branch=trees.branch.clamp(max=0))  # every branch sees those before it
    assert furthest(training.logits(leaky), expected) >= 100 * TOLERANCE
    moved = replace(trees, positions=torch.arange(trees.tokens.shape[1]).expand(2, -1))
    assert furthest(training.logits(moved), expected) >= 100 * TOLERANCE


def test_its_gradient_is_that_of_the_separate_prompts(model_folder: ModelFolder) -> None:
    training = Finetuning(tuning(model_folder("llama")))
    trees = joined([tree(PROMPTS, ANSWERS)])
    leaves = list(training.leaves.values())
    found = torch.autograd.grad(nn.functional.cross_entropy(training.logits(trees), trees.targets), leaves)
    apart = torch.cat([predictions(training.model, *each) for each in zip(PROMPTS, ANSWERS, strict=True)])
    expected = torch.autograd.grad(nn.functional.cross_entropy(apart, trees.targets), leaves)
    largest = max(float(each.abs().max()) for each in expected)
    assert all(furthest(ours, theirs) <= 1e-5 * largest for ours, theirs in zip(found, expected, strict=True))


def test_right_needs_every_token_of_an_answer() -> None:
    trees = joined([tree(PROMPTS, ANSWERS), tree([[1, 2], [1, 3]], [[4], [5]])])
    perfect = nn.functional.one_hot(trees.targets, 40).float()
    assert trees.right(perfect).tolist() == [True] * 5
    wrong = perfect.roll(1, dims=1)
    for place, prompt in enumerate([0, 0, 0, 1, 2, 2, 3, 4]):
        mixed = torch.where(torch.arange(len(perfect))[:, None] == place, wrong, perfect)
        assert trees.right(mixed).tolist() == [other != prompt for other in range(5)]
    parts = list(trees.batches(1))
    assert [len(part) for part in parts] == [1, 1]
    assert (
        torch.cat([part.right(nn.functional.one_hot(part.targets, 40).float()) for part in parts]).tolist()
        == [True] * 5
    )


def test_the_pairs_of_a_scene_share_its_text(model_folder: ModelFolder) -> None:
    training = Finetuning(tuning(model_folder("llama")))
    trees = training.scenes("train", 4, "some")
    assert (trees.branch[:, :22] == 0).all(), "three clauses of seven tokens and the word Box are held once"
    assert trees.tokens.shape == (4, 22 + 3 * 3)
    drawn = list(EntityTracking(boxes=3).pairs(training.tokenizer, split="train", scenes=4, seed=5))
    assert trees_of(drawn, training.tokenizer, each=1).tokens.shape == (12, 25), (
        "one prompt a tree is the prompt itself"
    )


def test_training_scenes_are_never_held_out(model_folder: ModelFolder) -> None:
    training = Finetuning(tuning(model_folder("llama"), scenes=20))
    for split in ("train", "calibration", "test"):
        for text in training.tokenizer.batch_decode(training.scenes(split, 20, "scenes", 0).tokens[:, :20]):  # pyright: ignore[reportArgumentType]
            words = text.replace(",", " ").split()
            scene = tuple((words[place + 1], words[place + 5]) for place in range(0, 18, 6))
            assert split_of(scene) == split


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_resumed_equals_uninterrupted(precision: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    config = tuning(model_folder("gpt2"), precision=precision)  # with dropout
    whole = Finetuning(config)
    for _ in range(6):
        whole.advance()
    first = Finetuning(config)
    for _ in range(4):
        first.advance()
    first.save(tmp_path)
    second = Finetuning(config)
    second.resume(tmp_path)
    assert len(second.log) == 4
    for _ in range(2):
        second.advance()
    assert second.log == whole.log
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())
    with pytest.raises(InputError, match="another configuration"):
        Finetuning(replace(config, learning_rate=2e-4)).resume(tmp_path)
    with pytest.raises(InputError, match="another configuration"):
        Finetuning(replace(config, model=str(model_folder("gpt2", seed=1)))).resume(tmp_path)


def test_files_of_before_there_was_a_device_still_open() -> None:
    """What a training is described by holds neither the device nor the usual dtype, as the committed models' files."""
    described = FinetuningConfig(model="m", device="cpu").described()
    assert described == FinetuningConfig(model="m", device="cuda").described()
    assert not {"device", "dtype"} & described.keys()
    assert FinetuningConfig(model="m", dtype="float64").described()["dtype"] == "float64"


def test_placement(model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    training, usual = Finetuning(tuning(folder, dtype="float64")), Finetuning(tuning(folder))
    training.advance()
    usual.advance()
    assert next(iter(training.leaves.values())).dtype == torch.float64
    assert training.identity != usual.identity
    assert training.log[0]["loss"] == pytest.approx(usual.log[0]["loss"], rel=1e-4)
    assert training.log[0]["loss"] != usual.log[0]["loss"]
    with pytest.raises(InputError, match="no device"):
        Finetuning(tuning(folder, device="no-such"))


@pytest.mark.parametrize("trains", ["blocks", "all"])
def test_what_trains(trains: str, model_folder: ModelFolder) -> None:
    training = Finetuning(tuning(model_folder("llama"), trains=trains, learning_rate=1e-3))
    before = weights(training)
    training.advance()
    changed = {name for name, value in weights(training).items() if not torch.equal(value, before[name])}
    assert any("layers.2" in name for name in changed)
    assert any("embed_tokens" in name for name in changed) == (trains == "all")
    assert any("lm_head" in name for name in changed) == (trains == "all")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "gemma2", "mixtral"])
def test_layers_that_are_kept_are_the_models_own(kind: str, model_folder: ModelFolder) -> None:
    folder = model_folder(kind, layers=4)
    shallow = Finetuning(tuning(folder, keep_layers=[0, 2])).model
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    whole = plain(torch.tensor(PROMPTS[:1])).logits
    name, blocks = next((name, each) for name, each in plain.named_modules() if isinstance(each, nn.ModuleList))
    parent, _, place = name.rpartition(".")
    setattr(plain.get_submodule(parent), place, nn.ModuleList([blocks[0], blocks[2]]))
    expected, logits = (model(torch.tensor(PROMPTS[:1]), use_cache=False).logits for model in (plain, shallow))
    assert furthest(logits, expected) <= TOLERANCE
    assert furthest(whole, expected) >= 100 * TOLERANCE
    assert shallow.config.num_hidden_layers == 2


def test_layers_that_are_not_there_are_refused(model_folder: ModelFolder) -> None:
    with pytest.raises(InputError, match="layers 0 to 2"):
        Finetuning(tuning(model_folder("llama"), keep_layers=[0, 3]))


def test_a_model_that_takes_no_trees_trains_on_its_prompts_one_by_one(tmp_path: Path) -> None:
    """ALiBi counts distances by places, not by positions."""
    folder = miniature("Bloom", FAMILIES["Bloom"], tmp_path)
    training = Finetuning(tuning(folder))
    assert not training.takes_trees
    trees = training.scenes("train", 2, "some")
    assert len(trees) == 6, "one prompt a tree"
    expected = []
    for row in range(6):
        length = int((trees.branch[row] != -1).sum())
        expected.append(training.model(trees.tokens[row : row + 1, :length]).logits[0, -1])
    assert furthest(training.logits(trees), torch.stack(expected)) <= TOLERANCE
    with pytest.raises(ValueError, match="unpack"):  # of the mask that a tree needs
        training._in_trees(trees)
    training.advance()
    assert training.log[0]["loss"] > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_rises_and_falls(schedule: str, model_folder: ModelFolder) -> None:
    training = Finetuning(tuning(model_folder("llama"), schedule=schedule, steps=10, warmup=2))
    rates = [training.share(step) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[2:]))
    assert 0 < rates[-1] < 0.2
    steady = Finetuning(tuning(model_folder("llama"), steps=10, warmup=2))
    assert [steady.share(step) for step in range(10)] == [0.5, *[1.0] * 9]
    assert training.identity != steady.identity
    assert "schedule" not in steady.config.described()


def arithmetic(file: Path, count: int = 60) -> Path:
    """Rows of GOAT's columns, in words that the tokenizer knows."""
    words = ("apple", "book", "key", "coin")
    rows = [
        {
            "instruction": f"The {words[row % 4]} is in Box {row % 7}, the {words[row // 4 % 4]} is in Box {row // 16}",
            "input": "",
            "output": f"Box {row % 7}",
            "answer": str(row % 7),
        }
        for row in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_of_text_train_a_teacher_and_resume_to_the_bit(model_folder: ModelFolder, tmp_path: Path) -> None:
    """The recipe of GOAT on rows of its columns, by the command line, with a miniature."""
    file = arithmetic(tmp_path / "goat.jsonl")
    small = {"steps": 4, "scenes": 4, "evaluate_every": 2, "evaluation_scenes": 3, "checkpoint_every": 2, "warmup": 1}
    small |= {"precision": "full", "device": "cpu", "rows": str(file), "model": str(model_folder("gpt2"))}
    recipe = parse_config(FinetuningConfig, read_yaml("llama3_goat_teacher"), overrides=small)
    words = [word for key, value in small.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    out = tmp_path / "teacher"
    assert main(["finetune", "--recipe", "llama3_goat_teacher", "--out", str(out), "--threads", "1", *words]) == 0
    whole = Finetuning(recipe)
    first, second = Finetuning(recipe), Finetuning(recipe)
    for _ in range(4):
        whole.advance()
    for _ in range(2):
        first.advance()
    first.save(tmp_path / "work")
    second.resume(tmp_path / "work")
    for _ in range(2):
        second.advance()
    assert second.log == whole.log
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in weights(whole).items() if name in saved)
    assert whole.rows is not None
    texts = {split: {row.clean for row in rows} for split, rows in whole.rows.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["calibration"]
    end = whole.tokenizer.eos_token or ""
    assert all(row.clean.endswith("\nAnswer:") and row.answer.endswith(end) for row in whole.rows["train"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": ["{instructoin}"]}, "row 1: no column 'instructoin'; did you mean 'instruction'"),
        ({"answer": "{output"}, "can't be read"),
        ({"answer": "{0}"}, "which is no column"),
        ({"longest": 2}, "no rows for train"),
        ({"rows": "nowhere.jsonl"}, "rows of text columns"),
    ],
)
def test_rows_that_can_not_be_used_are_refused(
    settings: dict[str, Any], said: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    usual = {"rows": str(arithmetic(tmp_path / "rows.jsonl")), "prompt": ["{instruction}"], "answer": " {output}"}
    with pytest.raises(InputError, match=said):
        Finetuning(tuning(model_folder("llama"), **(usual | settings)))


def test_alpacas_two_prompts(tmp_path: Path) -> None:
    config = parse_config(FinetuningConfig, read_yaml("llama3_alpaca_teacher"))
    with_input, without = (
        _prompt(config.prompt, {"instruction": "Add.", "input": given, "output": "3"}, 1) for given in ("1 2", "")
    )
    assert "### Input:\n1 2\n\n### Response:\n" in with_input
    assert "Input" not in without
    assert without.endswith("### Response:\n")


def test_it_learns(model_folder: ModelFolder) -> None:
    """A random model soon knows that answers are objects: from the loss of guessing a word to that of guessing an
    object."""
    training = Finetuning(
        tuning(model_folder("llama"), learning_rate=1e-2, trains="all", steps=30, scenes=8, evaluate_every=30)
    )
    for _ in range(30):
        training.advance()
    first, last = training.log[0]["loss"], sum(line["loss"] for line in training.log[-5:]) / 5
    assert last < first - 0.4


def test_it_stops_when_good_enough_and_is_not_trained_again(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([0.3, 0.6, 0.8])
    monkeypatch.setattr(Finetuning, "accuracy", lambda self, split: next(found))
    config = tuning(model_folder("llama"), evaluate_every=1, stop_at=0.5)
    made = finetune(config, tmp_path / "model", tmp_path / "work")
    log = [json.loads(line) for line in (tmp_path / "model" / "training_log.jsonl").read_text().splitlines()]
    assert (made["steps"], made["test_accuracy"]) == (2, 0.8)
    assert [line["held_out_accuracy"] for line in log] == [0.3, 0.6]
    with pytest.raises(InputError, match="other settings"):
        finetune(replace(config, seed=9), tmp_path / "model", tmp_path / "work")
    assert finetune(config, tmp_path / "model", tmp_path / "elsewhere") == made
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("place", ["notes", "notes/notes.txt/below", "link", "bundled"])
def test_an_out_that_can_not_be_written_is_refused_before_anything_is_loaded(
    place: str, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    (tmp_path / "bundled").mkdir()
    (tmp_path / "bundled" / "training.json").write_text('{"size": {}, "steps": 3}')
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("workbench.pretraining.finetuning.Finetuning", lambda config: pytest.fail("it was begun"))
    with pytest.raises(InputError, match=r"has not written|is a file|is a link|trained with other settings"):
        finetune(tuning(model_folder("llama")), tmp_path / place, tmp_path / "work")
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_from_the_fine_tuned_models_to_the_table(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled recipes for SmolLM2 on boxes one after another by the command line, on a miniature: teacher, its
    every other layer, all conditions."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    models = {name: str(tmp_path / name) for name in ("teacher", "student")}
    short = {
        "options.boxes": 3,
        "scenes": 3,
        "steps": 2,
        "evaluate_every": 2,
        "evaluation_scenes": 2,
        "checkpoint_every": 2,
        "precision": "full",
    }

    def run(command: str, recipe: str, out: Path | str, **settings: Any) -> None:
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        assert main([command, "--recipe", recipe, "--out", str(out), "--threads", "1", *words]) == 0

    run("finetune", "smollm2_boxes_teacher", models["teacher"], model=str(model_folder("llama", layers=4)), **short)
    run("finetune", "smollm2_boxes_student", models["student"], model=models["teacher"], keep_layers=[0, 2], **short)
    small = {"reference_scenes": 3, "discovery_scenes": 2, "train_scenes": 3, "test_scenes": 3, "boxes": 3}
    sizes = {"discovery.heads": 3, "training.steps": 2, "training.batch": 4, "training.precision": "full", "seeds": [0]}
    run(
        "evaluate",
        "smollm2_boxes",
        tmp_path / "run",
        **models,
        **{f"data.{key}": value for key, value in small.items()},
        **sizes,
    )
    rows = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["condition"] for row in rows] == [
        "base",
        "full_ce",
        "circuit_ce",
        "circuit_ce_random_cka",
        "circuit_ce_cka",
        "teacher",
    ]
    assert {row["steps"] for row in rows if row["trained_parameters"]} == {2}
