"""What a JSON value must be, by its type: one reader for every result that is read back.

`read_typed(value, ConditionResult, what="a row of results")` gives a `ConditionResult`, or an error that names the
place: "results.json[3].full_accuracy is 'x', not a number". Numbers are strict (true is none, "3" neither); lists
become tuples where the type says so, objects become dataclasses, text becomes what has `parse` (a head).
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import InputError, nearest

WORDS: Mapping[Any, str] = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
REMEDY = "run the stage that writes it again"


class _Unfit(Exception):
    """A value that is not what it must be, and where."""


def read_typed(value: Any, kind: Any, *, what: str, beside: Sequence[str] = (), remedy: str = REMEDY) -> Any:
    """A JSON value as a type: a dataclass, a `TypedDict` (which may hold other keys, too), or what they are made of.

    `what`: the value in words; `beside`: keys of the outermost object that are for the reader alone. Errors:
    `InputError` naming the place inside it, what stands there, and the remedy.
    """
    if beside and isinstance(value, Mapping):
        value = {name: each for name, each in value.items() if name not in beside}
    try:
        return _read(value, kind, "")
    except _Unfit as unfit:
        raise InputError(f"this is not {what}: {unfit}; {remedy}.") from None
    except RecursionError:
        raise InputError(f"this is not {what}: nested too deep; {remedy}.") from None


def read_field(value: Any, name: str, *, what: str, remedy: str = REMEDY) -> Any:
    """A field of a JSON object. Errors: `InputError` where the value is no object or lacks it."""
    if not isinstance(value, Mapping) or name not in value:
        raise InputError(f"this is not {what}: it has no {name!r}; {remedy}.")
    return value[name]


def _read(value: Any, kind: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        return _read(value, arguments[0], place)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, place)
    if origin is typing.Literal:
        if isinstance(value, bool | int | str) and value in arguments:
            return value
        raise _Unfit(f"{_at(place)} is {_shown(value)}; {nearest(str(value), map(str, arguments))}")
    if kind in WORDS or kind in (None, types.NoneType):
        return _plain(value, kind, place)
    if origin is tuple or origin in (list, Sequence, typing.get_origin(Sequence[int])):
        return _items(value, origin, arguments, place)
    if origin is dict or kind is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return _mapping(value, arguments, place)
    if typing.is_typeddict(kind):
        return _typed_dict(value, kind, place)
    if hasattr(kind, "parse"):
        try:
            return kind.parse(_plain(value, str, place))
        except InputError as error:
            raise _Unfit(f"{_at(place)}: {str(error).removesuffix('.')}") from None
    return _record(value, kind, place)


def _plain(value: Any, kind: Any, place: str) -> Any:
    if kind in (None, types.NoneType):
        fits = value is None
    elif kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1023
        fits = fits or value != value
    else:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise _Unfit(f"{_at(place)} is {_shown(value)}, not {WORDS.get(kind, 'null')}")
    return float(value) if kind is float else value


def _one_of(value: Any, kinds: Sequence[Any], place: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    for kind in others[:-1]:
        try:
            return _read(value, kind, place)
        except _Unfit:
            continue
    return _read(value, others[-1], place)


def _items(value: Any, origin: Any, kinds: Sequence[Any], place: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _Unfit(f"{_at(place)} is {_shown(value)}, not a list")
    if origin is tuple and kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            raise _Unfit(f"{_at(place)} holds {len(value)} values, not {len(kinds)}")
        return tuple(
            _read(each, kind, f"{place}[{n}]") for n, (each, kind) in enumerate(zip(value, kinds, strict=True))
        )
    items = [_read(each, kinds[0], f"{place}[{number}]") for number, each in enumerate(value)]
    return tuple(items) if origin is tuple else items


def _mapping(value: Any, kinds: Sequence[Any], place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _Unfit(f"{_at(place)} is {_shown(value)}, not an object")
    inside = kinds[1] if kinds else Any
    return {str(name): _read(each, inside, f"{place}.{name}") for name, each in value.items()}


def _typed_dict(value: Any, kind: Any, place: str) -> dict[str, Any]:
    mapping = _mapping(value, (), place)
    for name, inside in typing.get_type_hints(kind).items():
        if name in mapping:
            mapping[name] = _read(mapping[name], inside, f"{place}.{name}")
        elif name in kind.__required_keys__:
            raise _Unfit(f"{_at(place)} has no {name!r}")
    return mapping


def _record(value: Any, kind: Any, place: str) -> Any:
    mapping, hints = _mapping(value, (), place), typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in mapping:
        if name not in fields:
            raise _Unfit(f"{_at(place)} has the unknown key {name!r}, {nearest(name, fields).rstrip('?')}")
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in mapping:
            raise _Unfit(f"{_at(place)} has no {name!r}")
    read = {name: _read(each, hints[name], f"{place}.{name}") for name, each in mapping.items()}
    try:
        return kind(**read)
    except InputError as error:
        raise _Unfit(f"{_at(place)}: {str(error).removesuffix('.')}") from None


def _at(place: str) -> str:
    return place.removeprefix(".") or "it"


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.60}"
