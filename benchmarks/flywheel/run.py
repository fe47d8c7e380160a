"""Measure the arms that need no GPU on every task, and the combined arm on the students' recorded turns.

    python -P benchmarks/flywheel/run.py [--arms NAME ...] [--seeds 20] [--turns 100] [--processes N]

Appends one JSON line a campaign to results/ARM.jsonl and skips what is there, so that a run that was stopped goes on.
`student+tpe` needs results/students-KIND.jsonl, which `students.py` makes on a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from arms import ARMS, Arm, Replay, play
from resumed import add, stored
from tasks import TASKS
from world import Campaign, table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STUDENT = "outcome-greedy"
SWITCH = 10
"""Turns after which the combined arm hands over to the optimizer, which has seen them all."""
COMBINED = "student+tpe"
SLOW = {"gp": 25, "cmaes": 50}
"""Fewer proposals of arms that take long to ask."""
Job = tuple[str, str, int, int]


@lru_cache(maxsize=1)
def recorded() -> dict[tuple[str, int], list[int]]:
    """What the greedy student proposed, by task and seed."""
    found = {}
    for file in sorted(RESULTS.glob("students-*.jsonl")):
        for result in stored(file):
            if result["arm"] == STUDENT:
                found[result["task"], result["seed"]] = result["configs"]
    return found


def measure(job: Job) -> dict[str, object]:
    """Run one campaign."""
    name, task, seed, turns = job
    campaign = Campaign(table(task), seed)
    arm: Arm
    arm = Replay(recorded()[task, seed], seed, switch=SWITCH) if name == COMBINED else ARMS[name](campaign, seed)
    return {"arm": name, **play(arm, campaign, turns)}


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", default=[*ARMS, COMBINED])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    RESULTS.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for name in given.arms:
            file = RESULTS / f"{name}.jsonl"
            done = {(result["task"], result["seed"]) for result in stored(file)}
            known = recorded() if name == COMBINED else None
            turns = min(given.turns, SLOW.get(name, given.turns))
            jobs = [
                (name, task.name, seed, turns)
                for task in TASKS
                for seed in range(given.seeds)
                if (task.name, seed) not in done and (known is None or (task.name, seed) in known)
            ]
            add(file, pool, measure, jobs)


if __name__ == "__main__":
    main()
