"""Recipes as they were written before, in the form of today: in files, on the command line, in `run.json` and
`study.json`.

    data.boxes                               -> data.options.boxes, of the task that has boxes
    data.chat, data.prepend_bos, ...         -> data.prompts.chat, ...
    training.weight, training.measure, ...   -> gone: a recipe's `alignment` always stood in their place
    (no evaluation.curve_scope)              -> everywhere, as it was (where a run has written it)
    teacher: assets/models/teacher, ...      -> teacher: teacher (where a run has written it; a path works too)
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from workbench.errors import InputError
from workbench.tasks.allotment import Use
from workbench.tasks.settings import PromptConfig

SCENES: Mapping[Use, int] = {"reference": 40, "discovery": 20, "train": 10, "validation": 0, "test": 80}
"""Scenes of a task, where a recipe does not say."""
BOXED = "entity_tracking"
"""The task whose number of boxes stood beside it."""
ALIGNED: Mapping[str, str] = {
    "weight": "weight",
    "estimator": "estimator",
    "measure": "measure",
    "measure_options": "options",
    "pairs": "pairs",
    "activation": "activation",
}
"""Keys of `training` that repeated those of `alignment`."""
DEFAULTS: Mapping[str, Any] = {
    "weight": 0.0,
    "estimator": "biased",
    "measure": "linear_cka",
    "measure_options": {},
    "pairs": "sum",
    "activation": "z",
}
"""What they were where nobody had set them."""


def upgraded_recipe(value: Mapping[str, Any], *, written: bool = False, set_last: bool = False) -> dict[str, Any]:
    """Plain values of a recipe of any age as those of one of today; what is not known stays, to be refused by name.

    `written`: by a run, whose repeated keys of `training` are dropped whatever they say, as they had no effect.
    `set_last`: a key of before was set on top of a recipe of today, and so has the last word. Errors: `InputError` for
    such a key of `training` that a user has set.
    """
    recipe = copy.deepcopy(dict(value))
    if isinstance(recipe.get("data"), dict):
        recipe["data"] = _upgraded_data(recipe["data"], set_last=set_last)
    _state_sizes(recipe)
    if isinstance(value.get("data"), dict):
        boxes = value["data"].get("boxes")
        if boxes is not None:
            _give_boxes(recipe.get("evaluation"), boxes)
    if written and isinstance(recipe.get("evaluation"), dict):
        recipe["evaluation"].setdefault("curve_scope", "everywhere")
    if written:
        from workbench.storage.assets import short_name  # here: storage loads torch, which reading a recipe need not

        recipe |= {
            role: short_name(recipe[role]) for role in ("teacher", "student") if isinstance(recipe.get(role), str)
        }
    if isinstance(recipe.get("training"), dict):
        for name, other in ALIGNED.items():
            if name in recipe["training"]:
                setting = recipe["training"].pop(name)
                if not written and setting != DEFAULTS[name]:
                    raise InputError(f"recipe key training.{name} has no effect; set alignment.{other} in its place.")
    return recipe


def _state_sizes(recipe: dict[str, Any]) -> None:
    """A task's sizes are written out, as they always were, so that a recipe that leaves them to their defaults equals
    the one in its run's folder."""
    data = recipe.setdefault("data", {})
    if isinstance(data, dict) and data.get("pairs") is None:
        for use, size in SCENES.items():
            if data.get(f"{use}_scenes") is None:
                data[f"{use}_scenes"] = size


def _upgraded_data(data: Mapping[str, Any], *, set_last: bool) -> dict[str, Any]:
    names = {field.name for field in fields(PromptConfig)}
    flat = {name: value for name, value in data.items() if name in names}
    settings = {name: value for name, value in data.items() if name not in names}
    if flat:
        settings["prompts"] = _merged(flat, settings.get("prompts") or {}, set_last=set_last)
    if "boxes" in settings:
        boxes = settings.pop("boxes")
        if settings.get("task", BOXED) == BOXED:
            settings["options"] = _merged({"boxes": boxes}, settings.get("options") or {}, set_last=set_last)
    return settings


def _merged(before: Mapping[str, Any], today: Mapping[str, Any], *, set_last: bool) -> dict[str, Any]:
    return {**today, **before} if set_last else {**before, **today}


def _give_boxes(evaluation: Any, boxes: Any) -> None:
    """Other tasks that trained models are evaluated on took the recipe's boxes too."""
    if isinstance(evaluation, dict):
        for other in evaluation.get("transfer") or ():
            if isinstance(other, dict) and other.get("task") == BOXED:
                other["options"] = {"boxes": boxes, **(other.get("options") or {})}
