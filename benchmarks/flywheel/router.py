"""The router on these tasks: does it promote who proposes better, and send back who proposes worse?

    python -P benchmarks/flywheel/router.py [--seeds 10] [--turns 100] [--processes N]

Whole campaigns of the product on all twelve tables, with half of the free turns duelled. Two contestants whose order is
known beforehand, neither a language model: `uniform` draws from the open changes, `knowing` draws by what the tables
with the same menu and another text say of the configuration (as the arm `others` ranks), never by its own. At the
product's `[router] alpha` and at a bold one.

`better`            `knowing` challenges `uniform`: a promotion is right
`worse`             `uniform` challenges `knowing`: a promotion is wrong
`equal`             `uniform` challenges `uniform`: a promotion is for nothing
`installed-worse`   `uniform` was made champion by hand in the place of `knowing`: a rollback is right
`installed-better`  the other way round: a rollback is wrong

Appends one JSON line a campaign to results/router-ARM.jsonl and skips what is there.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from arms import others_standing
from resumed import add, stored
from tasks import TASKS
from within import RESULTS, Drawn, campaign_on, duelled, switches
from world import Campaign as World
from world import Table, table

from overnight.agent.proposers.protocol import Ask, Proposer
from overnight.agent.run import open_runtime, run_campaign
from overnight.agent.switching import by_hand
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

ARMS = {
    "better": ("uniform", "knowing", None),
    "worse": ("knowing", "uniform", None),
    "equal": ("uniform", "again", None),
    "installed-worse": ("knowing", "uniform", "uniform"),
    "installed-better": ("uniform", "knowing", "knowing"),
}
"""Champion, challenger, and who is promoted by hand before the first turn."""
ALPHAS = (0.05, 0.4)
"""The product's default, and what somebody would set who is content with being right more often than not."""
TEMPERATURE = 0.1
"""Of `knowing`, in standard deviations of the other tables."""


class Knowing(Drawn):
    """Draws by the other tables."""

    def __init__(self, name: str, table: Table) -> None:
        super().__init__(name)
        self._table, self._standing = table, others_standing(table)

    def weights(self, ask: Ask) -> Sequence[float]:
        """Return the weight of each open change by where its configuration stands on the other tables."""
        places = (self._table.index_of({**ask.baseline, move.knob: move.value}) for move in ask.moves)
        return [math.exp(-self._standing[place] / TEMPERATURE) for place in places]


def measure(job: tuple[str, float, str, int, int]) -> dict[str, Any]:
    """Run one campaign."""
    arm, alpha, task, seed, turns = job
    champion, challenger, installed = ARMS[arm]
    world, started = World(table(task), seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        router = {"champion": champion, "challenger": challenger, "warmup": False, "explore": 0.0, "duel_share": 0.5}
        router |= {"alpha": alpha}
        names = (champion, challenger)
        of = campaign_on(
            world, turns, Path(temporary), proposers={name: {"kind": "random"} for name in names}, router=router
        )
        cast: dict[str, Proposer] = {
            name: Knowing(name, world.table) if name == "knowing" else Drawn(name) for name in names
        }
        store = SqlStore.open(Path(temporary) / "store.db", create=True)
        trainer = ScriptedTrainer(ScriptedSettings(holdout=False), fn=world.measure)
        runtime = open_runtime(of, store, trainer=trainer, proposers=cast)
        try:
            if installed is not None:
                by_hand(runtime, runtime.state(), 0, "promote_requested", {"proposer": installed})
            run_campaign(runtime)
        finally:
            runtime.close()
        found = {
            "arm": arm,
            "alpha": alpha,
            "task": task,
            "seed": seed,
            **duelled(store),
            "switches": [each for each in switches(store, world.table) if each["turn"] > 0],
            "seconds": round(time.perf_counter() - started, 1),
        }
        store.close()
    return found


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    given.out.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for arm in given.arms:
            file = given.out / f"router-{arm}.jsonl"
            done = {(result["alpha"], result["task"], result["seed"]) for result in stored(file)}
            wanted = [(alpha, task.name, seed) for seed in range(given.seeds) for alpha in ALPHAS for task in TASKS]
            add(file, pool, measure, [(arm, *each, given.turns) for each in wanted if each not in done])


if __name__ == "__main__":
    main()
