"""Circuits and head maps as files: what is saved or pushed is what is read, from a file, a folder, a run's own file and
the local hub cache; beside a saved student; what is not there is refused."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError

from workbench import storage
from workbench.circuits.circuit import Circuit, Member
from workbench.errors import InputError
from workbench.matching.head_map import HeadMap, Match
from workbench.matching.match import shared_files
from workbench.models.card import StudentDescription
from workbench.values.refs import Head

OURS = Circuit.of(
    [Member(Head(1, 0), "mover", "last"), Member(Head(2, 3), "", "labels")], shape=(3, 4), method="patching"
)
THEIRS = replace(OURS, method="by hand", members=OURS.members[:1])
HEAD_MAP = HeadMap(
    matches=(Match(student=Head(1, 0), teacher=Head(1, 0), distance=0.25, margin=None, stability=0.75),),
    rule="paper",
    one_to_one=True,
    unmatched=(Head(2, 3),),
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of somebody/shared in a hub cache of its own, offline."""
    home = tmp_path / "hub" / "models--somebody--shared"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home / "snapshots" / COMMIT


def test_a_students_circuits_and_head_map_come_back_from_the_hub_cache(
    cache: Path, load_student: Callable[..., Any]
) -> None:
    student = load_student()
    files = shared_files(HEAD_MAP, OURS, THEIRS)
    student.description = StudentDescription(base="x", circuits={"student": ["L1H0"]}, files=files)
    student.save(cache)
    for source in ("somebody/shared", cache, str(cache)):
        assert HeadMap.load(source) == HEAD_MAP
        assert Circuit.load(source, "student_circuit.json") == OURS
        assert Circuit.load(source, "teacher_circuit.json") == THEIRS
    assert HeadMap.load("somebody/shared", revision=COMMIT) == HEAD_MAP
    assert type(student).load("somebody/shared", check=False).fingerprint() == student.fingerprint()
    assert "`head_map.json`, `student_circuit.json`, `teacher_circuit.json`" in (cache / "README.md").read_text()
    student.save(cache)  # its own files are no stranger's
    assert shared_files(None, OURS, THEIRS).keys() == {"student_circuit.json", "teacher_circuit.json"}


def test_a_file_and_a_run_folders_own_file(tmp_path: Path) -> None:
    for result in (OURS, HEAD_MAP):
        result.save(tmp_path / "result.json")
        assert type(result).load(tmp_path / "result.json") == result
        storage.write_json(tmp_path / "run.json", {**result.to_json(), "origin": {"weights": "0" * 64}})
        assert type(result).load(str(tmp_path / "run.json")) == result
    with pytest.raises(InputError, match="a circuit"):
        Circuit.load(tmp_path / "result.json")


def test_what_is_pushed_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, bytes] = {}

    def upload(self: HfApi, *, path_or_fileobj: Any, path_in_repo: str, repo_id: str) -> None:
        sent[f"{repo_id}/{path_in_repo}"] = path_or_fileobj.read()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repository, **_: None)
    monkeypatch.setattr(HfApi, "upload_file", upload)
    assert OURS.push_to_hub("owner/name").endswith("/owner/name")
    HEAD_MAP.push_to_hub("owner/name", "maps/first.json")
    assert Circuit.from_json(json.loads(sent["owner/name/circuit.json"])) == OURS
    assert HeadMap.from_json(json.loads(sent["owner/name/maps/first.json"])) == HEAD_MAP

    def refused(self: HfApi, *_: Any, **__: Any) -> None:
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "create_repo", refused)
    with pytest.raises(InputError, match="hf auth login"):
        OURS.push_to_hub("owner/name")


def test_what_is_not_there_is_refused_at_once(cache: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    for source, message in (
        ("somebody/shared", "circuit.json of 'somebody/shared' is not in the hub cache, and HF_HUB_OFFLINE is set"),
        ("not a name", "neither a file, a folder nor a hub id"),
        (tmp_path, "circuit.json"),
        ("circuits/mine.json", "circuits/mine.json"),
        ("./mine", "mine"),
    ):
        with pytest.raises(InputError, match=message):
            Circuit.load(source)
    assert time.monotonic() - start < 2
