"""Methods of discovery by name: ours, and those that installed packages add as entry points of the group
`workbench.discovery`.

    [project.entry-points."workbench.discovery"]
    my_method = "my_package.methods:MyMethod"

A method is a frozen dataclass: its fields are the `options` that a recipe (`discovery.options`) or `wb.find_circuit`
sets, and it has what `workbench.circuits.methods.base.DiscoveryMethod` asks for. Ours stand in a table, so that they
are known from the source tree too, and are loaded when first used: reading a recipe needs their names alone.
"""

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ValidationError

from workbench.errors import InputError, nearest

if TYPE_CHECKING:
    from workbench.circuits.methods.base import DiscoveryMethod

GROUP = "workbench.discovery"
OURS: Mapping[str, str] = {
    "path_patching": "workbench.circuits.methods.ranked:PathPatching",
    "mean_ablation": "workbench.circuits.methods.ranked:MeanAblation",
    "eap": "workbench.circuits.methods.ranked:Eap",
    "eap_ig": "workbench.circuits.methods.ranked:EapIg",
    "relp": "workbench.circuits.methods.ranked:RelP",
    "gim": "workbench.circuits.methods.ranked:Gim",
    "greedy": "workbench.circuits.methods.greedy:Greedy",
    "elimination": "workbench.circuits.methods.eliminated:Exactly",
    "elimination_by_gates": "workbench.circuits.methods.eliminated:ByGates",
    "learned_gates": "workbench.circuits.methods.learned_gates:LearnedGates",
}
"""Name -> module and class."""


def method_names() -> list[str]:
    """The names of all methods."""
    return sorted({*OURS, *(point.name for point in entry_points(group=GROUP))})


def require_method(name: str) -> None:
    """Refuse an unknown method. Errors: `InputError` with the nearest names."""
    if name not in OURS and name not in (names := method_names()):
        raise InputError(f"no method {name!r} of finding a circuit; {nearest(str(name), names)}")


def method_named(name: str, options: Mapping[str, Any] | None = None) -> "DiscoveryMethod":
    """The method of a name with its options. Errors: `InputError` for an unknown name or option, a value that an option
    can't have, and an entry point that is no method."""
    kind = _class_of(name)
    _require_options(name, kind, options or {})
    try:
        method = kind(**(options or {}))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc'])) or name}: {each['msg']}" for each in error.errors()]
        raise InputError(f"the method {name} does not take these options ({'; '.join(wrong)}).") from None
    except TypeError as error:
        raise InputError(f"the method {name} does not take these options ({error}).") from None
    if not all(callable(getattr(method, part, None)) for part in ("find", "acts_at", "runs")):
        raise InputError(
            f"the entry point {name} of {GROUP} is no method: it needs find, acts_at and runs "
            "(workbench.circuits.methods.base.DiscoveryMethod)."
        )
    return method


def options_of(name: str) -> list[str]:
    """The names of a method's options."""
    kind = _class_of(name)
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []


def _class_of(name: str) -> Any:
    require_method(name)
    if name in OURS:
        module, kind = OURS[name].split(":")
        return getattr(importlib.import_module(module), kind)
    return next(point for point in entry_points(group=GROUP) if point.name == name).load()


def _require_options(name: str, kind: Any, options: Mapping[str, Any]) -> None:
    """Refuse an unknown option (with the nearest) and a value of another type."""
    from workbench.storage import read_typed  # here: storage loads torch, which the names need not

    types = get_type_hints(kind) if is_dataclass(kind) else {}
    for option, value in options.items():
        if types and option not in types:
            raise InputError(f"the method {name} has no option {option!r}; {nearest(option, types)}")
        if option in types:
            what, remedy = f"the option {option!r} of the method {name}", f"set {option} to what the method takes"
            read_typed(value, types[option], what=what, remedy=remedy)
