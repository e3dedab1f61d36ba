"""Directories written all or nothing: a kill at any step leaves the old or the new one, and nothing of anybody else's
is ever removed."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench import storage
from workbench.errors import InputError
from workbench.storage import directories

Patch = pytest.MonkeyPatch


def fill(text: str) -> Callable[[Path], object]:
    return lambda new: (new / "a").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != directories.MARKER}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An old directory of ours."""
    storage.replace_directory(tmp_path / "made", fill("old"))
    return tmp_path / "made"


def test_a_new_directory_takes_the_old_ones_place(target: Path) -> None:
    storage.replace_directory(target, lambda new: (new / "b").write_text("new"))
    assert content(target) == {"b": "new"}
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755
    assert json.loads((target / "workbench.json").read_text())["files"] == ["b"]


def test_an_error_while_filling_leaves_the_old_one(target: Path) -> None:
    def fail(new: Path) -> None:
        (new / "b").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        storage.replace_directory(target, fail)
    assert content(target) == {"a": "old"}
    assert list(target.parent.iterdir()) == [target]


STEPS = {"os.rename", "shutil.rmtree", "os.mkdir", "os.chmod", "os.rmdir", "os.remove", "open"}


def killed_at(step: int, target: Path) -> bool:
    """Replace the target in a process of its own that ends before its so-manieth step on the disk; whether it had so
    many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which this touches
        process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in STEPS and str(target.parent) in str(arguments[0]):
            seen += 1
            if seen == step:
                os._exit(9)

    sys.addaudithook(watch)
    try:
        storage.replace_directory(target, fill("new"))
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_the_next_run_goes_on(tmp_path: Path) -> None:
    left, step, more = [], 0, True
    while more:
        step += 1
        target = tmp_path / str(step) / "made"
        storage.replace_directory(target, fill("old"))
        more = killed_at(step, target)
        left.append(content(storage.recovered(target))["a"])
        storage.replace_directory(target, fill("next"))
        assert content(target) == {"a": "next"}
        assert list(target.parent.iterdir()) == [target], "what the killed process left is cleared away"
    assert step > 10
    assert left == sorted(left, reverse=True), "first the old one, from some step on the new one"
    assert (left[0], left[-1]) == ("old", "new")


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_at_either_rename_leaves_the_old_one(failing: int, target: Path, monkeypatch: Patch) -> None:
    rename, seen = Path.rename, []

    def fail(self: Path, other: Path) -> Path:
        seen.append(other)
        if len(seen) == failing:
            raise OSError("no space")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        storage.replace_directory(target, fill("new"))
    monkeypatch.undo()
    assert content(target) == {"a": "old"}
    assert list(target.parent.iterdir()) == [target]


def test_what_was_not_written_by_us_is_refused_and_stays(tmp_path: Path, target: Path) -> None:
    def refused(folder: Path, name: str) -> None:
        before = sorted(folder.rglob("*"))
        with pytest.raises(InputError, match=rf"has not written \({name}.*choose another folder, or move its content"):
            storage.replace_directory(folder, lambda _: pytest.fail("it was filled"))
        assert sorted(folder.rglob("*")) == before

    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    refused(notes, "notes.txt")
    (target / "thesis.txt").write_text("mine")  # beside what we have written
    refused(target, "thesis.txt")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):  # as anybody's transformers writes
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    refused(tmp_path / "model", "config.json")
    (tmp_path / "model" / "workbench.json").write_text('{"format": "other", "files": ["config.json"]}')
    refused(tmp_path / "model", "config.json")
    (tmp_path / "deep" / "empty").mkdir(parents=True)
    refused(tmp_path / "deep", "empty")
    (tmp_path / "empty").mkdir()
    storage.replace_directory(tmp_path / "empty", fill("new"))
    assert content(tmp_path / "empty") == {"a": "new"}


def test_directories_from_before_the_marker_are_known(tmp_path: Path) -> None:
    def made(folder: Path, *names: str, training: str = '{"steps": 3}') -> Path:
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(training if name == "training.json" else "{}")
        return folder

    model = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    condition = tmp_path / "run" / "conditions" / "full_ce-0"
    known = [
        made(tmp_path / "trained", *model, "training.json", "training_log.jsonl", "accuracies.json"),
        made(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors"),
        made(condition / "student", *model),
    ]
    (condition / "log.jsonl").write_text("")
    for folder in known:
        storage.replace_directory(folder, fill("new"))
        assert content(folder) == {"a": "new"}
    for folder in (
        made(tmp_path / "theirs", "adapter_config.json", "adapter_model.safetensors", "README.md"),
        made(tmp_path / "other", *model, "training.json", training='{"epochs": 3}'),
        made(tmp_path / "student", *model),
    ):
        with pytest.raises(InputError, match="has not written"):
            storage.replace_directory(folder, fill("new"))


def test_the_bundled_models_are_known_as_ours() -> None:
    for name in ("teacher", "student", "mixture-student", "lineage/depth-3"):
        storage.require_replaceable(Path("assets/models") / name)


def test_a_place_that_can_be_no_folder_is_refused_before_anything(tmp_path: Path, target: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    for place, message in (
        ("file", "is a file, so that"),
        ("file/below/deep", "is a file, so that"),
        ("link", "is a link, which would be replaced; give the folder that it points to"),
        ("broken", "is a link"),
    ):
        with pytest.raises(InputError, match=message):
            storage.replace_directory(tmp_path / place, lambda _: pytest.fail("it was filled"))
    assert content(target) == {"a": "old"}
    storage.replace_directory(tmp_path / "link" / "below", fill("new"))  # a link above is where the user keeps things


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_place_without_the_right_to_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(InputError, match="can't be written"):
        storage.require_replaceable(tmp_path / "closed" / "made")


def test_what_came_to_be_meanwhile_stays_where_its_name_says_what_it_is(tmp_path: Path) -> None:
    """Two processes convert one file: the second finds the first one's folder."""
    target = tmp_path / "made"

    def slow(new: Path) -> None:
        (new / "a").write_text("second")
        storage.replace_directory(target, fill("first"))

    storage.replace_directory(target, slow, keep_existing=True)
    assert content(target) == {"a": "first"}
    assert list(tmp_path.iterdir()) == [target]


def test_another_living_process_keeps_its_half_directory(target: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        half = target.parent / f".made.workbench-new-{directories.socket.gethostname()}-{other.pid}-x"
        half.mkdir()
        storage.replace_directory(target, fill("new"))
        assert half.exists()
    finally:
        other.kill()
        other.wait()
    storage.replace_directory(target, fill("new"))
    assert not half.exists()
