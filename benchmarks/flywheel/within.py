"""Within a campaign: a student that is retrained as its campaign goes, against the model that it came from.

    python -P benchmarks/flywheel/within.py [--arms NAME ...] [--seeds 10] [--turns 50] [--processes N]

Whole campaigns of the product (store, prompts, rails, decisions, distillations, duels, promotions) whose trials come
from a table. Four tasks. The arms have the same starts and noise; the first three learn from their own campaign alone:

`teacher`    the bundled 135M model as it comes proposes all turns
`retrained`  the same model, with the newest adapter trained on this very campaign from the first distillation on
`routed`     the product as it is: the teacher has the turn, the student duels it and is promoted on the evidence
`inherited`  the same, but the student was taught on campaigns about other texts (`students.py` leaves its adapter)
`taught`     that student proposes all turns
`uniform`    no model: draws from the open changes
`target`     no model: draws as the lessons of `retrained` would have its student draw

Appends one JSON line a campaign to results/within-ARM.jsonl and skips what is there, so that a run that was stopped
goes on. It also says, for each promotion and rollback, who really proposed better in the duels of the two: the mean of
max(true gain, 0) under the probabilities that both stored, by the table's truth. Meant for a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from resumed import add, stored
from sqlalchemy import text
from tasks import DOCS, TASKS
from world import Campaign as World
from world import Table, table

from overnight.agent.campaign import Campaign, parse_campaign
from overnight.agent.campaign_file import DistillSection
from overnight.agent.proposers.protocol import Answer, Ask, Proposer, ProposerContext, change_key, reply_text
from overnight.agent.proposers.registry import build_proposers
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.run import cache_folder, open_runtime, run_campaign
from overnight.distill.knowledge import Knowledge
from overnight.distill.lessons import read_lessons
from overnight.distill.objective import Objective
from overnight.store.hashing import JsonValue
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

RESULTS = Path(__file__).parent / "results"
ADAPTERS = Path(__file__).parents[2] / "build" / "flywheel"
"""Where `students.py` leaves what it trained."""
ARMS = ("teacher", "retrained", "routed", "inherited", "taught", "uniform", "target")
CHOSEN = ("python-tokens", "english-steps", "records-bpe", "algebra-steps")
"""One task of each kind of text, every setting among them."""
STUDENT = {"kind": "student", "base_model": "smollm2-135m", "mode": "score", "neighbours": False}
DISTILL = {
    "every": 2,
    "min_rows": 2,
    "min_pairs": 1,
    "min_knobs": 1,
    "max_share": 1.0,
    "holdout": 1,
    "epochs": 12,
    "batch": 16,
    "learning_rate": 2e-3,
}
"""Sixteen changes are open from a configuration, and half the campaigns end before turn 40: learn at once."""
Job = tuple[str, str, int, int, Mapping[str, Any]]


class Newest:
    """Answers with the newest adapter of its campaign: a student that is promoted as soon as it is trained."""

    def __init__(self, student: StudentProposer, adapters: Path) -> None:
        self.name = student.name
        self._student, self._adapters = student, adapters

    def propose(self, ask: Ask) -> Answer:
        """See `Proposer.propose`."""
        made = sorted((int(each.name[1:]), each) for each in self._adapters.glob("v*"))
        student = self._student.with_adapter(made[-1][1].name, made[-1][1]) if made else self._student
        return student.propose(ask)

    def describe(self) -> Mapping[str, JsonValue]:
        """See `Proposer.describe`."""
        return self._student.describe()

    def close(self) -> None:
        """See `Proposer.close`."""
        self._student.close()


class Drawn:
    """Proposes without a model: draws a change by its weight, which is the same for all."""

    def __init__(self, name: str) -> None:
        self.name = name

    def weights(self, ask: Ask) -> Sequence[float]:
        """Return the weight of each open change."""
        return [1.0] * len(ask.moves)

    def propose(self, ask: Ask) -> Answer:
        """See `Proposer.propose`."""
        weights = self.weights(ask)
        total = math.fsum(weights)
        move = random.Random(f"{self.name}/{ask.seed}").choices(ask.moves, weights)[0]
        chances = {change_key(each): weight / total for each, weight in zip(ask.moves, weights, strict=True)}
        return Answer(reply=reply_text(move.knob, move.value, ""), latency_s=0.0, probabilities=chances)

    def describe(self) -> Mapping[str, JsonValue]:
        """See `Proposer.describe`."""
        return {"kind": self.name}

    def close(self) -> None:
        """Nothing is held."""


class Target(Drawn):
    """Draws as the newest distillation would have its student draw; evenly before the first."""

    def __init__(self, name: str, store: SqlStore, settings: DistillSection) -> None:
        super().__init__(name)
        self._store, self._settings = store, settings

    def weights(self, ask: Ask) -> Sequence[float]:
        """Return what was taught of each open change."""
        state, of = self._store.campaign("c"), self._settings
        assert state is not None
        known_to = (ask.iteration - 1) // of.every * of.every - (of.holdout or 0)
        lessons, _ = read_lessons(self._store, state.id, ask.menu, through=known_to)
        if not lessons:
            return super().weights(ask)
        knowledge = Knowledge(lessons, self._store.screening_sums(state.id, through=known_to), ask.menu)
        objective = Objective(name="outcome", scale=knowledge.scale(of.temperature), floor=of.floor)
        return objective.choice([knowledge.gain(ask.baseline, move) for move in ask.moves])


def campaign_of(world: World, arm: str, turns: int, student: Mapping[str, Any], folder: Path) -> Campaign:
    """Return the campaign file of a task, a start and an arm."""
    router: dict[str, Any] = {"champion": "teacher", "warmup": False, "explore": 0.0, "duel_share": 0.0}
    if arm == "taught":
        router["champion"] = "student"
    elif arm not in ("teacher", "uniform", "target"):
        router["challenger"] = "student"
    if arm in ("routed", "inherited"):
        router |= {"duel_share": 0.5, "max_latency_s": 60.0}
    taught = {"adapter": str(ADAPTERS / world.table.task.kind)} if arm in ("inherited", "taught") else {}
    cast = {"teacher": dict(student), "student": {**student, **taught}}
    more = {} if taught else {"distill": dict(DISTILL)}
    return campaign_on(world, turns, folder, proposers=cast, router=router, **more)


def campaign_on(world: World, turns: int, folder: Path, **sections: Mapping[str, Any]) -> Campaign:
    """Return the campaign file of a task and a start, with some sections of its own."""
    knobs = {
        name: {
            "type": "float" if any(isinstance(value, float) for value in values) else "int",
            "choices": list(values),
            "default": world.start[name],
            "doc": DOCS[name],
        }
        for name, values in world.table.task.setting.choices.items()
    }
    data = {
        "campaign": {"name": "c", "trainer": "scripted", "seed": world.seed},
        "metric": {"name": "val_bpb"},
        "budget": {"iterations": turns},
        "decision": {"min_gain": 0.0, "alpha": 0.05, "calibration_trials": 5, "max_trials": 5, "audit": 0.0},
        "knobs": knobs,
        **sections,
    }
    return parse_campaign(data, folder / "campaign.toml")


def measure(job: Job) -> dict[str, Any]:
    """Run one campaign."""
    arm, task, seed, turns, student = job
    world, started = World(table(task), seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        of = campaign_of(world, arm, turns, student, folder)
        store = SqlStore.open(folder / "store.db", create=True)
        context = ProposerContext(campaign_dir=folder, cache_dir=cache_folder(), menu=of.menu)
        cast: dict[str, Proposer] = build_proposers(of.file.proposers, context)
        if arm == "uniform":
            cast["teacher"] = Drawn("teacher")
        elif arm == "target":
            cast["teacher"] = Target("teacher", store, of.file.distill)
        elif arm == "retrained":
            teacher = cast["teacher"]
            assert isinstance(teacher, StudentProposer)
            cast["teacher"] = Newest(teacher, folder / "adapters" / "c")
        trainer = ScriptedTrainer(ScriptedSettings(holdout=False), fn=world.measure)
        runtime = open_runtime(of, store, trainer=trainer, proposers=cast)
        try:
            run_campaign(runtime)
        finally:
            runtime.close()
        found = {
            "arm": arm,
            "task": task,
            "seed": seed,
            "missing": curve(store, world, turns),
            "distilled": asked(store, "SELECT iteration, version, rows, wall_s, failure FROM distillations"),
            **duelled(store),
            "switches": list(switches(store, world.table)),
            "seconds": round(time.perf_counter() - started, 1),
        }
        store.close()
    return found


def asked(store: SqlStore, query: str, **values: Any) -> list[list[Any]]:
    """Return what a query finds."""
    with store.engine.connect() as connection:
        return [list(row) for row in connection.execute(text(query), values)]


def curve(store: SqlStore, world: World, turns: int) -> list[float]:
    """Return the missing gain of the configuration that is held after each turn, by the truth."""
    kept = dict(asked(store, "SELECT iteration, config_id FROM attempts WHERE outcome = 'kept'"))
    held, found = world.start, []
    for turn in range(1, turns + 1):
        if turn in kept:
            held = store.config_of(kept[turn])  # type: ignore[assignment]
        found.append(round(world.table.missing(held, world.start), 5))
    return found


def duelled(store: SqlStore) -> dict[str, Any]:
    """Return how many duels were settled, and the last e-value of a challenger, or of a predecessor on probation."""
    weighed = asked(store, "SELECT payload FROM events WHERE kind LIKE '%weighed' ORDER BY id DESC LIMIT 1")
    return {
        "duels": asked(store, "SELECT count(*) FROM duels WHERE settled_at > ''")[0][0],
        "e_value": json.loads(weighed[0][0])["e_value"] if weighed else None,
    }


def switches(store: SqlStore, tab: Table) -> Iterator[dict[str, Any]]:
    """Yield each promotion and rollback with what both sides were worth in their duels, before it and in all."""
    for turn, kind, old, new in asked(
        store, "SELECT iteration, kind, from_proposer_id, to_proposer_id FROM promotions ORDER BY id"
    ):
        worth = [
            (when, banked(store, tab, one, old, new), banked(store, tab, other, old, new))
            for when, one, other in asked(
                store, "SELECT iteration, champion_attempt_id, challenger_attempt_id FROM duels WHERE settled_at > ''"
            )
        ]
        pairs = [(when, {**one, **other}) for when, one, other in worth if {*one, *other} == {old, new}]
        yield {
            "turn": turn,
            "kind": kind,
            "duels": len(pairs),
            "old": _mean([both[old] for _, both in pairs]),
            "new": _mean([both[new] for _, both in pairs]),
            "old_before": _mean([both[old] for when, both in pairs if when <= turn]),
            "new_before": _mean([both[new] for when, both in pairs if when <= turn]),
        }


def banked(store: SqlStore, tab: Table, attempt: int | None, *whose: int) -> dict[int, float]:
    """Return an attempt's proposer with the mean true gain that its distribution banks, in shares of the metric."""
    rows = asked(
        store, "SELECT proposer_id, baseline_config_id, probabilities FROM attempts WHERE id = :id", id=attempt
    )
    if not rows or rows[0][0] not in whose or not rows[0][2]:
        return {}
    proposer, baseline_id, probabilities = rows[0]
    baseline = store.config_of(baseline_id)
    first = float(tab.truth[tab.index_of(baseline)])
    total = 0.0
    for key, chance in json.loads(probabilities).items():
        knob, _, value = key.partition("=")
        config = {**baseline, knob: json.loads(value)}
        total += chance * max((first - float(tab.truth[tab.index_of(config)])) / first, 0.0)
    return {proposer: total}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--tasks", nargs="*", choices=[task.name for task in TASKS], default=CHOSEN)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--processes", type=int, default=max((os.cpu_count() or 2) // 2, 1))
    parser.add_argument("--base", default=STUDENT["base_model"], help="a bundled model, a hub id or a folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    given.out.mkdir(parents=True, exist_ok=True)
    student = {**STUDENT, "base_model": given.base}
    with multiprocessing.get_context("spawn").Pool(given.processes, maxtasksperchild=1) as pool:
        for arm in given.arms:
            file = given.out / f"within-{arm}.jsonl"
            done = {(result["task"], result["seed"]) for result in stored(file)}
            jobs = [
                (arm, task, seed, given.turns, student)
                for seed in range(given.seeds)
                for task in given.tasks
                if (task, seed) not in done
            ]
            add(file, pool, measure, jobs)


if __name__ == "__main__":
    main()
