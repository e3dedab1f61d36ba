"""Answers of two tokens: `python -m docs.two_tokens` writes assets/results/two_tokens, one file a seed.

    red cup [ big hat ] old key raw map :   big hat

A teacher of three layers and students of two are trained here to give the marked words (seconds of one core); each
student, which knows some, then learns from the teacher with its matched heads alone: on cross-entropy over the
whole answer or over its first token, with and without CKA. Every row is the accuracy on fresh prompts. A row that is
there is not made again; the models lie in a folder that is thrown away with the cache.
"""

import itertools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import workbench as wb
from docs.tables import markdown, number, over_seeds
from workbench import seeds, storage
from workbench.models import sources
from workbench.models.hooked_model import HookedModel
from workbench.patching.execution import Execution
from workbench.storage.provenance import provenance
from workbench.tasks.base import Pair, PromptPairs, Split, Stage
from workbench.tasks.drawing import distinct
from workbench.tasks.forcing import answer_logits, greedy_answers
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.vocabulary import word_level_tokenizer
from workbench.tasks.wording import split_by_hash

FOLDER = Path(__file__).parents[1] / "assets/results/two_tokens"
SEEDS = tuple(range(8))
FIRST = tuple("red big old raw wet dry hot icy new sad shy sly".split())
SECOND = tuple("cup hat key map pen box bag jar pot lid net rod".split())
SETTINGS = PromptSettings(multi_token=True)
TRAIN, DISCOVERY, TEST = 32, 64, 400
log = logging.getLogger("two_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """Which two words are marked? Among so many, in one row."""

    entries: int = 4

    name: ClassVar[str] = "marked words"
    stages: ClassVar[tuple[Stage, ...]] = (Stage(name="A", title="word fetcher", position="last"),)

    @property
    def chance(self) -> float:
        return 1 / self.entries

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        """The corrupt prompt marks other words of the same row, which are the distractor."""
        draw = seeds.chooser(seed, self.name, self.entries, split)

        def make(place: int) -> Pair | None:
            words, at = drawn(draw, self.entries), place % self.entries
            other = (at + 1 + draw.randrange(self.entries - 1)) % self.entries
            if split_by_hash(row_of(words, at)) != split:
                return None
            clean, corrupt = (" ".join(row_of(words, marked)) for marked in (at, other))
            answer, distractor = (" " + " ".join(words[marked]) for marked in (at, other))
            return Pair(clean=clean, corrupt=corrupt, answer=answer, distractor=distractor, positions={})

        yield from distinct(make, scenes=scenes, key=lambda pair: pair.clean, what=f"{self.name} ({split})")


def drawn(draw: Any, entries: int) -> list[tuple[str, str]]:
    """Pairs of words, none twice."""
    return list(zip(draw.sample(FIRST, entries), draw.sample(SECOND, entries), strict=True))


def row_of(words: Sequence[tuple[str, str]], marked: int) -> list[str]:
    """The words of a prompt."""
    parts = [["[", *pair, "]"] if place == marked else list(pair) for place, pair in enumerate(words)]
    return [*itertools.chain.from_iterable(parts), ":"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a student learns from."""

    title: str
    answers: Literal["whole", "first"] = "whole"
    weight: float = 0.0
    positions: str = "last"


CONDITIONS: Mapping[str, Condition] = {
    "first": Condition(title="CE on the first token", answers="first"),
    "whole": Condition(title="CE on all answer tokens"),
    "whole_cka_last": Condition(title="the same + CKA at the prompt's last token", weight=0.3),
    "whole_cka": Condition(
        title="CE on all answer tokens + CKA at all answer tokens", weight=0.3, positions="answering"
    ),
}
UNTIL: Mapping[str, float] = {"teacher": 0.98, "student": 0.1}
"""Share of whole answers right in the last 5 batches at which a model's own training ends: a student knows some."""
MOST, STEPS = 1000, 40
"""At most so many steps of that, and the steps of a distillation."""
SIZES: Mapping[str, tuple[int, int]] = {"teacher": (3, 64), "student": (2, 48)}
"""Layers and width."""


def main() -> int:
    """All seeds and conditions that are not there yet."""
    for seed in SEEDS:
        row(seed)
    log.info("%s", table())
    return 0


def table() -> str:
    """What a student learns of the first token, the second and the whole answer: mean and 95 % interval over seeds."""
    rows = [storage.read_json(FOLDER / f"seed_{seed}.json")["rows"] for seed in SEEDS]
    titles = {"before": "the student before", **{name: condition.title for name, condition in CONDITIONS.items()}}
    parts = ("first", "second", "whole")
    lines = [["the teacher", *(number(rows[0]["teacher"][part]) for part in parts)]]  # the same for every seed
    lines += [
        [title, *(over_seeds([each[name][part] for each in rows]) for part in parts)] for name, title in titles.items()
    ]
    return markdown(("trained on", "first token", "second, after the right first", "whole answer"), lines)


def row(seed: int) -> None:
    """A seed's file: its student before, and after each condition; written after each."""
    file = FOLDER / f"seed_{seed}.json"
    rows: dict[str, Any] = storage.read_json(file)["rows"] if file.exists() else {}
    missing = [name for name in ("teacher", "before", *CONDITIONS) if name not in rows]
    if not missing:
        return
    teacher = wb.Teacher.load(trained("teacher", 0), check=False)
    student = wb.Student.load(trained("student", seed), check=False)
    task = wb.task(Marked())
    train = task.pairs(teacher, scenes=TRAIN, split="train", seed=seed, settings=SETTINGS)
    test = task.pairs(teacher, scenes=TEST, split="test", settings=SETTINGS)
    matching = None
    for name in missing:
        log.info("seed %d: %s", seed, name)
        model: HookedModel = teacher if name == "teacher" else student
        if name in CONDITIONS:
            matching = matching or matched(student, teacher, task)
            model = distilled(student, teacher, matching, train, CONDITIONS[name], seed)
        rows[name] = accuracies(model, test)
        about = {
            "command": "python -m docs.two_tokens",
            "seed": seed,
            "commit": provenance()["commit"],
            "steps": STEPS,
            "trained_until": dict(UNTIL),
            "prompts": {"train": len(train), "discovery": DISCOVERY, "test": len(test)},
        }
        storage.write_json(file, {**about, "rows": rows})


def matched(student: wb.Student, teacher: wb.Teacher, task: Any) -> Any:
    """Heads matched by what they say at the last token of the prompt; circuits by the first token's log-probability."""
    pairs = task.pairs(teacher, scenes=DISCOVERY, settings=SETTINGS)
    quiet = Execution(progress=False)
    ours, theirs = (
        wb.find_circuit(model, pairs, method="mean_ablation", heads=4, execution=quiet) for model in (student, teacher)
    )
    return wb.match(student, teacher, ours, theirs, pairs, rule="similarity")


def distilled(
    student: wb.Student, teacher: wb.Teacher, matching: Any, train: PromptPairs, condition: Condition, seed: int
) -> wb.Student:
    """The student after a condition: the matched heads train, on the teacher's own answers."""
    settings: dict[str, Any] = {"answers": condition.answers, "steps": STEPS, "batch": 16}
    return wb.distill(
        student,
        teacher,
        matching,
        train,
        weight=condition.weight,
        positions=condition.positions,
        seed=seed,
        learning_rate=3e-3,
        **settings,
    ).student


def accuracies(model: HookedModel, test: PromptPairs) -> dict[str, float]:
    """Of the first token, of the second after the right first one, of the whole answer, and of the whole answer by
    greedy decoding, which must be the same."""
    tokens = test.answer_tokens
    assert tokens is not None
    right = answer_logits(model, test).argmax(-1) == tokens
    decoded = greedy_answers(model, test) == tokens
    return {
        "first": share(right[:, 0]),
        "second": share(right[:, 1]),
        "whole": share(right.all(1)),
        "decoded": share(decoded.all(1)),
    }


def share(right: Tensor) -> float:
    """Of prompts."""
    return float(right.double().mean())


def trained(part: Literal["teacher", "student"], seed: int) -> Path:
    """The folder of a model that is trained on the task, made where it is not there."""
    folder = sources.cache_root() / "two_tokens" / f"{part}-{seed}-{UNTIL[part]:g}"
    if (folder / "config.json").exists():
        return folder
    log.info("training %s %d", part, seed)
    tokenizer = word_level_tokenizer([*FIRST, *SECOND, "[", "]", ":"])
    layers, width = SIZES[part]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.get_vocab()["<bos>"],
        eos_token_id=None,
        pad_token_id=tokenizer.get_vocab()["<pad>"],
    )
    with seeds.local(seed, "two tokens", part):
        model = LlamaForCausalLM(config)
    learn(model, tokenizer, seed, part)

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    storage.replace_directory(folder, fill)
    return folder


def learn(model: nn.Module, tokenizer: Any, seed: int, part: Literal["teacher", "student"]) -> None:
    """Cross-entropy on both words, of rows of the train split, new ones in each step."""
    draw = seeds.chooser(seed, "two tokens, rows", part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    number = tokenizer.get_vocab()
    recent: list[float] = []
    while len(recent) < MOST:
        tokens = torch.tensor([[number[word] for word in sequence(draw)] for _ in range(64)])
        logits, targets = model(input_ids=tokens).logits[:, -3:-1], tokens[:, -2:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append(share((logits.argmax(-1) == targets).all(-1)))
        if len(recent) >= 5 and sum(recent[-5:]) / 5 >= UNTIL[part]:
            break
    log.info("  %d steps, %.3f right", len(recent), recent[-1])
    model.eval()


def sequence(draw: Any) -> list[str]:
    """A row of the train split with its answer."""
    while True:
        words, at = drawn(draw, Marked().entries), draw.randrange(Marked().entries)
        if split_by_hash(row_of(words, at)) == "train":
            return [*row_of(words, at), *words[at]]


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    sys.exit(main())
