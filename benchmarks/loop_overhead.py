"""What the loop itself costs a turn: everything but the trial and the model call.

Runs the full menu of `campaigns/gpt354m` with the shipped ScriptedTrainer and ScriptedProposer, on a SQLite store with
LangGraph's checkpoints beside it, as `overnight run` does. Prints one JSON line: the median turn in the first 200 turns
and in the last 200 after `--turns` turns of history, in milliseconds, and their ratio.

    python benchmarks/loop_overhead.py --turns 10000
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

from overnight.agent.campaign import load_campaign, parse_campaign
from overnight.agent.events import Decided, Event, TrialFinished, TrialStarted
from overnight.agent.proposers.protocol import Ask, reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.run import open_runtime, run_campaign
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

WINDOW = 200
WARM_UP = 20
"""First turns left out: imports, first statements, first critical values."""


class TurnClock:
    """Takes the time of each turn, less what trials and proposals took."""

    def __init__(self) -> None:
        self.overhead_ms: list[float] = []
        self._turn = self._outside = self._since = 0.0

    def on_event(self, event: Event) -> None:
        now = time.perf_counter()
        match event:
            case TrialStarted():
                self._since = now
            case TrialFinished():
                self._outside += now - self._since
            case Decided():
                self.overhead_ms.append((now - self._turn - self._outside) * 1e3)
                self._turn, self._outside = now, 0.0


def propose(ask: Ask) -> str:
    """A change that was never tried: most of a run's prompts then look like a real campaign's."""
    draw = random.Random(ask.seed)
    knob = draw.choice(["lr", "grad_clip", "weight_decay", "beta1", "beta2"])
    low, high = ask.menu.by_name[knob].low, ask.menu.by_name[knob].high
    assert low is not None
    assert high is not None
    return reply_text(knob, draw.uniform(low, high), "a scripted draw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10_000)
    turns = parser.parse_args().turns
    data = load_campaign("gpt354m").spec()
    data |= {
        "trainer": {"steps": 60, "noise_sd": 0.001, "optimum": {"lr": 3e-4, "beta2": 0.95}},
        "budget": {"iterations": turns + WINDOW},
        "campaign": {"name": "overhead", "trainer": "scripted"},
        "proposers": {"scripted": {"kind": "random"}},
        "router": {"champion": "scripted", "explore": 0.0},
    }
    with tempfile.TemporaryDirectory() as folder:
        campaign = parse_campaign(data, Path(folder) / "campaign.toml")
        store = SqlStore.open(Path(folder) / "overhead.db", create=True)
        clock = TurnClock()
        trainer = ScriptedTrainer(ScriptedSettings.model_validate(campaign.file.trainer))
        proposers = {"scripted": ScriptedProposer("scripted", propose)}
        runtime = open_runtime(campaign, store, trainer=trainer, proposers=proposers, hooks=[clock])
        run_campaign(runtime, checkpoints=Path(folder) / "checkpoints")
        runtime.close()
        store.close()
    first = statistics.median(clock.overhead_ms[WARM_UP : WARM_UP + WINDOW])
    last = statistics.median(clock.overhead_ms[-WINDOW:])
    print(
        json.dumps(
            {
                "turns": turns,
                "first_median_ms": round(first, 2),
                "last_median_ms": round(last, 2),
                "ratio": round(last / first, 3),
                "machine": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
