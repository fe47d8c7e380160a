"""How much memory a trial may take here: what the device has free, or the system where the two share it.

Runs in the process that holds the device, which is the trial worker. It asks torch only where the trainer has loaded
it, so that the control process and the command trainer stay without. It promises an estimate at one moment, not a
reservation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

GIB = 1 << 30
RESERVE_SHARE = 0.05
RESERVE_MAX = 2 * GIB
"""Left for the system, the display and other processes: 5% of the memory, at most 2 GiB."""
_CGROUP = Path("/sys/fs/cgroup")
_VMSTAT = Path("/proc/vmstat")


def free_memory(limit_gib: float | None) -> int:
    """Return the bytes that a trial may take: what is free less a reserve, at most `limit_gib`.

    The device's own cache is counted as free: the next trial takes it again.
    """
    free = _device_free()
    if free is None:
        free = system_free()
    return free if limit_gib is None else min(free, int(limit_gib * GIB))


def kernel_kills() -> int | None:
    """Return how many processes the kernel has killed for want of memory since it started; None where it won't say."""
    try:
        lines = _VMSTAT.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def system_free(cgroup: Path = _CGROUP) -> int:
    """Return the bytes of system memory that are free, less the reserve, within the container's own limit."""
    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    container = _container_memory(cgroup)
    if container is not None:
        free, total = min(free, container[0]), min(total, container[1])
    return _less_reserve(free, total)


def _device_free() -> int | None:
    """Return what the CUDA device has free, or None where there is none or it shares the system's memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if getattr(properties, "is_integrated", 0):
        return (
            None  # unified, as on a DGX Spark: the driver's own figure leaves out what the page cache would give back
        )
    free, total = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return _less_reserve(int(free) + int(cached), int(total))


def _less_reserve(free: int, total: int) -> int:
    return max(0, free - min(int(RESERVE_SHARE * total), RESERVE_MAX))


def _container_memory(cgroup: Path) -> tuple[int, int] | None:
    """Return (free, limit) of the control group (version 2), or None where it sets no limit."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        reclaimable = int(stat.get("inactive_file", 0))
        return max(0, int(limit) - used + reclaimable), int(limit)
    except (OSError, ValueError):
        return None
