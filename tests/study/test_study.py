"""A study on random miniatures: lambda from validation alone, cells that resume, a summary that agrees with the rows it
is made of."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from docs.tables import family_rows
from workbench import storage
from workbench.circuits.methods import ranked
from workbench.cli import main
from workbench.errors import InputError
from workbench.experiment import arms
from workbench.experiment.distill import distill, trained_heads
from workbench.experiment.recipe import RECIPES
from workbench.models.hooked_model import Student
from workbench.report.study import study_report
from workbench.study import grid
from workbench.study.config import read_study
from workbench.study.grid import Study, lineage_overlap, opened_study
from workbench.study.summary import summarise, text
from workbench.values.refs import Head
from workbench.values.statistics import mean_interval


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def value(model_folder: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """Plain values of a study; thresholds at 0 so that circuits are found in noise."""
    recipe = {
        "teacher": str(model_folder("llama", seed=1)),
        "data": {"boxes": 3, "reference_scenes": 4, "discovery_scenes": 4, "test_scenes": 5, "validation_scenes": 3},
        "discovery": {"heads": 2, "least_effect": 0.0, "confidence": 0.01},
        "training": {"steps": 4, "batch": 6, "checkpoint_every": 2, "evaluate_every": 2},
        "evaluation": {"random_circuits": 1, "curve": False},
    }
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return {
        "recipe": str(path),
        "students": {
            "short": {"source": str(model_folder("llama", seed=2, layers=2)), "teacher_layers": [0, 2]},
            "other": {"source": str(model_folder("llama", seed=3, layers=2))},
        },
        "train_scenes": [6],
        "weights": [0.1, 1.0],
        "validation_seeds": [7],
        "seeds": [1, 2],
        "conditions": ["base", "circuit_ce", "circuit_ce_random_cka", "circuit_ce_cka"],
        "anew": ["base", "circuit_ce_cka"],
    }


@pytest.fixture
def recipe(value: dict[str, Any], tmp_path: Path) -> Path:
    """The study as a file."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


@pytest.mark.slow
@pytest.mark.lengthy
def test_a_study_from_the_command_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    assert main(["study", "--recipe", str(recipe), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "short, 6 scenes" in shown
    assert "alignment" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert [(cell["student"], cell["train_scenes"]) for cell in summary["cells"]] == [("short", 6), ("other", 6)]
    for cell in summary["cells"]:
        rows = json.loads((out / cell["student"] / "scenes-6" / "results.json").read_text())
        for name, found in cell["conditions"].items():
            mine = [row for row in rows if row["condition"] == name]
            assert found["full"] == mean_interval([row["full_accuracy"] for row in mine]).to_json()
            assert len(mine) == (1 if name in ("base", "teacher") else 2)
        gain = cell["comparisons"]["circuit_ce"]["circuit_ce_cka"]["full"]["over_seeds"]["mean"]
        means = {name: cell["conditions"][name]["full"]["mean"] for name in ("circuit_ce", "circuit_ce_cka")}
        assert gain == pytest.approx(means["circuit_ce_cka"] - means["circuit_ce"])
        best = max(
            cell["validation_accuracy"], key=lambda weight: (cell["validation_accuracy"][weight][0], -float(weight))
        )
        assert cell["weight"] == float(best)
        assert set(cell["circuits_anew"]) == {"base", "circuit_ce_cka"}
        assert cell["circuits_anew"]["base"]["against_untrained"]["jaccard"] == 1.0
        assert (cell["circuits_anew"]["base"]["teacher_overlap"] is None) == (cell["student"] == "other")
    points = summary["diagnostic"]["points"]
    assert len(points) == 2 * 2 * 2
    assert not list(out.glob("*/*/weight-*/**/result.json")), "the choice of lambda never sees a test prompt"
    assert main(["report", "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "short, 6 scenes" in page
    assert "circuit_ce_cka" in page


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_to_the_same_numbers(
    value: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, students = tmp_path / "short.yaml", {"short": value["students"]["short"]}
    few = {**value, "students": students, "conditions": ["base", "circuit_ce_cka"], "anew": ["circuit_ce_cka"]}
    recipe.write_text(yaml.safe_dump(few))
    whole = Study(read_study(recipe), tmp_path / "whole")
    whole.begin(resume=False)
    whole.run()
    expected = summarise(whole)

    stopped, trained = Study(read_study(recipe), tmp_path / "stopped"), []

    def counting(run: Any, condition: str, seed: int, *, resume: bool) -> Any:
        trained.append((condition, seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return distill(run, condition, seed, resume=resume)

    for module in (arms, grid):
        monkeypatch.setattr(module, "distill", counting)
    stopped.begin(resume=False)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    with pytest.raises(InputError, match="no cell of the study"):
        summarise(Study(read_study(recipe), tmp_path / "stopped"))
    resumed = Study(read_study(recipe), tmp_path / "stopped")
    resumed.begin(resume=True)
    resumed.run()
    assert summarise(resumed) == expected
    count = 2 + 1 + 2  # two lambdas, the base once, a condition of two seeds
    assert len(trained) == count + 1, "only the one that was interrupted is begun again"


@pytest.mark.lengthy
def test_one_student_under_several_methods(
    value: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = value["students"]["short"]
    other = {
        **plain,
        "overrides": {"alignment.positions": "last", "matching": {"rule": "similarity", "one_to_one": True}},
    }
    path, searched, search = tmp_path / "methods.yaml", [], ranked.backward_search

    def counting(model: Any, *rest: Any, **settings: Any) -> Any:
        searched.append(model)
        return search(model, *rest, **settings)

    monkeypatch.setattr(ranked, "backward_search", counting)
    path.write_text(
        json.dumps(
            {
                **value,
                "students": {"plain": plain, "other": other},
                "weights": [0.5],
                "validation_seeds": [],
                "anew": [],
            }
        )
    )
    study = Study(read_study(path), tmp_path / "study")
    study.begin(resume=False)
    study.run()
    assert len(searched) == 2, "teacher and student, once each"
    assert not list((tmp_path / "study").glob("*/*/weight-*")), "a single lambda needs no choice"
    first, second = (cell["conditions"] for cell in summarise(study)["cells"])
    assert first["base"]["full"] == second["base"]["full"]
    assert first["circuit_ce"]["full"] == second["circuit_ce"]["full"], (
        "cross-entropy alone does not see how heads are aligned"
    )
    maps = [json.loads((tmp_path / "study" / name / "head_map.json").read_text()) for name in ("plain", "other")]
    assert maps[0] != maps[1]
    recipes = [
        json.loads((tmp_path / "study" / name / "run.json").read_text())["recipe"]["alignment"]["positions"]
        for name in ("plain", "other")
    ]
    assert recipes == ["own", "last"]


def test_a_few_heads_train_and_every_pair_is_aligned(value: dict[str, Any], tmp_path: Path) -> None:
    """Only the head whose ablation costs most changes, the loss is over all pairs, and the summary says how many
    train."""
    source = value["students"]["short"]["source"]
    few = {"source": source, "overrides": {"training.most": 1, "save_students": True}}
    path = tmp_path / "few.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                **value,
                "students": {"few": few},
                "weights": [0.5],
                "seeds": [1],
                "conditions": ["circuit_ce_cka"],
                "anew": [],
            }
        )
    )
    study = Study(read_study(path), tmp_path / "few")
    study.begin(resume=False)
    study.run()
    (cell,) = study.cells()
    folder = cell.run.folder
    (head,), matched = trained_heads(cell.run), [ours for ours, _ in folder.head_map().pairs]
    impacts = folder.scores("student")["ablation-accuracy"].mean()
    assert float(impacts[head.layer, head.index]) == max(float(impacts[each.layer, each.index]) for each in matched)
    before, after = Student.load(source), Student.load(folder.condition("circuit_ce_cka", 1) / "student")
    changed = [
        each
        for each in before.heads
        if not torch.equal(*(model.output_weights(each.layer)[each.index] for model in (before, after)))
    ]
    assert changed == [head]
    log = (folder.condition("circuit_ce_cka", 1) / "log.jsonl").read_text().splitlines()
    assert len(json.loads(log[-1])["ckas"]) == len(matched) > 1
    assert summarise(study)["cells"][0]["heads_trained"] == {
        "heads": 1,
        "of": 8,
        "matched": len(matched),
        "teacher_heads_used": len(folder.head_map().teacher_heads),
    }


def of_bundled_models(name: str) -> bool:
    """Those of others are made first, by commands that stand in the recipe."""
    return not any(student.source.startswith("runs/") for student in read_study(name).students.values())


BUNDLED_STUDIES = sorted(filter(of_bundled_models, (file.stem for file in (RECIPES / "studies").glob("*.yaml"))))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "study_scenes" else pytest.mark.lengthy) for name in BUNDLED_STUDIES],
)
def test_a_bundled_study_passes_what_is_checked_before_it_begins(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its first data size; the recipe's own size, which is never trained on, may be smaller than a batch."""
    config = read_study(name)
    first = next(iter(config.students))
    few = {"train_scenes": config.train_scenes[:1], "students": {first: config.students[first]}}
    study, checked = Study(replace(config, **few), tmp_path / "study"), []
    monkeypatch.setattr(grid, "match", lambda run: checked.append(run))
    study.begin(resume=False)
    study.prepare()
    assert len(checked) == 1


def test_what_a_study_refuses(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fresh ones for the results"):
        read_study(recipe, overrides={"validation_seeds": [1]})
    study = Study(read_study(recipe), tmp_path / "study")
    study.begin(resume=False)
    study.begin(resume=False)  # it holds nothing yet
    storage.write_json(study.weight_file("short", 6), {"weight": 1.0, "validation_accuracy": {}})
    with pytest.raises(InputError, match="resume it with --resume"):
        study.begin(resume=False)
    other = Study(read_study(recipe, overrides={"seeds": [3]}), tmp_path / "study")
    with pytest.raises(InputError, match="begun as another study"):
        other.begin(resume=True)
    with pytest.raises(InputError, match="evaluate_every"):
        Study(read_study(recipe, overrides={"overrides": {"data.validation_scenes": 0}}), tmp_path / "none")
    with pytest.raises(InputError, match="no study's summary"):
        study_report(tmp_path / "nothing")


GROWN: dict[str, dict[str, Any]] = {
    "a seed": {"seeds": [1, 2, 9]},
    "a data size": {"train_scenes": [6, 8]},
    "a condition": {"conditions": ["base", "circuit_ce", "circuit_ce_cka", "full_ce"]},
    "a student's condition": {"students": {"other": {"conditions": ["base", "circuit_ce", "full_ce"]}}},
    "a student": {"students": {"third": {"overrides": {"alignment.measure": "procrustes"}}}},
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "another seed first": {"seeds": [9, 1, 2]},
    "a seed that chose lambda": {"seeds": [1, 2, 5], "validation_seeds": [6]},
    "a condition less": {"conditions": ["base", "circuit_ce"]},
    "a data size before": {"train_scenes": [5, 6]},
    "another lambda": {"weights": [0.1, 0.7]},
    "another override": {"overrides": {"data.seed": 9}},
    "a student otherwise": {"students": {"other": {"overrides": {"alignment.measure": "procrustes"}}}},
    "a condition that a baseline stands for": {"students": {"twin": {"conditions": ["circuit_ce", "circuit_ce_cka"]}}},
}


@pytest.fixture
def begun(value: dict[str, Any], tmp_path: Path) -> Callable[..., Study]:
    """A study of three students in one folder, with settings changed."""
    short, other = value["students"].values()
    students = {
        "short": short,
        "other": {**other, "conditions": ["base", "circuit_ce"]},
        "twin": {**short, "baseline": "short", "conditions": ["circuit_ce_cka"]},
    }
    plain = {**value, "validation_seeds": [5], "conditions": ["base", "circuit_ce", "circuit_ce_cka"], "anew": []}

    def study(*, students_changed: dict[str, Any] | None = None, **settings: Any) -> Study:
        changed = students_changed or {}
        names = dict.fromkeys((*students, *changed))
        mine = {name: {**students.get(name, short), **changed.get(name, {})} for name in names}
        path = tmp_path / "one.yaml"
        path.write_text(json.dumps({**plain, **settings, "students": mine}))
        return Study(read_study(path), tmp_path / "study")

    return study


def settings_of(changed: dict[str, Any]) -> dict[str, Any]:
    """Those of one change, the students' by another name."""
    return {("students_changed" if name == "students" else name): value for name, value in changed.items()}


@pytest.mark.parametrize("more", GROWN)
def test_a_study_may_be_given_more_to_do(begun: Callable[..., Study], more: str) -> None:
    first = begun()
    first.begin(resume=False)
    storage.write_json(first.path / "summary.json", {})
    study = begun(**settings_of(GROWN[more]))
    study.begin(resume=True)
    assert opened_study(study.path).config == study.config
    assert len(storage.read_json(study.path / "study.json")["grown"]) == 1
    every = {
        (name, scenes, *arm)
        for name in study.config.students
        for scenes in study.config.train_scenes
        for arm in study.arms(name, scenes)
    }
    before = {(name, 6, *arm) for name in first.config.students for arm in first.arms(name, 6)}
    assert before < every
    with pytest.raises(InputError, match="may be added"):
        first.begin(resume=True)  # what has been added stays


@pytest.mark.parametrize("changed", OTHERWISE)
def test_what_a_studys_rows_rest_on_cannot_be_changed_under_it(begun: Callable[..., Study], changed: str) -> None:
    first = begun()
    first.begin(resume=False)
    storage.write_json(first.path / "summary.json", {})
    with pytest.raises(InputError, match="may be added"):
        begun(**settings_of(OTHERWISE[changed])).begin(resume=True)
    assert opened_study(first.path).config == first.config


def test_a_condition_whose_learning_rate_nobody_chose_is_not_added(begun: Callable[..., Study]) -> None:
    rates = {"learning_rates": [0.001, 0.01]}
    begun(**rates).begin(resume=False)
    more = begun(**rates, conditions=["base", "circuit_ce", "circuit_ce_cka", "full_ce"])
    storage.write_json(more.path / "summary.json", {})
    with pytest.raises(InputError, match="may be added"):
        more.begin(resume=True)


def test_what_cannot_be_run_is_refused_before_it_is_asked_for(begun: Callable[..., Study]) -> None:
    first = begun()
    first.begin(resume=False)
    storage.write_json(first.path / "summary.json", {})
    with pytest.raises(InputError):
        begun(students_changed={"third": {"overrides": {"training.batch": 10**6}}}).begin(resume=True)
    assert opened_study(first.path).config == first.config


@pytest.mark.parametrize("moment", ["before its student is saved", "while its student is saved"])
def test_a_kill_after_the_last_checkpoint_leaves_no_trial_without_its_student(
    value: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The log is whole and the training not done: resumed, it saves its student and trains nothing again."""
    path = tmp_path / "one.yaml"
    path.write_text(
        yaml.safe_dump({**value, "students": {"short": value["students"]["short"]}, "seeds": [1], "anew": []})
    )
    study = Study(read_study(path), tmp_path / "study")
    study.begin(resume=False)
    save = Student.save

    def killed(self: Student, directory: Path) -> None:
        if moment.startswith("while"):
            save(self, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(Student, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        study.run()
    monkeypatch.setattr(Student, "save", save)
    (trial,) = (tmp_path / "study").glob("*/*/weight-0.1/conditions/*")
    before = (trial / "log.jsonl").read_bytes()
    assert len(before.splitlines()) == 4, "all steps"
    assert not (trial / "training.json").exists()
    resumed = Study(read_study(path), tmp_path / "study")
    resumed.begin(resume=True)
    resumed.run()
    assert (trial / "student" / "model.safetensors").exists()
    assert (trial / "log.jsonl").read_bytes() == before
    trained = {file.parent for file in (tmp_path / "study").rglob("training.json")}
    assert trained == {file.parent for file in (tmp_path / "study").rglob("checkpoint.safetensors")}
    assert all((folder / "student" / "model.safetensors").exists() for folder in trained)


def test_whose_a_trial_is(recipe: Path, tmp_path: Path) -> None:
    """A log that was cut off, and a trial of another lambda under this one's name, are refused and not taken."""
    study = Study(read_study(recipe), tmp_path / "study")
    study.begin(resume=False)
    study.choose()
    weights = [tmp_path / "study" / "short" / "scenes-6" / name / "conditions" for name in ("weight-0.1", "weight-1")]
    study.weight_file("short", 6).unlink()
    log = next(weights[0].glob("*/log.jsonl"))
    whole = log.read_text()
    log.write_text("")
    with pytest.raises(InputError, match=r"holds 0 of the 4 steps of the training.*Put it back"):
        Study(read_study(recipe), tmp_path / "study").choose()
    log.write_text(whole)
    shutil.rmtree(weights[0])
    shutil.copytree(weights[1], weights[0])
    with pytest.raises(InputError, match=r"training.json is not of this run: another recipe"):
        Study(read_study(recipe), tmp_path / "study").choose()
    shutil.rmtree(weights[0])
    Study(read_study(recipe), tmp_path / "study").choose()
    assert study.weight_file("short", 6).exists()


def test_too_few_prompts_of_one_data_size_are_said_before_any_is_trained(recipe: Path, tmp_path: Path) -> None:
    study = Study(read_study(recipe, overrides={"train_scenes": [6, 1]}), tmp_path / "study")
    study.begin(resume=False)
    with pytest.raises(InputError, match="fewer than a batch of 6"):
        study.run()
    assert not list((tmp_path / "study").rglob("*.safetensors"))


def test_seeds_with_nothing_to_draw_repeat_nothing(value: dict[str, Any], tmp_path: Path) -> None:
    """A batch that holds all prompts: two seeds, one training; random partners are drawn all the same."""
    path, arms = tmp_path / "whole.yaml", ["circuit_ce", "circuit_ce_random_cka", "circuit_ce_cka"]
    few = {"students": {"short": value["students"]["short"]}, "weights": [1.0], "conditions": arms, "anew": []}
    overrides = {
        "training.batch": 18,
        "training.steps": 2,
        "training.evaluate_every": 2,
        "training.learning_rate": 0.01,
    }
    path.write_text(yaml.safe_dump({**value, **few, "overrides": overrides}))
    study = Study(read_study(path), tmp_path / "study")
    study.begin(resume=False)
    study.run()
    (cell,) = summarise(study)["cells"]
    assert {name: cell["conditions"][name]["repeated"] for name in arms} == dict(zip(arms, (1, 0, 1), strict=True))
    against = cell["comparisons"]["circuit_ce"]
    assert against["circuit_ce_cka"]["full"]["over_seeds"]["low"] is None
    assert len(against["circuit_ce_cka"]["full"]["per_seed_p"]) == 1
    assert len(against["circuit_ce_random_cka"]["full"]["per_seed_p"]) == 2
    assert "no interval over seeds for circuit / CE, circuit / CE + CKA:" in text(summarise(study))


def test_overlap_by_lineage_counts_the_kept_layers_alone() -> None:
    """Student layers 0, 1 came from the teacher's 0 and 2; its head L1H3 is the teacher's L2H3, and the teacher's L1H0
    was not kept."""
    ours, theirs = (Head(0, 1), Head(1, 3)), (Head(0, 1), Head(1, 0), Head(2, 0), Head(2, 3))
    assert lineage_overlap(ours, theirs, (0, 2)) == pytest.approx(2 / 3)
    assert lineage_overlap((), (Head(1, 0),), (0, 2)) == 1.0


def test_variants_of_a_method_share_their_baseline_and_the_best_gets_the_control(
    value: dict[str, Any], tmp_path: Path
) -> None:
    source, path = value["students"]["short"]["source"], tmp_path / "family.yaml"
    students = {
        "cka": {"source": source, "conditions": ["circuit_ce", "circuit_ce_cka"]},
        "causal": {"source": source, "baseline": "cka", "overrides": {"alignment.loss": "interchange"}},
    }
    family = {**value, "students": students, "seeds": [1, 2], "anew": [], "conditions": ["circuit_ce_cka"]}
    path.write_text(yaml.safe_dump({**family, "best": ["circuit_ce_random_cka"]}))
    study = Study(read_study(path), tmp_path / "family")
    study.begin(resume=False)
    assert study.unsearched() == [("causal", "teacher"), ("causal", "student")], "both students are one model"
    assert study.best(6) is None
    study.run()
    cells = {cell["student"]: cell for cell in summarise(study)["cells"]}
    ends = {name: max(map(max, cell["validation_accuracy"].values())) for name, cell in cells.items()}
    (best,) = [name for name, cell in cells.items() if cell["best"]]
    assert ends[best] == max(ends.values())
    for name, cell in cells.items():
        assert ("circuit_ce" in cell["conditions"]) == (name == "cka")
        assert ("circuit_ce_random_cka" in cell["conditions"]) == (name == best)
        gain = cell["comparisons"]["circuit_ce"]["circuit_ce_cka"]["full"]["over_seeds"]["mean"]
        plain = cells["cka"]["conditions"]["circuit_ce"]["full"]["mean"]
        rows = list(family_rows(cell, name))
        assert [row[0] for row in rows if row[0].strip("*") == name] == [f"**{name}**" if name == best else name]
        assert len(rows) == len(cell["conditions"]) - ("teacher" in cell["conditions"])
        assert gain == pytest.approx(cell["conditions"]["circuit_ce_cka"]["full"]["mean"] - plain)
    assert len(summarise(study)["diagnostic"]["points"]) == 6
    for wrong, words in (
        ({"baseline": "ckas"}, "did you mean 'cka'"),
        ({"baseline": "cka", "overrides": {"data.seed": 3}}, "differ in data.seed"),
        ({"baseline": "cka", "source": "elsewhere"}, "different models"),
    ):
        path.write_text(yaml.safe_dump({**family, "students": {**students, "causal": {**students["causal"], **wrong}}}))
        with pytest.raises(InputError, match=words):
            read_study(path)
    path.write_text(yaml.safe_dump({**family, "best": ["circuit_ce_random_cka"], "weights": [1.0]}))
    with pytest.raises(InputError, match="several `weights`"):
        read_study(path)
