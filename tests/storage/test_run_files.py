"""Files of a run: typed on reading, summed on writing, and a disk that can't be written to is named."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench import storage
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.comparison import CircuitComparison
from workbench.circuits.curves import FaithfulnessCurve
from workbench.circuits.evaluation import CircuitReport
from workbench.cli import main
from workbench.distillation.reports import StepReport, read_log
from workbench.errors import InputError
from workbench.experiment.results import ConditionResult, read_results, table
from workbench.experiment.runs import RunFolder
from workbench.matching import HeadMap
from workbench.matching.pair_cka import PairCka
from workbench.report.run import run_report
from workbench.report.run_matches import read_ckas
from workbench.storage.checksums import note_file
from workbench.study.diagnostic import read_known
from workbench.study.written import read_summary
from workbench.values.refs import Head
from workbench.values.scores import Scores

RESULTS = Path(__file__).parents[2] / "assets" / "results"
CIRCUIT = Circuit.of([Member(Head(1, 2), "A", "last"), Member(Head(0, 1), "B", "all")], shape=(3, 4), method="by hand")
EVALUATION = json.loads((RESULTS / "demo" / "student-evaluation.json").read_text())
READERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "circuit": (CIRCUIT.to_json(), Circuit.from_json),
    "head map": (HeadMap.load(RESULTS / "demo" / "head_map.json").to_json(), HeadMap.from_json),
    "curve": (EVALUATION["curve"], FaithfulnessCurve.from_json),
    "evaluation": (EVALUATION["report"], CircuitReport.from_json),
    "row": (json.loads((RESULTS / "demo" / "results.json").read_text())[0], ConditionResult.from_json),
    "pair": (json.loads((RESULTS / "study_entity/sibling/ckas.json").read_text())[0], PairCka.from_json),
    "comparison": ({"jaccard": 0.5, "roles": [], "moved": ["L0H1: A -> B"]}, CircuitComparison.from_json),
}


@pytest.mark.parametrize("name", READERS)
def test_good_values_are_read_and_written_alike(name: str) -> None:
    value, read = READERS[name]
    made = read(value)
    assert read(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("odd", [None, True, 3, 1.5, "x", [], [[]], {}, {"x": 1}])
@pytest.mark.parametrize("name", READERS)
def test_what_is_something_else_is_refused(name: str, odd: Any) -> None:
    with pytest.raises(InputError, match=r"this is not .*(run|again|writes)"):
        READERS[name][1](odd)


@pytest.mark.parametrize("name", READERS)
def test_every_key_is_needed_or_has_a_default_and_its_type_is_checked(name: str) -> None:
    value, read = READERS[name]
    for key in value:
        for odd in ({"odd": object}, "\x00", [[None]]):
            changed = {**value, key: odd}
            if isinstance(value[key], str):
                changed[key] = 3
            try:
                read(changed)
            except InputError as error:
                assert key in str(error)  # noqa: PT017
            else:
                assert key in (
                    "cpr",
                    "cmd",
                    "random_cpr",
                    "random_cmd",
                    "stability",
                    "ties",
                    "within_noise",
                    "teacher_heads_used",
                )
        without = {other: each for other, each in value.items() if other != key}
        try:
            read(without)
        except InputError as error:
            assert f"has no {key!r}" in str(error)  # noqa: PT017
    with pytest.raises(InputError, match=r"unknown key 'odd'"):
        read({**value, "odd": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["members"][1].update(head=3), r"members\[1\].head is 3, not text"),
        (lambda value: value["members"][1].update(head="x"), r"members\[1\].head: 'x' is not a head"),
        (lambda value: value.update(shape=[3]), r"shape holds 1 values, not 2"),
        (lambda value: value.update(shape=[True, 4]), r"shape\[0\] is True, not a whole number"),
        (lambda value: value.update(shape=["3", 4]), r"shape\[0\] is '3', not a whole number"),
        (lambda value: value.update(shape=[1, 1]), r"outside a model"),
    ],
)
def test_the_place_is_named(change: Callable[[Any], None], message: str) -> None:
    value = CIRCUIT.to_json()
    change(value)
    with pytest.raises(InputError, match=message):
        Circuit.from_json(value)


def test_a_line_of_a_log_is_named(tmp_path: Path) -> None:
    report = StepReport(
        step=0, loss=1.0, task_loss=None, alignment_loss=None, ckas={}, gradient_norm=1.0, learning_rate=0.1
    )
    file = tmp_path / "log.jsonl"
    file.write_text(report.line() * 2)
    assert read_log(file) == [report] * 2
    for line in ('{"step": 0}', "null", "{", '{"step": "0"}', "NaN", "[" * 20000):
        file.write_text(f"{report.line()}{line}\n")
        with pytest.raises(InputError, match=r"line 2, is damaged"):
            read_log(file)
        assert read_log(file, first=1) == [report], "what comes after is not looked at"
    with pytest.raises(InputError):
        read_log(tmp_path)


@pytest.mark.parametrize(
    "described",
    [
        None,
        [],
        3,
        "x",
        {},
        {"axes": ["layer"]},
        {"axes": 3, "labels": {}, "unit": "x", "baseline": None},
        {"axes": ["layer", "head"], "labels": {"layer": 3}, "unit": "x", "baseline": None},
        {"axes": ["layer", "head"], "labels": {}, "unit": 3, "baseline": None},
        {"axes": ["layer", "head"], "labels": {}, "unit": "x", "baseline": "y"},
        {"axes": ["layer"], "labels": {}, "unit": "x", "baseline": 1.0},
    ],
)
def test_scores_with_broken_descriptions(tmp_path: Path, described: Any) -> None:
    file = tmp_path / "s.safetensors"
    for text in (json.dumps(described), "{", "[" * 20000):
        storage.write_tensors(file, {"values": torch.zeros(2, 3)}, metadata={"scores": text})
        with pytest.raises(InputError, match=r"holds no scores that can be read"):
            Scores.load(file)
    good = json.dumps({"axes": ["layer", "head"], "labels": {}, "unit": "x", "baseline": None})
    storage.write_tensors(file, {"values": torch.zeros(2, 3, dtype=torch.int64)}, metadata={"scores": good})
    with pytest.raises(InputError, match=r"not floating-point"):
        Scores.load(file)


@pytest.mark.parametrize(
    "content", [b"null", b"[]", b"{", b"\xff", b"NaN", b'{"a": 1, "a": 2}', b"1e999", b"[" * 20000, b'["\\ud800"]']
)
def test_json_that_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    (tmp_path / "report.html").write_text("something, or the run would be begun anew")
    with pytest.raises(InputError):
        RunFolder(tmp_path).described()
    with pytest.raises(InputError):
        RunFolder(tmp_path).begin({"recipe": {"teacher": "x"}}, resume=True, lock=False)
    (tmp_path / "results.json").write_bytes(content)
    if content != b"[]":
        with pytest.raises(InputError):
            read_results(tmp_path / "results.json")


def test_the_committed_results_open_without_checksums() -> None:
    """Files of before have none; every reader reads them."""
    for file in RESULTS.rglob("head_map.json"):
        assert HeadMap.load(file).matches
    for file in RESULTS.rglob("results.json"):
        assert table(read_results(file))
    for file in RESULTS.rglob("ckas.json"):
        assert read_ckas(file.parent) is not None
    for file in RESULTS.rglob("*-evaluation.json"):
        value = storage.read_json(file)
        assert CircuitReport.from_json(value["report"]).heads
        assert FaithfulnessCurve.from_json(value["curve"]).cpr
    for file in RESULTS.rglob("summary.json"):
        assert read_summary(file)["cells"]
        assert read_known(file.parent).starts
    for file in RESULTS.rglob("run.json"):
        assert RunFolder(file.parent).described()["recipe"]["teacher"]
    assert not list(RESULTS.rglob("*.sha256"))


# ---- checksums


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder that a run has written, of a committed result's values."""
    folder = tmp_path / "run"
    storage.write_json(folder / "run.json", json.loads((RESULTS / "smollm2_boxes" / "run.json").read_text()))
    source = RESULTS / "smollm2_boxes"
    circuits = []
    for name in ("teacher", "student"):
        circuits.append(folder / "circuits" / f"{name}.json")
        storage.write_json(circuits[-1], json.loads((source / f"{name}.json").read_text()))
    storage.write_json(folder / "head_map.json", json.loads((source / "head_map.json").read_text()), made_from=circuits)
    for name in ("ckas.json", "results.json"):
        storage.write_json(folder / name, json.loads((source / name).read_text()))
    Scores.of_heads(torch.arange(12.0).reshape(3, 4), unit="x").save(folder / "scores" / "teacher-x.safetensors")
    return folder


def test_what_a_run_wrote_is_read_and_carries_sums(run: Path) -> None:
    assert run_report(RunFolder(run))
    for file in (path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")):
        note = json.loads(note_file(file).read_text())
        assert note["sha256"] == storage.sha256(file)


def test_every_flipped_digit_is_noticed(run: Path) -> None:
    """58 flips over the files of a run; before there were sums, one was refused."""
    draw, noticed = random.Random(0), 0
    files = sorted(path for path in run.rglob("*.json") if path.is_file())
    for _ in range(58):
        file = draw.choice(files)
        content = file.read_bytes()
        digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
        place = draw.choice(digits)
        other = str((int(chr(content[place])) + 1) % 10).encode()
        file.write_bytes(content[:place] + other + content[place + 1 :])
        with pytest.raises(InputError, match=r"has changed since the run wrote it"):
            storage.read_json(file)
        noticed += 1
        file.write_bytes(content)
        storage.read_json(file)
    assert noticed == 58


def test_a_flipped_bit_of_scores_is_noticed(run: Path) -> None:
    file = run / "scores" / "teacher-x.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"has changed since the run wrote it"):
        Scores.load(file)


def test_a_meant_change_is_let_in_by_deleting_the_sum(run: Path) -> None:
    file = run / "circuits" / "teacher.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(InputError, match=rf"if the change is meant, delete .*\.{file.name}\.sha256"):
        RunFolder(run).circuit("teacher")
    note_file(file).unlink()
    assert RunFolder(run).circuit("teacher").heads
    with pytest.raises(InputError, match=r"head_map.json was made from another teacher.json"):
        RunFolder(run).head_map()
    note_file(run / "head_map.json").unlink()
    assert RunFolder(run).head_map().matches, "the same heads in another file"


def test_an_edited_circuit_beside_an_older_head_map_is_noticed_without_sums(run: Path) -> None:
    for note in run.rglob("*.sha256"):
        note.unlink()
    assert RunFolder(run).head_map().matches
    gone = RunFolder(run).head_map().teacher_heads[0]
    circuit = RunFolder(run).circuit("teacher").without([gone])
    (run / "circuits" / "teacher.json").write_text(json.dumps(circuit.to_json()))
    with pytest.raises(InputError, match=rf"matches {gone}, not in the circuit of the teacher"):
        RunFolder(run).head_map()


def test_files_outside_a_run_and_large_ones_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_json(tmp_path / "circuit.json", CIRCUIT.to_json())
    assert not list(tmp_path.rglob("*.sha256"))
    monkeypatch.setattr(storage.checksums, "LARGEST", 10)
    storage.write_json(tmp_path / "run.json", {"recipe": {}})
    storage.write_json(tmp_path / "large.json", ["x"] * 100)
    assert storage.read_json(tmp_path / "large.json")
    assert not note_file(tmp_path / "large.json").exists()


@pytest.mark.parametrize("moment", ["forget", "keep"])
def test_a_kill_at_any_moment_leaves_a_file_that_opens(run: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    file = run / "ckas.json"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage.checksums, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            storage.write_json(file, [])
    assert storage.read_json(file) in ([], json.loads((RESULTS / "smollm2_boxes" / "ckas.json").read_text()))
    assert not [path for path in run.iterdir() if path.name.startswith(".ckas.json.") and path.suffix != ".sha256"]


def test_what_a_kill_leaves_is_no_result(run: Path) -> None:
    before = run_report(RunFolder(run))
    for name in (
        "scores/.teacher-path-A.safetensors.abcdefgh",
        ".results.json.abcdefgh",
        "circuits/.teacher.json.abcdefgh",
    ):
        (run / name).write_bytes(b"half of it")
    assert run_report(RunFolder(run)) == before
    fresh = run.parent / "fresh"
    fresh.mkdir()
    (fresh / ".run.json.abcdefgh").write_bytes(b"half")
    RunFolder(fresh).begin({"recipe": {"teacher": "x"}}, resume=True, lock=False)
    assert (fresh / "run.json").exists()


# ---- disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_a_disk_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    file = tmp_path / "a.json"
    storage.write_json(file, 1)
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(InputError, match=rf"a.json can't be written \({os.strerror(number)}\).*--out"):
                storage.write_json(file, 2)
        assert storage.read_json(file) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"], "nothing is left over"


def test_a_full_device(tmp_path: Path) -> None:
    def fill(_: Path) -> None:
        Path("/dev/full").write_text("x" * 10_000)

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(InputError, match=r"a.txt can't be written \(No space left on device\)"):
        storage.write_atomically(tmp_path / "a.txt", fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/run", "file/a/b"])
def test_a_folder_below_a_file(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for write in (
        lambda path: storage.write_json(path, 1),
        lambda path: storage.write_text(path, "x"),
        lambda path: storage.write_tensors(path, {"a": torch.zeros(1)}),
    ):
        with pytest.raises(InputError, match=r"can't be written \(.*\).*choose another folder"):
            write(tmp_path / name / "a.json")
    assert main(["report", "--out", str(tmp_path / name)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_in_a_files_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    for read in (storage.read_json, storage.read_tensors, storage.map_tensors):
        with pytest.raises(InputError):
            read(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"can't be written"):
        storage.write_json(tmp_path / "a.json", 1)
    shutil.rmtree(tmp_path / "a.json")


def test_a_model_that_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.storage import replace_directory

    def fill(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match=r"model can't be written \(No space left on device\)"):
        replace_directory(tmp_path / "model", fill)
    assert list(tmp_path.iterdir()) == []
