"""Energy: counters, sampled power, and what stays unknown."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from overnight.trainer.energy import CounterMeter, Energy, PowerMeter, find_meter


def package(folder: Path, name: str, microjoules: int, most: int = 1_000_000_000) -> Path:
    path = folder / name
    path.mkdir()
    (path / "energy_uj").write_text(str(microjoules))
    (path / "max_energy_range_uj").write_text(str(most))
    return path


def test_a_counter_tells_the_difference() -> None:
    readings = iter([100.0, 142.0])
    with Energy(CounterMeter("nvml_counter", lambda: next(readings))) as energy:
        pass
    assert (energy.joules, energy.source) == (42.0, "nvml_counter")


def test_a_counter_that_wrapped_is_still_right() -> None:
    readings = iter([95.0, 3.0])
    with Energy(CounterMeter("rapl", lambda: next(readings), wrap=100.0)) as energy:
        pass
    assert energy.joules == pytest.approx(8.0)


def test_power_is_integrated_over_time() -> None:
    with Energy(PowerMeter("nvml_power", lambda: 50.0, interval_s=0.01)) as energy:
        started = time.monotonic()
        threading.Event().wait(0.2)
        elapsed = time.monotonic() - started
    assert energy.joules == pytest.approx(50.0 * elapsed, rel=0.25)


def test_power_is_sampled_outside_the_training_thread() -> None:
    threads: set[int] = set()

    def read() -> float:
        threads.add(threading.get_ident())
        return 1.0

    with Energy(PowerMeter("nvml_power", read)):
        pass
    assert threads
    assert threading.get_ident() not in threads


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 0), package(tmp_path, "intel-rapl:1", 0)
    package(tmp_path, "intel-rapl:0:0", 0)
    meter = find_meter(gpu=None, powercap=tmp_path)
    assert meter is not None
    with Energy(meter) as energy:
        (first / "energy_uj").write_text("2000000")
        (second / "energy_uj").write_text("3000000")
        (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("9000000")
    assert (energy.joules, energy.source) == (5.0, "rapl")


def test_without_a_meter_it_stays_unknown(tmp_path: Path) -> None:
    with Energy(find_meter(gpu=None, powercap=tmp_path)) as energy:
        pass
    assert (energy.joules, energy.source) == (None, None)
