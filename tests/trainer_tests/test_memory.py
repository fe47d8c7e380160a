"""Free memory is what a trial may really take: within the container, less a reserve, at most what was asked."""

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from overnight.trainer.memory import GIB, RESERVE_MAX, free_memory, system_free


def container(folder: Path, limit: str, current: int, inactive_file: int = 0) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\n")
    return folder


def test_some_is_held_back_for_the_system(tmp_path: Path) -> None:
    assert 0 < system_free(tmp_path) < psutil.virtual_memory().available


def test_a_limit_lowers_what_is_free() -> None:
    assert free_memory(0.125) == GIB // 8


def test_a_container_s_limit_counts_its_page_cache_as_free(tmp_path: Path) -> None:
    cgroup = container(tmp_path, str(GIB), current=GIB - 1000, inactive_file=GIB // 2)
    reserve = GIB // 20
    assert system_free(cgroup) == pytest.approx(GIB // 2 + 1000 - reserve, abs=2)


@pytest.mark.parametrize("limit", ["max", "nonsense"])
def test_a_container_without_a_limit_is_the_machine(tmp_path: Path, limit: str) -> None:
    free = system_free(container(tmp_path, limit, current=0))
    assert free == pytest.approx(psutil.virtual_memory().available - RESERVE_MAX, rel=0.5)


def test_a_full_container_has_nothing_free(tmp_path: Path) -> None:
    assert system_free(container(tmp_path, "1000", current=1000)) == 0


def fake_torch(*, integrated: bool) -> SimpleNamespace:
    """Return what is asked of torch on a device with 80 GiB, 50 of them free and 6 in torch's own cache.

    A stand-in: no test machine has unified memory, and few have a device at all.
    """
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: True,
            current_device=lambda: 0,
            get_device_properties=lambda device: SimpleNamespace(is_integrated=int(integrated)),
            mem_get_info=lambda: (50 * GIB, 80 * GIB),
            memory_reserved=lambda: 7 * GIB,
            memory_allocated=lambda: 1 * GIB,
        )
    )


def test_on_a_device_it_is_what_the_device_has_free_with_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(integrated=False))
    assert free_memory(None) == 56 * GIB - RESERVE_MAX


def test_where_device_and_host_share_memory_it_is_the_system_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(integrated=True))
    assert free_memory(None) == pytest.approx(system_free(), rel=0.2)
