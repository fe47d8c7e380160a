"""Kill a campaign at random moments, resume it until it is done, and compare it with one that nobody disturbed.

Each run is the real command line in processes of its own: `overnight run` is started, killed by SIGKILL at a moment
drawn from the length of an undisturbed run, and started again, until it ends. At the end its history (attempts, trials,
decisions, duels, races, promotions, distillations; everything but times) must be the undisturbed one's, no process may
be left, and no file that the undisturbed run has not left too: not beside the store, not in the cache, not in TMPDIR.

The small campaigns use the shipped scripted trainer and proposers: duels, a race and a promotion among thirteen turns,
blocked replies among the answers. The real ones (`--real`) are the quickstart's trainer on the CPU with the bundled
student, a distillation and its race. One JSON line a run; the last line sums up, exit status 1 if anything differed.

    python benchmarks/kill.py --runs 300 --real 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomlkit
from sqlalchemy import create_engine

from overnight.agent.campaign import load_campaign

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "agent_tests"))
from history import history_in

SEEDS = 10
"""Different small campaigns; each run takes one in turn."""
AGAIN = 0.5
"""Chance that a run that was killed is killed once more."""
LIMIT_S = 3600.0
GONE_S = 15.0
"""The guard kills for ten seconds at most."""


def small_campaign(seed: int) -> dict[str, Any]:
    """Return a small campaign's file: two scripted proposers meet, the challenger proposes better."""
    draw = random.Random(seed)
    knobs = {f"k{i}": {"type": "float", "range": [0.1, 10.0], "scale": "log", "default": 1.0} for i in range(4)}

    def reply(low: float, high: float) -> str:
        return json.dumps(
            {"knob": draw.choice(list(knobs)), "new_value": round(draw.uniform(low, high), 4), "reason": ""}
        )

    nonsense = ["raise the rate", '{"knob": "k9", "new_value": 1, "reason": ""}', reply(20.0, 30.0)]
    return {
        "campaign": {"name": "small", "trainer": "scripted", "baseline": "fixed", "seed": seed},
        "metric": {"name": "loss"},
        "budget": {"iterations": 13},
        "decision": {"min_gain": 0.0, "audit": 0.1},
        "trainer": {"optimum": dict.fromkeys(knobs, 3.0), "noise_sd": 0.01, "seed_sd": 0.02, "sleep_s": 0.01},
        "knobs": knobs,
        "proposers": {
            "one": {"kind": "scripted", "order": "drawn", "replies": [reply(0.1, 0.6) for _ in range(20)] + nonsense},
            "two": {"kind": "scripted", "order": "drawn", "replies": [reply(2.4, 3.6) for _ in range(40)]},
            "random": {"kind": "random"},
        },
        "router": {
            "champion": "one",
            "challenger": "two",
            "controls": ["random"],
            "duel_share": 0.8,
            "alpha": 0.4,
            "warmup": False,
            "explore": 0.1,
        },
    }


def real_campaign(seed: int) -> dict[str, Any]:
    """Return the quickstart, shortened to a warm-up, a few turns and one distillation with its race."""
    spec = json.loads(json.dumps(load_campaign("quickstart").spec()))
    spec["campaign"] |= {"seed": seed, "brief": None}
    spec["budget"] |= {"iterations": 8}
    spec["trainer"] |= {"steps": 20, "val_tokens": 8192}
    spec["router"] |= {"champion": "random", "challenger": "student", "duel_share": 0.3, "max_latency_s": 600.0}
    spec["distill"] |= {"every": 6, "min_rows": 4, "min_knobs": 2, "min_pairs": 3, "max_share": 1.0, "holdout": 2}
    spec["distill"] |= {"epochs": 1, "batch": 4, "accumulation": 1}
    return without_none(spec)


def without_none(value: Any) -> Any:
    """Return plain data without the keys that are None, which TOML has no word for."""
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value


@dataclass
class Place:
    """The folder of one run, and everything that its processes may write to."""

    folder: Path
    kills: list[float] = field(default_factory=list)
    """After how many seconds of its process' life each SIGKILL came."""

    def make(self, campaign: Mapping[str, Any]) -> None:
        for name in ("mine", "tmp", "cache", "home"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "mine" / "campaign.toml").write_text(tomlkit.dumps(campaign))

    def start(self) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).with_name("overnight")), "run", "mine"]
        places = {"TMPDIR": "tmp", "OVERNIGHT_CACHE": "cache", "HOME": "home", "XDG_CACHE_HOME": "home"}
        environment = {**os.environ, **{name: str(self.folder / place) for name, place in places.items()}}
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=output, stderr=output)

    def run(self) -> float:
        """Run to the end; return the seconds that it took."""
        began = time.monotonic()
        process = self.start()
        code = process.wait(LIMIT_S)
        if code != 0:
            raise SystemExit(f"{self.folder}: exit {code}\n{(self.folder / 'output').read_text()[-3000:]}")
        return time.monotonic() - began

    def run_until(self, seconds: float) -> bool:
        """Start, and kill after so many seconds; say whether it was still running."""
        process = self.start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            self.kills.append(round(seconds, 3))
            return True
        return False

    def history(self) -> dict[str, list[Any]]:
        engine = create_engine(f"sqlite:///{self.folder / 'overnight.db'}")
        try:
            return history_in(engine)
        finally:
            engine.dispose()

    def files(self) -> list[str]:
        """Return every file below the folder but the output, by name."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path) for path in found if str(path) != "output")

    def orphans(self) -> list[str]:
        """Return the processes that are left of this run, waiting for those that are just dying."""
        ends = time.monotonic() + GONE_S
        while (left := self._left()) and time.monotonic() < ends:
            time.sleep(0.05)
        return left

    def _left(self) -> list[str]:
        left = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get("TMPDIR") == str(self.folder / "tmp")
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(" ".join(process.cmdline())[:200])
            except psutil.Error:
                continue
        return left


@dataclass
class Calm:
    """A campaign that nobody disturbed: what the others are held to."""

    seconds: float
    history: dict[str, list[Any]]
    files: list[str]


def undisturbed(folder: Path, campaign: Mapping[str, Any]) -> Calm:
    place = Place(folder)
    place.make(campaign)
    seconds = place.run()
    return Calm(seconds, place.history(), place.files())


def disturbed(folder: Path, campaign: Mapping[str, Any], calm: Calm, draw: random.Random) -> dict[str, Any]:
    """Kill at random moments and resume until done; return what differs from the calm run."""
    orphans: list[str] = []
    place = Place(folder)
    while not place.kills:  # a run that ended before its moment came begins anew
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        place.make(campaign)
        place.run_until(draw.uniform(0.0, calm.seconds))
        orphans += place.orphans()
    while draw.random() < AGAIN and place.run_until(draw.uniform(0.0, calm.seconds)):
        orphans += place.orphans()
    place.run()
    orphans += place.orphans()
    history, files = place.history(), place.files()
    wrong = {
        name: _difference(calm.history[name], rows) for name, rows in history.items() if rows != calm.history[name]
    }
    if files != calm.files:
        wrong["files"] = {"lost": sorted(set(calm.files) - set(files)), "left": sorted(set(files) - set(calm.files))}
    return {"kills": place.kills, "wrong": wrong, "orphans": orphans}


def _difference(calm: list[Any], found: list[Any]) -> dict[str, Any]:
    lost, more = Counter(calm) - Counter(found), Counter(found) - Counter(calm)
    return {"lost": [str(row)[:300] for row in lost], "more": [str(row)[:300] for row in more]}


def series(what: str, count: int, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Do so many runs of one kind, printing a line each."""
    make = small_campaign if what == "small" else real_campaign
    seeds = min(count, SEEDS if what == "small" else 1)
    calm: dict[int, Calm] = {}
    results = []
    for number in range(count):
        which = number % seeds
        if which not in calm:
            calm[which] = undisturbed(folder / f"{what}-calm-{which}", make(which))
        draw = random.Random(f"{seed}/{what}/{number}")
        place = folder / f"{what}-{number}"
        result = {"run": f"{what}-{number}", **disturbed(place, make(which), calm[which], draw)}
        print(json.dumps(result), flush=True)
        results.append(result)
        if not result["wrong"] and not result["orphans"]:
            subprocess.run(["rm", "-rf", str(place)], check=True)
    if calm:
        shown = {name: len(rows) for name, rows in calm[0].history.items()}
        print(json.dumps({"undisturbed": what, "seconds": round(calm[0].seconds, 1), "rows": shown}), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--real", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work here, and keep what differed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        results = series("small", given.runs, folder, given.seed) + series("real", given.real, folder, given.seed)
    wrong = [result["run"] for result in results if result["wrong"] or result["orphans"]]
    kills = [moment for result in results for moment in result["kills"]]
    print(json.dumps({"runs": len(results), "kills": len(kills), "differed": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
