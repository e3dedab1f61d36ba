"""Settings that a caller gives by name -> a checked configuration."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import ValidationError

from workbench.errors import InputError, nearest

Config = TypeVar("Config")


def configured(kind: type[Config], settings: Mapping[str, Any], *, call: str) -> Config:
    """A configuration of these settings. Errors: `InputError` for an unknown setting (with the nearest) or value."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            raise InputError(f"{call} has no setting {name!r}; {nearest(name, known)}")
    try:
        return kind(**settings)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc'])) or call}: {each['msg']}" for each in error.errors()]
        raise InputError(f"{call}: {'; '.join(wrong)}.") from None
