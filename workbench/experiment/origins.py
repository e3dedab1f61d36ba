"""Whose a result is: what it was made of, written into its file and checked when it is read.

An origin is a few named ingredients (a condition, a seed, a digest of weights or prompts). A file from before origins
has none and is taken as it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.distillation.config import LATER as LATER_ALIGNMENT
from workbench.distillation.config import MANNERS
from workbench.errors import InputError
from workbench.storage.hub import ORIGIN

Origin = Mapping[str, str]
KEY = ORIGIN


def require_origin(file: Path, actual: Origin | None, expected: Origin) -> None:
    """Refuse a result of another origin, naming the ingredients that differ."""
    if actual is None:
        return
    other = [name for name, value in expected.items() if actual.get(name) != value]
    if other:
        words = "; ".join(_said(name, actual.get(name), expected[name]) for name in other)
        raise InputError(
            f"{file} is not of this run: {words}. Put back the file that belongs there, delete it (and what was made "
            "of it) to have it made again, or choose another --out."
        )


def _said(name: str, actual: str | None, expected: str) -> str:
    """Digests mean nothing to a reader; names and numbers do."""
    return f"another {name}" if actual is None or len(expected) == 64 else f"{name} {actual}, not {expected}"


def digest_of(value: Any) -> str:
    """Of plain values."""
    return storage.digest(json.dumps(value, sort_keys=True))


LATER: Mapping[str, Mapping[str, Any]] = {
    "recipe": {
        "teacher_top": None,
        "teacher_quantisation": None,
        "teacher_device_map": None,
        "endpoint": None,
        "learning_rates": {},
    },
    "discovery": {"options": {}, "replacement": "mean", "resamples": 0},
    "evaluation": {"curve_scope": "everywhere", "curve_prompts": 300, "attention": "eager"},
    "training": {"attention": "eager", "answers": "whole"},
    "alignment": LATER_ALIGNMENT,
    "matching": {"compared": "activations"},
}
"""Keys of a recipe, and of its parts, that came later, at what they were before there was a choice."""


def stated(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The settings of a recipe (`recipe`), or under a key of it, as they are digested: the later ones only where they
    are set, so that a circuit or row from before is still of its recipe, and no mere manner of computing."""
    later = LATER[key]
    counted = {name: value for name, value in settings.items() if name not in MANNERS}
    return {name: value for name, value in counted.items() if name not in later or value != later[name]}


def to_metadata(origin: Origin) -> dict[str, str]:
    """For the header of a safetensors file."""
    return {KEY: json.dumps(dict(origin))}


def of_metadata(metadata: Mapping[str, str]) -> Origin | None:
    """What `to_metadata` wrote, or None."""
    return json.loads(metadata[KEY]) if KEY in metadata else None
