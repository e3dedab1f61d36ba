"""The plan of a recipe or of a study: `plan_of` puts the stages of the road together."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from workbench.distillation.loop import require_wide
from workbench.errors import InputError
from workbench.experiment import Prompts, located
from workbench.experiment.conditions import METHOD
from workbench.experiment.preflight import require_recipe, require_same_logits, training_conditions
from workbench.experiment.recipe import Recipe, parse_config, parse_recipe, read_yaml
from workbench.models import sources
from workbench.plan.costs import FLOPS, UTILISATION, Plan, StageCost
from workbench.plan.shapes import ModelShape, shape_of
from workbench.plan.stages import Road
from workbench.study.choice import method_points, other_points
from workbench.study.config import StudyConfig
from workbench.study.grid import Study
from workbench.tasks.tokenizers import same_vocabulary
from workbench.tasks.vocabulary import mixture_words, tokenizer_of, word_level_tokenizer

WORDS = (
    "Prompts were cut into words for want of the models' tokenizer; byte-pair tokens can be a few more "
    "(--tokenizer DIRECTORY)."
)
MOST = (
    "Heads, receivers and layers of a search are not known before it: each figure takes as many as the recipe allows."
)


def plan_of(
    source: str | Path,
    *,
    overrides: dict[str, Any] | None = None,
    configs: Mapping[str, str] | None = None,
    tokenizer: str | None = None,
    flops: float = FLOPS,
    utilisation: float = UTILISATION,
) -> Plan:
    """What the recipe (or study) in a file or of a name costs.

    `configs`: model -> directory with its config.json; `tokenizer`: a directory or hub id. Errors: `InputError` for a
    bad recipe, and for a model whose config can't be had.
    """
    if flops <= 0 or not 0 < utilisation <= 1:
        raise InputError("a rate is above 0 operations a second, and a share of it between 0 and 1.")
    value = read_yaml(source)
    if "students" in value:
        study = Study(parse_config(StudyConfig, value, overrides=overrides), Path())
        title, (roads, note), stages = (
            study.config.title,
            _study_roads(study, configs or {}, tokenizer),
            list[StageCost](),
        )
        stages += _study(study, roads)
    else:
        recipe = parse_recipe(value, overrides=overrides)
        road, note = _road(recipe, configs or {}, tokenizer)
        title, roads, stages = recipe.title, {"": road}, list(_recipe(road))
    first, *others = roads.values()
    models = [*first.models(), *(model for road in others for model in road.models() if model.role == "student")]
    return Plan(
        title=title,
        models=tuple(models),
        stages=tuple(stages),
        flops=flops,
        utilisation=utilisation,
        notes=(MOST, *note),
    )


def _shape(name: str, configs: Mapping[str, str]) -> ModelShape:
    return replace(shape_of(name if name in configs else located(name), configs=configs), name=name)


def _road(recipe: Recipe, configs: Mapping[str, str], tokenizer: str | None) -> tuple[Road, tuple[str, ...]]:
    if recipe.endpoint is not None:
        raise InputError(
            "a teacher behind an endpoint has no config here, so its run can't be planned; plan the recipe with a "
            "teacher that is loaded, for what the student costs."
        )
    teacher = _shape(recipe.teacher, configs)
    student = None if recipe.student is None else _shape(recipe.student, configs)
    named_tokenizer = _tokenizer(recipe, configs, tokenizer)
    if named_tokenizer is None:
        bare = replace(recipe.data.prompts, chat="none", system=None, instruction=None)
        words = replace(recipe, data=replace(recipe.data, prompts=bare), device="cpu")
        prompts, note = Prompts(words, word_level_tokenizer(mixture_words())), (WORDS,)
    else:
        ours = None if recipe.student is None else _beside(recipe.student, configs)
        at_hand = replace(recipe, device="cpu")
        if ours is None or same_vocabulary(ours, named_tokenizer):
            prompts, note = Prompts(at_hand, named_tokenizer), ()
        else:
            prompts, note = Prompts(at_hand, ours, teacher=named_tokenizer), ()
    road = Road(recipe=recipe, teacher=teacher, student=student, prompts=prompts)
    _preflight(road)
    return road, note


def _preflight(road: Road) -> None:
    """What a run of the recipe would refuse before it computes anything, as far as configs tell."""
    trained = training_conditions(road.recipe.conditions if road.student is not None else ())
    require_recipe(road.recipe, road.prompts, trained)
    if trained and road.student is not None and road.recipe.dtype == "auto":
        require_wide(getattr(torch, road.student.dtype))
    if road.student is None or not trained:
        return
    require_same_logits(road.recipe, road.prompts, trained, teacher=road.teacher.d_vocab, student=road.student.d_vocab)
    if road.recipe.save_students and not road.student.savable:
        raise InputError(
            f"a trained {road.student.name} can't be saved: its architecture keeps queries, keys and values in one "
            "matrix of its own kind; set `save_students: false`."
        )


def _tokenizer(recipe: Recipe, configs: Mapping[str, str], given: str | None) -> Any | None:
    """The given one, or one that lies beside the teacher's config."""
    if given is not None:
        return tokenizer_of(given)
    return _beside(recipe.teacher, configs)


def _beside(model: str, configs: Mapping[str, str]) -> Any | None:
    """The tokenizer that lies beside a model's config, where there is one."""
    beside = Path(configs.get(model, located(model)))
    has_one = beside.suffix == ".gguf" or any(
        (beside / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )
    return tokenizer_of(str(sources.local_directory(beside))) if has_one else None


def _recipe(road: Road) -> Iterator[StageCost]:
    """discover, match, then every condition and seed, as `workbench evaluate` runs them."""
    recipe = road.recipe
    yield from road.discovery("teacher", road.teacher)
    if road.student is None:
        return
    yield from road.discovery("student", road.student)
    yield road.match()
    yield from road.caches(recipe.conditions, len(recipe.seeds))
    for condition in recipe.conditions:
        cost = road.training(condition, len(recipe.seeds))
        if cost is not None:
            yield cost
    yield road.evaluation(len(recipe.conditions) * len(recipe.seeds))


def _study_roads(
    study: Study, configs: Mapping[str, str], tokenizer: str | None
) -> tuple[dict[str, Road], tuple[str, ...]]:
    roads = {
        name: _road(replace(study.recipe, student=student.source), configs, tokenizer)
        for name, student in study.config.students.items()
    }
    return {name: road for name, (road, _) in roads.items()}, next(iter(roads.values()))[1]


def _study(study: Study, roads: Mapping[str, Road]) -> Iterator[StageCost]:
    """Discovery of each student (of the teacher once); then for every data size the choice of lambda and all conditions
    and seeds."""
    config = study.config
    yield from next(iter(roads.values())).discovery("teacher", next(iter(roads.values())).teacher)
    for name, road in roads.items():
        assert road.student is not None
        yield from road.discovery("student", road.student, title=name)
        yield road.match(title=f"match {name}")
    for scenes in config.train_scenes:
        for name, road in roads.items():
            yield from _cell(study, name, road, scenes)


def _cell(study: Study, name: str, road: Road, scenes: int) -> Iterator[StageCost]:
    """A student at one data size: trials x steps."""
    config, recipe = study.config, replace(road.recipe, data=replace(road.recipe.data, train_scenes=scenes))
    prompts = Prompts(replace(recipe, device="cpu"), road.prompts.tokenizer, teacher=road.prompts.teacher)
    at = replace(road, recipe=recipe, prompts=prompts)
    where, seeds = f"{name}, {scenes} scenes", len(config.seeds)
    conditions = study.conditions(name, scenes)
    yield from at.caches(conditions, seeds, title=f"{where}: teacher outputs")
    trials = [*method_points(config), *other_points(config, conditions, min(config.weights))]
    for condition in dict.fromkeys(point.condition for point in trials):
        times = sum(point.condition == condition for point in trials) * len(config.validation_seeds)
        what = "lambda" if condition == METHOD else f"the learning rate of {condition}"
        cost = at.training(condition, times, title=f"{where}: choose {what}")
        if cost is not None:
            yield cost
    for condition in conditions:
        cost = at.training(condition, seeds, title=f"{where}: {condition}")
        if cost is not None:
            yield cost
    yield at.evaluation(len(study.arms(name, scenes)), title=f"{where}: evaluate")
    if scenes == config.train_scenes[0] and config.anew and at.student is not None:
        yield from at.search(f"{name} anew", at.student, repeats=len(config.anew))
