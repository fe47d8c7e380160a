"""What the loop itself costs a turn: everything but the trial and the model call.

Runs the full menu of `campaigns/gpt354m` with the shipped ScriptedTrainer and ScriptedProposer, on a SQLite store with
LangGraph's checkpoints, the log and the live file beside it, as `overnight run` does. One campaign has `--turns` turns
of history, another has none; blocks of both alternate, so that whatever else the machine does falls on both alike.
Prints one JSON line: the median turn of each in milliseconds, their ratio, and how long one decision takes on the long
history.

    python benchmarks/loop_overhead.py --turns 10000 [--challenger]

With `--challenger` a second proposer begins a duel with the first on a quarter of the turns (`duel_share` 0.25): the
due-checks of every turn and the settling of duels are in the median then.
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
from overnight.agent.cli.watching import Watchers
from overnight.agent.events import Decided, Event, TrialFinished, TrialStarted
from overnight.agent.measure import standing
from overnight.agent.proposers.protocol import Ask, reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.run import open_runtime, run_campaign
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

BLOCKS = 10
BLOCK = 20
"""Turns in a block; the first one of each is left out: it opens statements and imports."""


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


class Loop:
    """One campaign on a store of its own."""

    def __init__(self, folder: Path, *, contested: bool) -> None:
        folder.mkdir()
        self._names = ["scripted", "other"] if contested else ["scripted"]
        router = {"champion": "scripted", "explore": 0.0, **({"challenger": "other"} if contested else {})}
        data = load_campaign("gpt354m").spec() | {
            "trainer": {"steps": 60, "noise_sd": 0.001, "optimum": {"lr": 3e-4, "beta2": 0.95}},
            "budget": {"iterations": 10**6, "gpu_hours": 1e6},  # so that what trials cost is asked before each
            "campaign": {"name": "overhead", "trainer": "scripted"},
            "proposers": {name: {"kind": "random"} for name in self._names},
            "router": router,
        }
        self._folder = folder
        self._campaign = parse_campaign(data, folder / "campaign.toml")
        self._store = SqlStore.open(folder / "overhead.db", create=True)
        self.turns = 0

    def advance(self, turns: int) -> list[float]:
        """Run some more turns; return each one's overhead in milliseconds, without the first."""
        clock = TurnClock()
        trainer = ScriptedTrainer(ScriptedSettings.model_validate(self._campaign.file.trainer))
        proposers = {name: ScriptedProposer(name, propose) for name in self._names}
        watchers = Watchers(self._campaign, str(self._folder / "overhead.db"))
        hooks = [clock, *watchers.hooks]
        runtime = open_runtime(self._campaign, self._store, trainer=trainer, proposers=proposers, hooks=hooks)
        self.turns += turns
        runtime.iterations = self.turns
        with watchers:
            run_campaign(runtime, checkpoints=self._folder / "checkpoints")
        runtime.close()
        return clock.overhead_ms[1:]

    def decide(self, repeats: int = 50) -> float:
        """Judge the last attempt from what is stored, as after an audited turn; return the median in milliseconds.

        Nothing is remembered but the audits pooled before, which a process reads once in its life.
        """
        trainer = ScriptedTrainer(ScriptedSettings.model_validate(self._campaign.file.trainer))
        proposers = {name: ScriptedProposer(name, propose) for name in self._names}
        runtime = open_runtime(self._campaign, self._store, trainer=trainer, proposers=proposers)
        runtime.info = trainer.prepare()
        state = runtime.state()
        attempt = self._store.last_attempt(state.id)
        assert attempt is not None
        standing(runtime, state, attempt)
        times = []
        for _ in range(repeats):
            runtime.trials.clear()
            runtime.own_trials.clear()
            runtime._noise_known = False  # as after an audited turn: one in twenty
            begin = time.perf_counter()
            standing(runtime, state, attempt)
            times.append((time.perf_counter() - begin) * 1e3)
        runtime.close()
        return statistics.median(times)

    def close(self) -> None:
        self._store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--challenger", action="store_true")
    arguments = parser.parse_args()
    turns, contested = arguments.turns, arguments.challenger
    with tempfile.TemporaryDirectory() as folder:
        young = Loop(Path(folder) / "young", contested=contested)
        old = Loop(Path(folder) / "old", contested=contested)
        old.advance(turns)
        young.advance(BLOCK)
        times: dict[str, list[float]] = {"young": [], "old": []}
        for _ in range(BLOCKS):
            times["young"] += young.advance(BLOCK)
            times["old"] += old.advance(BLOCK)
        decide = old.decide()
        young.close()
        old.close()
    first, last = statistics.median(times["young"]), statistics.median(times["old"])
    result = {
        "history": turns,
        "challenger": contested,
        "median_ms": round(first, 2),
        "median_ms_with_history": round(last, 2),
    }
    result |= {"ratio": round(last / first, 3), "decide_ms_with_history": round(decide, 2)}
    print(json.dumps(result | {"machine": platform.machine()}))


if __name__ == "__main__":
    main()
