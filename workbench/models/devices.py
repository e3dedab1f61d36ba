"""Devices that a model can be put on, as torch names them."""

from collections.abc import Mapping, Sequence

import torch

from workbench.errors import InputError


def require_device(name: str) -> None:
    """Refuse a device that torch does not know or this machine does not have, before anything is loaded."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"{name!r} is no device; give cpu, or an accelerator by its type (and number) in torch."
        ) from None
    if device.type in ("cpu", "meta"):
        return
    there = torch.get_device_module(device.type).device_count()
    if (device.index or 0) >= there:
        has = f"has {there} of its kind" if there else "has none that this build of torch can use"
        raise InputError(
            f"no device {name!r}: this machine {has}; leave the device out (cpu), or give one that is there."
        )


STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""How `accelerate` spreads a model's layers over several devices by itself."""
DeviceMap = str | dict[str, str | int]


def require_device_map(device_map: DeviceMap) -> None:
    """Refuse a map of a model's parts to devices that this machine can't follow, before anything is loaded.

    Errors: `InputError` for a device that is not there, a strategy where there is one device alone, parts on disk, and
    parts in the CPU's memory beside others on accelerators, which come and go while the model runs.
    """
    if isinstance(device_map, str):
        if device_map not in STRATEGIES:
            require_device(device_map)
        elif accelerators() < 2:
            raise InputError(
                f"device_map {device_map!r} spreads a model over several accelerators, and this machine has "
                f"{accelerators()}; leave it out and give a device, or a smaller dtype or a quantisation."
            )
        return
    if not device_map:
        raise InputError('an empty device_map places nothing; give {"": "cpu"}, or leave it out.')
    places = [_numbered(place) if isinstance(place, int) else place for place in device_map.values()]
    if "disk" in places:
        raise InputError("a device_map can't leave parts on disk, because heads are read there; give them a device.")
    for place in places:
        require_device(place)
    _refuse_mixed(places)


def require_placed(places: Mapping[str, object]) -> None:
    """Refuse what a strategy has placed outside the accelerators for want of memory. Errors: `InputError`."""
    _refuse_mixed([str(place) for place in places.values()])


def _refuse_mixed(places: Sequence[str]) -> None:
    away = {place for place in places if place in ("cpu", "disk", "meta")}
    if away and len(set(places)) > len(away):
        raise InputError(
            f"the device_map leaves parts of the model on {', '.join(sorted(away))} beside others on an accelerator; "
            "they come and go while it runs, so that no hook can read them: use more devices, a smaller dtype, a "
            "quantisation, or the CPU for all."
        )


def _numbered(place: int) -> str:
    kind = _accelerator()
    if kind is None:
        raise InputError(f"the device_map names accelerator {place}, and this machine has none; give cpu.")
    return f"{kind}:{place}"


def accelerators() -> int:
    """How many accelerators this build of torch can use."""
    kind = _accelerator()
    return 0 if kind is None else torch.get_device_module(kind).device_count()


def _accelerator() -> str | None:
    kind = torch.accelerator.current_accelerator()
    return None if kind is None else kind.type
