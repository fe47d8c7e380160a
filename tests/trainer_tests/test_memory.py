"""Free memory is what a trial may really take: within the container, less a reserve, at most what was asked."""

from pathlib import Path

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
