"""Joules that the machine used during a trial, from the best meter there is, and which one that was.

In order: NVML's energy counter, NVML's power sampled and integrated, Linux's RAPL counters, nothing. Sampling runs in a
thread of its own, so that the training thread is never held up. A counter covers the whole device or package, other
programs on it included; an unknown stays None and is never 0.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, Self

Source = Literal["nvml_counter", "nvml_power", "rapl"]
POWERCAP = Path("/sys/class/powercap")
SAMPLE_S = 0.1


class Meter(Protocol):
    """Something that tells joules used since it was started."""

    source: Source

    def start(self) -> None:
        """Begin to count."""
        ...

    def stop(self) -> float | None:
        """Return the joules since `start`, or None when the device did not tell."""
        ...


@dataclass
class CounterMeter:
    """Reads a counter of joules that only grows, before and after."""

    source: Source
    read: Callable[[], float]
    wrap: float | None = None
    """Where the counter starts again from zero, in joules."""
    _before: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Note where the counter stands."""
        self._before = self.read()

    def stop(self) -> float | None:
        """Return the joules since `start`."""
        used = self.read() - self._before
        if used < 0 and self.wrap is not None:
            used += self.wrap
        return used if used >= 0 else None


@dataclass
class PowerMeter:
    """Samples watts in a thread and integrates them by the trapezoid rule."""

    source: Source
    read: Callable[[], float]
    interval_s: float = SAMPLE_S
    _stopping: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _joules: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Begin to sample."""
        self._joules = 0.0
        self._stopping.clear()
        self._thread = threading.Thread(target=self._sample, name="energy", daemon=True)
        self._thread.start()

    def stop(self) -> float | None:
        """End sampling and return the joules."""
        assert self._thread is not None
        self._stopping.set()
        self._thread.join()
        return self._joules

    def _sample(self) -> None:
        last_time, last_watts = time.monotonic(), self.read()
        stopping = False
        while not stopping:
            stopping = self._stopping.wait(self.interval_s)
            now, watts = time.monotonic(), self.read()
            self._joules += 0.5 * (watts + last_watts) * (now - last_time)
            last_time, last_watts = now, watts


class Energy:
    """Measures one trial at a time: `with energy: ...`, then `joules` and `source`."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self.joules: float | None = None

    @property
    def source(self) -> Source | None:
        """Where `joules` comes from; None when it is unknown."""
        return self._meter.source if self._meter is not None and self.joules is not None else None

    def __enter__(self) -> Self:
        self.joules = None
        if self._meter is not None:
            self._meter.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._meter is not None:
            self.joules = self._meter.stop()


def find_meter(*, gpu: str | None, powercap: Path = POWERCAP) -> Meter | None:
    """Return the best meter for a trial on the GPU with UUID `gpu`, or on the CPU when None."""
    return _nvml_meter(gpu) if gpu is not None else _rapl_meter(powercap)


def _nvml_meter(gpu: str) -> Meter | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu if gpu.startswith("GPU-") else f"GPU-{gpu}")
    except pynvml.NVMLError:
        return None

    def counter() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    def power() -> float:
        return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1e3

    with contextlib.suppress(pynvml.NVMLError):
        counter()
        return CounterMeter("nvml_counter", counter)
    with contextlib.suppress(pynvml.NVMLError):
        power()
        return PowerMeter("nvml_power", power)
    return None


def _rapl_meter(powercap: Path) -> Meter | None:
    """Return a meter over every CPU package; only packages (`intel-rapl:0`), whose parts would count twice."""
    packages = [path for path in sorted(powercap.glob("intel-rapl:*")) if path.name.count(":") == 1]
    if not packages:
        return None
    try:
        wraps = [int((path / "max_energy_range_uj").read_text()) for path in packages]
        meters = [_package(path, wrap) for path, wrap in zip(packages, wraps, strict=True)]
        for meter in meters:
            meter.start()
    except OSError:  # readable by root only since Linux 5.10
        return None
    return _Sum(meters)


def _package(path: Path, wrap: int) -> CounterMeter:
    return CounterMeter("rapl", lambda: int((path / "energy_uj").read_text()) / 1e6, wrap / 1e6)


@dataclass
class _Sum:
    meters: list[CounterMeter]
    source: Source = "rapl"

    def start(self) -> None:
        for meter in self.meters:
            meter.start()

    def stop(self) -> float | None:
        used = list(self._used())
        return None if None in used else sum(joules for joules in used if joules is not None)

    def _used(self) -> Iterator[float | None]:
        return (meter.stop() for meter in self.meters)
