"""YAML as plain values, and plain values as checked settings: each error is one line with file, line, key and remedy.

Of YAML what JSON can say, and comments: text, finite numbers of 64 bits, true and false, null, lists, and mappings with
text keys that stand once each. Dates are text. Aliases and tags are refused (a few hundred bytes of aliases are
gigabytes of values), and so is nesting beyond `DEEPEST`.
"""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from workbench.errors import InputError, nearest

DEEPEST = 40
LARGEST = 2**63
MOST_TOLD = 20
Parsed = TypeVar("Parsed")
Place = tuple[str | int, ...]


class Settings(dict[str, Any]):
    """The mapping of a YAML file, which knows the line of each key."""

    file: str = ""
    lines: Mapping[Place, int]

    def __init__(self, values: Mapping[str, Any], *, file: str, lines: Mapping[Place, int]) -> None:
        super().__init__(values)
        self.file, self.lines = file, lines


class _Loader(yaml.SafeLoader):
    """Composes nodes without aliases, and tells text from numbers as JSON does."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise _Refused(line, "aliases (*name) are not read; write the value again")
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Refused(self.peek_event().start_mark.line + 1, f"nested deeper than {DEEPEST} levels; write it flat")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


class _Refused(Exception):
    """What is wrong in a line."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


def read_yaml(path: Path) -> Settings:
    """The mapping of a YAML file. Errors: `InputError` naming file, line and remedy."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); give a YAML file.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: byte {content[error.start]:#04x} is not UTF-8; save the file as UTF-8."
        ) from None
    value, lines = _parsed(text, str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a mapping of recipe keys; write `key: value` lines.")
    return Settings(value, file=str(path), lines=lines)


def existing(source: str | Path) -> Path | None:
    """The path of what exists by this name; None where nothing does (or can: a NUL, a name too long)."""
    try:
        return Path(source) if Path(source).exists() else None
    except (OSError, ValueError):
        return None


def yaml_value(text: str, *, where: str) -> Any:
    """One value as YAML, e.g. of `--set KEY=VALUE`. Errors: `InputError` beginning with `where`."""
    return _parsed(text, where)[0]


def _parsed(text: str, where: str) -> tuple[Any, dict[Place, int]]:
    lines: dict[Place, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _plain(node, (), lines)), lines
    except _Refused as refused:
        raise InputError(f"{where}, line {refused.line}: {refused}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not YAML ({error.problem or error.context}); mend the line.") from None
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise InputError(f"{where}: not YAML ({message}); save it as plain UTF-8 text.") from None
    except RecursionError:
        raise InputError(f"{where}: nested deeper than {DEEPEST} levels; write it flat.") from None
    except ValueError as error:
        raise InputError(f"{where}: not YAML ({error}); mend it.") from None


def _plain(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return [_plain(each, (*place, number), lines) for number, each in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and tag == "map":
        return dict(_entries(node, place, lines))
    if not isinstance(node, yaml.ScalarNode):
        raise _Refused(line, f"the tag {node.tag} is not read; write plain values")
    return _scalar(tag, node.value, line)


def _entries(node: yaml.MappingNode, place: Place, lines: dict[Place, int]) -> Iterator[tuple[str, Any]]:
    known: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = _plain(key, place, {})
        if not isinstance(name, str):
            raise _Refused(line, f'the key {name!r} is no text; write it in quotes, "{name}"')
        if name in known:
            raise _Refused(line, f"the key {name!r} stands in line {known[name]} already; keep one of them")
        known[name] = line
        lines[(*place, name)] = line
        yield name, _plain(value, (*place, name), lines)


def _scalar(tag: str, text: str, line: int) -> Any:
    match tag:
        case "str":
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise _Refused(line, f"{text!r} holds half of a character; write the whole one, as UTF-8")
            return text
        case "bool":
            return text.lower() == "true"
        case "null":
            return None
        case "int" if len(text) < 40 and abs(int(text)) < LARGEST:
            return int(text)
        case "int":
            raise _Refused(line, f"{text:.30} is beyond 64 bits; write a smaller whole number")
        case "float":
            value = float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".n", "n"))
            if not math.isfinite(value):
                raise _Refused(line, f"{text} is not a finite number; write one")
            return value
        case _:
            raise _Refused(line, f"the tag !!{tag} is not read; write a plain value")


def parse_config(kind: type[Parsed], value: Mapping[str, Any], *, overrides: Mapping[str, Any] | None = None) -> Parsed:
    """Any configuration class from plain values, with dotted overrides (`{"training.steps": 20}`). Types are strict:
    true is no number and "3" neither. Errors: `InputError`, a line for each key, naming file, line, key and remedy."""
    plain = overridden(value, overrides)
    try:
        return TypeAdapter(kind).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        problems = [
            located(tuple(problem["loc"]), plain.lines, plain.file) + _explain(kind, problem)
            for problem in error.errors()
        ]
        more = [f"... and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
        raise InputError("\n".join([*problems[:MOST_TOLD], *more])) from None


def overridden(value: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> Settings:
    """A copy of plain values with dotted keys set, which goes on knowing the file and its lines. Errors: `InputError`
    for what JSON can't say, and for a key below a plain value."""
    where, lines = getattr(value, "file", ""), dict(getattr(value, "lines", {}))
    try:
        plain = _as_json(value, ())
        for key, setting in (overrides or {}).items():
            place = tuple(key.split("."))
            _set(plain, key, _as_json(setting, place))
            lines = {known: line for known, line in lines.items() if known[: len(place)] != place}
    except RecursionError:
        raise InputError(f"{where or 'the settings'}: nested too deep; write it flat.") from None
    return Settings(plain, file=where, lines=lines)


def _set(values: dict[str, Any], key: str, setting: Any) -> None:
    *above, last = key.split(".")
    if not all([*above, last]):
        raise InputError(f"the key {key!r} has an empty part; write for example training.steps.")
    for depth, name in enumerate(above):
        inside = values.get(name)
        if inside is not None and not isinstance(inside, dict):
            raise InputError(
                f"recipe key {key}: {'.'.join(above[: depth + 1])} is the plain value {inside!r:.60}, with nothing "
                f"below it; set {'.'.join(above[: depth + 1])} itself."
            )
        values = values.setdefault(name, {}) if inside is not None else _put(values, name)
    values[last] = setting


def _put(values: dict[str, Any], name: str) -> dict[str, Any]:
    values[name] = {}
    return values[name]


def _as_json(value: Any, place: Place) -> Any:
    """Plain values alone, copied. Errors: `InputError` naming the key of what JSON can't say."""
    key = ".".join(map(str, place)) or "the settings"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise InputError(f'recipe key {key}: the key {name!r} is no text; write it in quotes, "{name}".')
        return {name: _as_json(each, (*place, name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each, (*place, number)) for number, each in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= LARGEST:
        raise InputError(f"recipe key {key}: {str(value)[:30]} is beyond 64 bits; write a smaller whole number.")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"recipe key {key}: {value} is not a finite number; write one.")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"recipe key {key}: {value!r:.60} holds half of a character; write the whole one.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise InputError(f"recipe key {key}: {value!r:.60} is a {type(value).__name__}; write a plain value.")


def located(place: Place, lines: Mapping[Place, int], where: str) -> str:
    if not where:
        return ""
    known = next((lines[place[:depth]] for depth in range(len(place), 0, -1) if place[:depth] in lines), None)
    return f"{where}: " if known is None else f"{where}, line {known}: "


def _explain(kind: Any, problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown recipe key {place!r}; {nearest(str(problem['loc'][-1]), _known(kind, problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"recipe key {place} is missing; add it."
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    if given is None:
        return f"recipe key {place}: {message}; null stands there: give a value, or leave the key out."
    shown = "" if isinstance(given, Mapping | list) else f", not {json.dumps(given)[:60]}"
    if problem["type"] == "value_error" or not place:
        return f"recipe key {place}: {message}" if place else message
    return f"recipe key {place}: {message}{shown}; mend it, or leave the key out for its default."


def _known(kind: Any, place: Place) -> list[str]:
    """The keys that are known at a place of a configuration class."""
    for part in place:
        within = _dataclasses_of(kind)
        named = [field.type for each in within for field in dataclasses.fields(each) if field.name == part]
        kind = named[0] if named else kind
    return [field.name for each in _dataclasses_of(kind) for field in dataclasses.fields(each)]


def _dataclasses_of(kind: Any) -> list[Any]:
    """The dataclasses that a type is made of, itself first."""
    if dataclasses.is_dataclass(kind):
        return [kind]
    return [each for part in typing.get_args(kind) for each in _dataclasses_of(part)]
