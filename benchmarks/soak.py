"""Ten thousand turns in one process: does it grow, does its checkpoint file, does a turn take longer?

The full menu of `campaigns/gpt354m` with the shipped ScriptedTrainer and ScriptedProposer, on a SQLite store with
LangGraph's checkpoints beside it, as `overnight run` does. Resident memory is read after the first 500 turns and at the
end. A shared machine is not equally fast at both ends, so blocks of turns of the old campaign and of a young one
alternate at the end: their ratio is what the length of the history costs. Prints one JSON line.

    python benchmarks/soak.py --turns 10000
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from loop_overhead import propose

from overnight.agent.campaign import load_campaign, parse_campaign
from overnight.agent.events import Decided, Event
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.run import open_runtime, run_campaign
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

WARM = 500
"""Turns after which memory is taken for the first time."""
BLOCKS, BLOCK = 10, 20


class Watch:
    """Takes memory, the checkpoint file's size and the CPU time of each turn while the campaign runs."""

    def __init__(self, checkpoints: Path, done: int) -> None:
        self.turns = done
        self.rss: dict[int, int] = {}
        self.largest_file = 0
        self.cpu_ms: list[float] = []
        self._files = [checkpoints, checkpoints.with_name(f"{checkpoints.name}-wal")]
        self._cpu = time.process_time()

    def on_event(self, event: Event) -> None:
        if not isinstance(event, Decided):
            return
        now = time.process_time()
        self.cpu_ms.append((now - self._cpu) * 1e3)
        self._cpu = now
        self.turns += 1
        if self.turns % 100 == 0:
            self.rss[self.turns] = psutil.Process().memory_info().rss
            self.largest_file = max(self.largest_file, sum(f.stat().st_size for f in self._files if f.exists()))


class Soak:
    """One campaign on a store of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        data = load_campaign("gpt354m").spec() | {
            "trainer": {"steps": 60, "noise_sd": 0.001, "optimum": {"lr": 3e-4, "beta2": 0.95}},
            "budget": {"iterations": 10**6, "gpu_hours": 1e6},  # so that what trials cost is asked before each
            "campaign": {"name": "soak", "trainer": "scripted"},
            "proposers": {"scripted": {"kind": "random"}},
            "router": {"champion": "scripted", "explore": 0.0},
        }
        self._folder, self._done = folder, 0
        self._campaign = parse_campaign(data, folder / "campaign.toml")
        self._store = SqlStore.open(folder / "soak.db", create=True)

    def advance(self, turns: int) -> Watch:
        """Run some more turns in one go."""
        checkpoints = self._folder / "checkpoints"
        watch = Watch(checkpoints, self._done)
        trainer = ScriptedTrainer(ScriptedSettings.model_validate(self._campaign.file.trainer))
        proposers = {"scripted": ScriptedProposer("scripted", propose)}
        runtime = open_runtime(self._campaign, self._store, trainer=trainer, proposers=proposers, hooks=[watch])
        self._done += turns
        runtime.iterations = self._done
        run_campaign(runtime, checkpoints=checkpoints)
        runtime.close()
        return watch

    def close(self) -> None:
        self._store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10_000)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        old = Soak(Path(folder) / "old")
        long = old.advance(turns)
        seconds = time.monotonic() - began
        young = Soak(Path(folder) / "young")
        young.advance(BLOCK)
        cpu: dict[str, list[float]] = {"young": [], "old": []}
        for _ in range(BLOCKS):
            cpu["young"] += young.advance(BLOCK).cpu_ms[1:]
            cpu["old"] += old.advance(BLOCK).cpu_ms[1:]
        young.close()
        old.close()
    first, last = statistics.median(cpu["young"]), statistics.median(cpu["old"])
    warm, end = long.rss[min(WARM, turns)], long.rss[max(long.rss)]
    result = {
        "turns": turns,
        "seconds": round(seconds, 1),
        "rss_mib_after_500": round(warm / 2**20, 1),
        "rss_mib_at_the_end": round(end / 2**20, 1),
        "growth": round(end / warm - 1, 4),
        "largest_checkpoint_file_mib": round(long.largest_file / 2**20, 3),
        "cpu_ms_a_turn_young": round(first, 2),
        "cpu_ms_a_turn_old": round(last, 2),
        "ratio": round(last / first, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
