"""What made a result: versions, commit, machine."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from workbench import __version__

PACKAGES = ("torch", "transformers", "transformer-lens", "datasets", "numpy")


def provenance() -> dict[str, Any]:
    """Versions, commit and machine, for `run.json`."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    torch = sys.modules.get("torch")  # where nothing has computed yet, it need not be loaded for this
    return {
        "versions": {"workbench": __version__, "python": platform.python_version(), **versions},
        "commit": commit(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "accelerator": _accelerator(torch) if torch else None,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def _accelerator(torch: Any) -> str | None:
    """The accelerator's own name, where there is one."""
    if not torch.accelerator.is_available():
        return None
    module = torch.get_device_module()
    return str(module.get_device_name()) if hasattr(module, "get_device_name") else module.__name__


def commit() -> str | None:
    """The commit of the source tree, with `+` when it has changes; None outside a checkout."""
    try:
        where = Path(__file__).parent
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")
