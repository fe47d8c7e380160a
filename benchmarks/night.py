"""Twelve hours in minutes: a scripted night with every fault in random order, and a report that accounts for it.

The night runs on a clock that only moves when somebody sleeps or works, shared by file between real processes, one
for each life of the campaign: SIGKILL, SIGTERM and SIGHUP are the real signals, sent to the real loop. Trials take 75
to 100 seconds of that clock and run in a real trial worker, proposals come over HTTP from a real server on loopback.
The script draws when each fault comes and how long it stays, and keeps its own account of the night; the store's
account, as the report shows it, is then held against it. One JSON line; exit status 1 where the two differ.

    python benchmarks/night.py --seed 0
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import event

from overnight.agent.campaign import parse_campaign
from overnight.agent.deadline import next_until
from overnight.agent.proposers.breaker import Breaker
from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.uniform import RandomProposer
from overnight.agent.run import Heartbeat, host_trainer, open_runtime, run_campaign
from overnight.agent.signals import PauseSwitch
from overnight.report.analysis import analyse
from overnight.store.clock import running_on, utc_text
from overnight.store.errors import CampaignError
from overnight.store.records import TrialRequest, TrialResult
from overnight.store.sql_store import SqlStore
from overnight.trainer.protocol import Report
from overnight.trainer.worker import WorkerTrainer

HOURS = 12
PROPOSAL_S = 1.3
PROBE_S = 3.0
"""Two steps of a trial."""
BEAT_S = 10.0
KINDS = (
    "disk", "disk", "endpoint", "endpoint", "model", "worker", "harness", "gpu", "oom", "sigterm", "sigkill", "sigkill",
    "sighup",
)  # fmt: skip
"""Each comes once or twice, in an order that the seed draws."""
TOLERANCE_S = 60.0


class FileClock:
    """A clock in a file, so that what one process lets pass has passed for all."""

    def __init__(self, path: Path, start: float | None = None) -> None:
        if start is not None:
            path.write_bytes(struct.pack("d", start))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)
        self.on_move: Callable[[], None] = lambda: None

    def time(self) -> float:
        (now,) = struct.unpack("d", self._map[:8])
        return float(now)

    def sleep(self, seconds: float) -> None:
        self._map[:8] = struct.pack("d", self.time() + seconds)
        self.on_move()


@dataclass
class Planned:
    """A fault of the night."""

    kind: str
    at: float
    seconds: float
    """How long it stays; for a killed or stopped process, how long none runs."""

    def holds(self, now: float) -> bool:
        return self.at <= now < self.at + self.seconds


def plan(seed: int, start: float) -> list[Planned]:
    """Draw a night: the faults in random order, half an hour and more apart."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    draw.shuffle(kinds)
    step = (HOURS - 2) * 3600 / len(kinds)
    lengths = {
        "disk": (600, 1500),
        "endpoint": (900, 1800),
        "model": (900, 1800),
        "harness": (600, 1500),
        "gpu": (600, 1500),
    }
    found = []
    for number, kind in enumerate(kinds):
        low, high = lengths.get(kind, (120, 900))
        at = start + 1200 + number * step + draw.uniform(0, step / 4)
        found.append(Planned(kind, at, draw.uniform(low, min(high, step / 2))))
    return found


CAMPAIGN: dict[str, Any] = {
    "campaign": {"name": "night", "trainer": "scripted", "seed": 3},
    "metric": {"name": "loss"},
    "budget": {"iterations": 5000},
    "decision": {"min_gain": 0.0, "audit": 0.05, "calibration_trials": 3, "max_trials": 5},
    "trainer": {"optimum": {f"k{i}": 2.0 for i in range(6)}, "noise_sd": 0.01, "seed_sd": 0.02},
    "knobs": {
        f"k{i}": {"type": "float", "range": [0.1, 10.0], "scale": "log", "default": 1.0, "levels": 9} for i in range(6)
    },
    "proposers": {"chat": {"kind": "random"}, "random": {"kind": "random"}},
    "router": {"champion": "chat", "warmup": False, "explore": 0.1},
}


class NightTrainer:
    """A real trial worker whose trials take a minute and a half of the night's clock, and meet the night's faults."""

    def __init__(self, inner: WorkerTrainer, night: Night, beat: Callable[[], None]) -> None:
        self._inner, self._night, self._beat = inner, night, beat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, request: TrialRequest, report: Report) -> TrialResult:
        night, clock = self._night, self._night.clock
        if night.due("worker"):
            threading.Timer(0.0, self._kill_worker).start()
        seconds = random.Random(f"{dict(request.config)}{request.seed}{request.split}").uniform(75.0, 100.0)
        began = clock.time()
        result = self._inner.run(request, report)
        left = PROBE_S if request.max_steps is not None else seconds
        while left > 0:  # as the real link does while it waits: a beat now and then
            clock.sleep(min(left, BEAT_S))
            left -= BEAT_S
            night.check(in_trial=True)
            self._beat()
        wall_s = clock.time() - began
        now = clock.time()
        if night.now_in("harness", now):
            return replace(result, metric=None, failure="harness", trace="the driver is gone", wall_s=wall_s)
        is_baseline = all(value == 1.0 for value in request.config.values())
        if (night.now_in("gpu", now) and is_baseline) or night.due("oom"):
            return replace(result, metric=None, failure="oom", trace="CUDA out of memory", wall_s=wall_s)
        return replace(result, wall_s=wall_s)

    def _kill_worker(self) -> None:
        if self._inner.worker_pid is not None:
            for process in psutil.Process(self._inner.worker_pid).children():
                process.kill()


class NightProposer(OpenAIProposer):
    """A real endpoint's proposer whose answers take 1.3 seconds of the night's clock."""

    night: Night

    def propose(self, ask: Any) -> Any:
        if self.night.now_in("model", self.night.clock.time()):
            raise CampaignError("the model's folder is gone")
        answer = super().propose(ask)
        self.night.clock.sleep(PROPOSAL_S)
        return replace(answer, latency_s=PROPOSAL_S)


class Night:
    """One life of the campaign: the script of faults, and what this life knows of the truth."""

    def __init__(self, folder: Path, faults: list[Planned], clock: FileClock) -> None:
        self.folder, self.faults, self.clock = folder, faults, clock
        self._done = folder / "done.json"
        self.full = False
        clock.on_move = self.check

    def done(self) -> list[int]:
        return json.loads(self._done.read_text()) if self._done.exists() else []

    def _mark(self, number: int) -> None:
        self._done.write_text(json.dumps([*self.done(), number]))

    def now_in(self, kind: str, now: float) -> bool:
        return any(fault.kind == kind and fault.holds(now) for fault in self.faults)

    def due(self, kind: str) -> bool:
        """Say once that a momentary fault's time has come."""
        for number, fault in enumerate(self.faults):
            if fault.kind == kind and fault.at <= self.clock.time() and number not in self.done():
                self._mark(number)
                return True
        return False

    def check(self, *, in_trial: bool = False) -> None:
        """Do what the script says for now: a signal to this process, a disk that is full."""
        self.full = self.now_in("disk", self.clock.time())
        for number, fault in enumerate(self.faults):
            is_signal = fault.kind in ("sigterm", "sigkill", "sighup")
            if not in_trial or not is_signal or fault.at > self.clock.time() or number in self.done():
                continue
            self._mark(number)
            (self.folder / "gone").write_text(str(fault.seconds if fault.kind != "sighup" else 0.0))
            os.kill(os.getpid(), getattr(signal, fault.kind.upper()))

    def limit_pages(self, connection: Any) -> None:
        """Let SQLite itself find the disk full: no page more than there are."""
        used = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {used if self.full else 1 << 30}")


def live(folder: Path, seed: int, start: float, url: str) -> None:
    """Be one process of the night."""
    clock = FileClock(folder / "clock")
    night = Night(folder, plan(seed, start), clock)
    of = parse_campaign(CAMPAIGN, folder / "campaign.toml")
    store = SqlStore.open(folder / "night.db", create=True)
    event.listen(store.engine, "begin", night.limit_pages)
    settings = OpenAIProposer.Settings.parse("chat", {"base_url": url, "model": "m", "structured": "none"})
    chat = NightProposer("chat", settings, breaker=Breaker(url, clock=clock.time))
    chat.night = night
    switch, heartbeat = PauseSwitch(), Heartbeat()
    with running_on(clock):
        trainer: Any = NightTrainer(host_trainer(of, heartbeat), night, heartbeat)
        proposers = {"chat": chat, "random": RandomProposer("random")}
        runtime = open_runtime(of, store, trainer=trainer, proposers=proposers)
        runtime.deadline = start + HOURS * 3600
        heartbeat.runtime = runtime
        try:
            with switch.listening():
                result = run_campaign(runtime, checkpoints=folder / "checkpoints", switch=switch)
        finally:
            runtime.close()
            store.close()
    sys.exit(0 if result.finished else 9)


class Chat(BaseHTTPRequestHandler):
    """Answers like a chat model, or not at all while the script says that it is away."""

    clock: FileClock
    faults: list[Planned]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        now = self.clock.time()
        if any(fault.kind == "endpoint" and fault.holds(now) for fault in self.faults):
            self.send_error(404)
            return
        draw = random.Random(now)
        change = {"knob": f"k{draw.randrange(6)}", "new_value": round(10 ** draw.uniform(-1, 1), 4), "reason": "a draw"}
        message = {"role": "assistant", "content": json.dumps(change)}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def whole_night(folder: Path, seed: int) -> dict[str, Any]:
    """Run the night in as many processes as it takes; return what both accounts say."""
    start = next_until("19:00", datetime(2026, 11, 22, 12).timestamp())
    clock = FileClock(folder / "clock", start)
    Chat.clock, Chat.faults = clock, plan(seed, start)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    gone: Counter[str] = Counter()
    lives, began = 0, time.monotonic()
    while True:
        lives += 1
        command = [sys.executable, "-P", __file__, "--live", str(folder), str(seed), str(start), url]
        code = subprocess.run(command, check=False).returncode
        if code == 0:
            break
        if code not in (9, -signal.SIGKILL):
            raise SystemExit(f"a life of the night ended with {code}")
        seconds = float((folder / "gone").read_text())
        gone["not running: cut off" if code < 0 else "not running: paused"] += seconds
        clock.sleep(seconds)
    server.shutdown()
    return judged(folder, seed, start, clock.time(), gone) | {
        "lives": lives, "took_s": round(time.monotonic() - began, 1)
    }  # fmt: skip


def judged(folder: Path, seed: int, start: float, end: float, gone: Counter[str]) -> dict[str, Any]:
    store = SqlStore.open(folder / "night.db")
    found = analyse(store, "night")
    hours = found.hours
    assert hours is not None
    planned = Counter(fault.kind for fault in plan(seed, start))
    seen = Counter(fault.what for fault in hours.faults)
    store.close()
    wrong = []
    if abs(hours.total - (end - start)) > TOLERANCE_S:
        wrong.append(f"the account has {hours.total:.0f} s of {end - start:.0f} s")
    if end > start + HOURS * 3600:
        wrong.append("it ran past `until`")
    wrong += [
        f"{what}: {hours.seconds.get(what, 0.0):.0f} s in the report, {seconds:.0f} s in truth"
        for what, seconds in gone.items()
        if abs(hours.seconds.get(what, 0.0) - seconds) > 2 * TOLERANCE_S
    ]
    disk = sum(fault.seconds for fault in plan(seed, start) if fault.kind == "disk")
    waited = hours.seconds.get("waiting for the disk", 0.0)
    if not disk - 400 <= waited <= disk + 700:  # it begins with a write, and is looked at every five minutes
        wrong.append(f"waiting for the disk: {waited:.0f} s in the report, {disk:.0f} s in truth")
    if hours.seconds.get("the loop itself", 0.0) > TOLERANCE_S:
        wrong.append(f"{hours.seconds['the loop itself']:.0f} s are not explained")
    expected = {"storage": planned["disk"], "terminal": planned["sighup"]}
    wrong += [f"{what}: {seen[what]} rows of {count}" for what, count in expected.items() if seen[what] != count]
    wrong += [f"no row tells of {what}" for what in ("worker", "out_of_memory", "proposer:chat") if not seen[what]]
    return {
        "from": utc_text(start), "to": utc_text(end), "turns": found.stats["iterations"], "stopped": hours.stopped,
        "hours": {what: round(seconds / 3600, 3) for what, seconds in hours.seconds.items()}, "faults": dict(seen),
        "wrong": wrong,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--live", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.live:
        folder, seed, start, url = given.live
        live(Path(folder), int(seed), float(start), url)
    with tempfile.TemporaryDirectory() as folder:
        result = whole_night(Path(folder), given.seed)
    print(json.dumps({"seed": given.seed, **result}))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
