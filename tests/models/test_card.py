"""The model card: what it says of a student, that the hub's own reader reads it, licences repeated and never guessed;
what is uploaded is what is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from tests.distillation.distilling import PROMPTS
from workbench.distillation.distill import distill
from workbench.errors import InputError
from workbench.matching.head_map import HeadMap, Match
from workbench.models.card import StudentDescription, licence_of, model_card, with_results
from workbench.models.hooked_model import Student
from workbench.storage.provenance import commit
from workbench.values.refs import Head

Loader = Callable[..., Any]
LICENSED = "---\nlicense: llama3.2\nlanguage: [en]\n---\n\n# Somebody's\n"


@pytest.fixture(scope="module")
def trained(model_folder: Loader) -> tuple[Student, Path]:
    """A student of two steps, whose teacher's card states a licence, and the teacher's folder."""
    from workbench.models.hooked_model import Teacher

    folder = model_folder("llama", seed=7)
    (folder / "README.md").write_text(LICENSED)
    student, teacher = Student.load(model_folder("llama"), check=False), Teacher.load(folder, check=False)
    match = Match(student=Head(1, 0), teacher=Head(2, 1), distance=0.1, margin=None)
    head_map = HeadMap(matches=(match,), rule="paper", one_to_one=False)
    return distill(student, teacher, head_map, PROMPTS, steps=2, batch=8, weight=0.5).student, folder


def test_what_a_card_says(trained: tuple[Student, Path], tmp_path: Path) -> None:
    student, teacher = trained
    student.save(tmp_path / "student")
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.license is None, "the student's own base states none"
    for said in (
        f"| teacher | {teacher.name} (its card states: llama3.2) |",
        "| alignment | 0.5 times the sum of 1 - linear_cka (biased) over matched heads, on z |",
        "2 steps of 8 of 24 prompts",
        "L1H0~L2H1",
        "task_loss: ce_teacher",
        f"| commit of the workbench | {commit()} |",
    ):
        assert said in card.text, said
    assert str(teacher.parent) not in card.text, "where it lay says nothing elsewhere"
    assert HeadMap.load(tmp_path / "student").pairs == ((Head(1, 0), Head(2, 1)),)
    again = Student.load(tmp_path / "student", check=False)
    assert again.fingerprint() == student.fingerprint()
    again.save(tmp_path / "student")
    assert "alignment" not in (tmp_path / "student" / "README.md").read_text(), "a new save is described anew"


def test_a_table_with_intervals(trained: tuple[Student, Path]) -> None:
    frame = pd.DataFrame([{"name": "a|b", "full_accuracy": 0.5, "full_interval": (0.4, 0.6), "mean_cka": None}])
    assert trained[0].description is not None
    text = str(model_card(trained[0].description.with_results(frame)))
    assert "| name | full accuracy | full interval | mean cka |" in text
    assert "| a\\|b | 0.500 | [0.400, 0.600] | - |" in text
    other = with_results(text, [("condition", "accuracy"), ("x", "0.7")])
    assert with_results(other, [("condition", "accuracy"), ("x", "0.7")]) == other
    assert "0.500" not in other
    assert other.count("## Results") == 1
    assert other.index("## Results") < other.index("## Aligned pairs")
    assert ModelCard(other).data.to_dict() == ModelCard(text).data.to_dict()


def test_licences_are_repeated_and_never_guessed(tmp_path: Path) -> None:
    for name, content, expected in (
        ("stated", LICENSED, "llama3.2"),
        ("silent", "# A model\n", None),
        ("broken", "---\nlicense: [\n---\n", None),
        ("none", None, None),
    ):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "README.md").write_text(content)
        assert licence_of(str(tmp_path / name)) == expected, name
    for absent in ("owner/never-cached", "student", "model.gguf", "/nowhere/at/all"):
        assert licence_of(absent) is None
    assert model_card(StudentDescription(base=str(tmp_path / "stated"))).data.license == "llama3.2"
    assert model_card(StudentDescription(base="owner/name")).data.base_model == "owner/name"
    assert model_card(StudentDescription(base="student")).data.base_model is None


def test_what_is_pushed_is_what_is_saved(
    trained: tuple[Student, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, ignore_patterns: list[str]) -> None:
        sent[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        sent["left out"] = ignore_patterns

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repository, **_: sent.setdefault("made", repository))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert trained[0].push_to_hub("owner/name").endswith("/owner/name")
    trained[0].save(tmp_path / "student")
    assert sent["made"] == "owner/name"
    assert sent["left out"] == ["workbench.json"]
    assert sent["owner/name"] == {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}

    def refused(self: HfApi, *_: Any, **__: Any) -> None:
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "create_repo", refused)
    with pytest.raises(InputError, match="hf auth login"):
        trained[0].push_to_hub("owner/name")
