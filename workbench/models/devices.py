"""Devices that a model can be put on, as torch names them."""

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
