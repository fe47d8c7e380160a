"""What machine this is, as far as a result of somebody else's code may depend on it; opens no device."""

from __future__ import annotations

import os
import platform
from glob import glob
from pathlib import Path

_GPUS = "/proc/driver/nvidia/gpus/*/information"


def machine() -> dict[str, str]:
    """Return system, processors, GPU models and Python's version, as a trial's environment."""
    found = [_gpu_model(Path(path)) for path in sorted(glob(_GPUS))]
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        "gpus": ", ".join(found) or "none",
        "python": platform.python_version(),
    }


def _gpu_model(information: Path) -> str:
    try:
        lines = information.read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model")), "unknown")
