"""A measured table as a world to run campaigns in: noisy trials, the project's decision rule, regret by the truth.

The truth of a configuration is its mean over the table's seeds. A trial is the truth plus noise with the covariance of
the residuals of the configurations that were measured on eight seeds, carried to the others by their distance on the
menu: configurations that are alike err alike on one seed, so pairing helps as it does with the real trainer. A trial
stands for `RUNS` of the table's very short runs, which brings its noise, beside what there is to gain, near that
of the quickstart's trials. Arms see trials only, never the table.
"""

from __future__ import annotations

import csv
import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tasks import NOISE_SEEDS, SEEDS, TASKS, Task

from overnight.agent.decide import DecisionSettings, judge, seed_order
from overnight.agent.proposers.protocol import Observation
from overnight.rails.menu import Change, Menu
from overnight.store.hashing import digest
from overnight.store.protocol import KnobTotal, PairTotal
from overnight.trainer.noise import Spread, paired_noise

HERE = Path(__file__).parent
TABLES = HERE / "tables"
SETTINGS = DecisionSettings(min_gain=0.0, alpha=0.05, calibration_trials=5, max_trials=5)
"""The rule of every arm."""
RUNS = 16
"""Runs of the table that one trial averages."""
REACH = 0.7
"""How far the residuals of a measured configuration reach, in steps of one knob's choices."""
MIDDLE = (0.35, 0.65)
"""Campaigns start between these quantiles of their table: a middling configuration."""
MOST_BY_ONE = 0.6
"""The largest share of the possible gain that one change of the start may take."""
Config = Mapping[str, int | float]


class Table:
    """One task, measured."""

    def __init__(self, task: Task, folder: Path = TABLES) -> None:
        self.task = task
        self.configs = list(task.configs())
        self.index = {digest(config): i for i, config in enumerate(self.configs)}
        metric: dict[tuple[int, int], float] = {}
        with (folder / f"{task.name}.csv").open(newline="") as file:
            for row, seed, value in csv.reader(file):
                metric[int(row), int(seed)] = float(value) if value else math.nan
        self.truth: NDArray[np.float64] = np.array(
            [np.mean([metric[i, seed] for seed in SEEDS]) for i in range(len(self.configs))]
        )
        repeated = [i for i in range(len(self.configs)) if all((i, seed) in metric for seed in NOISE_SEEDS)]
        values = np.array([[metric[i, seed] for seed in NOISE_SEEDS] for i in repeated])
        residuals = values - values.mean(axis=1, keepdims=True)
        places = self._places()
        squared = np.square(places[:, None, :] - places[repeated][None, :, :]).sum(axis=-1)
        weights = np.exp(-(squared - squared.min(axis=1, keepdims=True)) / (2 * REACH**2))
        weights /= np.sqrt(np.square(weights).sum(axis=1, keepdims=True))
        # Seven degrees of freedom around the mean of eight.
        self.field: NDArray[np.float64] = weights @ residuals / math.sqrt((len(NOISE_SEEDS) - 1) * RUNS)
        """(configurations, seeds): times normal numbers, one a seed, this is the noise of a trial."""
        self.best = float(np.nanmin(self.truth))

    def _places(self) -> NDArray[np.float64]:
        """Where each configuration lies, in steps of the knobs' choices: (configurations, knobs)."""
        choices = self.task.setting.choices
        return np.array([[choices[name].index(value) for name, value in c.items()] for c in self.configs], dtype=float)

    @cached_property
    def menu(self) -> Menu:
        """The menu; its default is the first start's and plays no part."""
        return self.task.menu(self.configs[self.starts[0]])

    @cached_property
    def starts(self) -> list[int]:
        """The middling configurations of which no single change takes more than `MOST_BY_ONE` of what there is."""
        ranks = np.argsort(np.argsort(np.where(np.isfinite(self.truth), self.truth, np.inf))) / len(self.truth)
        middling = [i for i in range(len(self.truth)) if MIDDLE[0] <= ranks[i] <= MIDDLE[1]]
        return [i for i in middling if self.reach(i) <= MOST_BY_ONE]

    def reach(self, start: int) -> float:
        """The share of the possible gain from `start` that its best single change takes."""
        best = self.truth[self.near[start]].min()
        return float((self.truth[start] - best) / (self.truth[start] - self.best))

    @cached_property
    def near(self) -> NDArray[np.int_]:
        """The rows that are one change away from each: (configurations, changes)."""
        return np.array([[self.index_of(each) for each in self._beside(config)] for config in self.configs])

    def _beside(self, config: Config) -> Iterator[dict[str, int | float]]:
        for name, values in self.task.setting.choices.items():
            for value in values:
                if value != config[name]:
                    yield {**config, name: value}

    def index_of(self, config: Mapping[str, object]) -> int:
        """The row of a configuration."""
        return self.index[digest(config)]  # type: ignore[arg-type]

    def missing(self, config: Config, start: Config) -> float:
        """Share of the possible gain from `start` that `config` still misses, by the truth."""
        held, first = self.truth[self.index_of(config)], self.truth[self.index_of(start)]
        return float((held - self.best) / (first - self.best))


@lru_cache(maxsize=64)
def table(name: str, folder: Path = TABLES) -> Table:
    """The table of a task, read once."""
    return Table(next(task for task in TASKS if task.name == name), folder)


@dataclass(slots=True)
class Pair:
    """What was measured of one (knob, value)."""

    proposed: int = 0
    kept: int = 0
    reverted: int = 0
    trials: int = 0
    gains: float = 0.0
    """The sum over trials."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One decided proposal."""

    config: dict[str, int | float]
    baseline: dict[str, int | float]
    change: Change | None
    """None when more than one knob changed."""
    outcome: str
    gain: float
    metric: float
    trials: int


@dataclass
class Campaign:
    """One simulated campaign: measures what it is given and decides as `overnight` does."""

    table: Table
    seed: int
    turns: list[Turn] = field(default_factory=list)
    trials: int = 0

    def __post_init__(self) -> None:
        rng = random.Random(f"{self.table.task.name}/{self.seed}/start")
        self.start = self.table.configs[rng.choice(self.table.starts)]
        self.baseline = dict(self.start)
        self._seeds: dict[int, NDArray[np.float64]] = {}
        self._metrics: dict[str, dict[int, float]] = {}
        self.done = {digest(self.start)}
        first = self.seed * 1000
        self._calibration = [first + i for i in range(SETTINGS.calibration_trials)]
        for seed in self._calibration:
            self.measure(self.baseline, seed)
        self.trials = 0  # calibration is the same for every arm
        self._noise = paired_noise(Spread.from_values([self._of(self.start)[s] for s in self._calibration]))
        self.pairs: dict[tuple[str, int | float], Pair] = {}

    def measure(self, config: Config, seed: int) -> float:
        """Run one trial: deterministic in (campaign, configuration, seed), as the trainer's are."""
        known = self._of(config)
        if seed not in known:
            self.trials += 1
            row = self.table.index_of(config)
            known[seed] = float(self.table.truth[row] + self.table.field[row] @ self._draws(seed))
        return known[seed]

    def _draws(self, seed: int) -> NDArray[np.float64]:
        """What is random about a seed of this campaign, the same for all configurations."""
        if seed not in self._seeds:
            rng = np.random.default_rng(_number(f"{self.table.task.name}/{self.seed}/{seed}"))
            self._seeds[seed] = rng.standard_normal(self.table.field.shape[1])
        return self._seeds[seed]

    def _of(self, config: Config) -> dict[int, float]:
        return self._metrics.setdefault(digest(config), {})

    @property
    def baseline_metric(self) -> float:
        """Mean of the baseline's trials."""
        values = self._of(self.baseline).values()
        return math.fsum(values) / len(values)

    @property
    def gain_sd(self) -> float:
        """Estimated standard deviation of one paired relative gain."""
        return self._noise.sd / abs(self.baseline_metric)

    def moves(self) -> list[Change]:
        """The legal changes of one knob whose configuration is not done with."""
        menu = self.table.menu
        return [m for m in menu.moves(self.baseline) if digest(menu.apply(self.baseline, m)) not in self.done]

    def play(self, config: Config) -> Turn:
        """Measure a proposal and decide."""
        chosen = dict(config)
        iteration = len(self.turns) + 1
        baseline = self._of(self.baseline)
        order = seed_order(sorted(baseline), iteration, SETTINGS.max_trials)
        own: dict[int, float] = {}
        while True:
            verdict = judge(own, baseline, order, noise=self._noise, settings=SETTINGS, kind="exact")
            if verdict.action != "measure":
                break
            assert verdict.seed is not None
            self.measure(self.baseline, verdict.seed)
            own[verdict.seed] = self.measure(chosen, verdict.seed)
        self.done.add(digest(chosen))
        changed = [name for name in chosen if chosen[name] != self.baseline[name]]
        change = Change(changed[0], chosen[changed[0]]) if len(changed) == 1 else None
        gain = verdict.gain or 0.0
        turn = Turn(
            chosen,
            dict(self.baseline),
            change,
            "kept" if verdict.action == "keep" else "reverted",
            gain,
            math.fsum(own.values()) / len(own),
            len(own),
        )
        self.turns.append(turn)
        if change is not None:
            pair = self.pairs.setdefault((change.knob, chosen[change.knob]), Pair())
            pair.proposed += 1
            pair.kept += turn.outcome == "kept"
            pair.reverted += turn.outcome == "reverted"
            pair.trials += len(own)
            pair.gains += gain * len(own)
        if verdict.action == "keep":
            self.baseline = chosen
        return turn

    def missing(self) -> float:
        """Share of the possible gain that the held configuration misses, by the truth."""
        return self.table.missing(self.baseline, self.start)

    def since(self, attempt_id: int) -> Iterator[Observation]:
        """What an optimizer is told: this is its `History`."""
        if attempt_id == 0:
            yield Observation(1, self.start, self._first_metric(), None)
        for number, turn in enumerate(self.turns, 2):
            if number > attempt_id:
                yield Observation(number, turn.config, turn.metric, None)

    def _first_metric(self) -> float:
        values = [self._of(self.start)[seed] for seed in self._calibration]
        return math.fsum(values) / len(values)

    def totals(self) -> list[KnobTotal]:
        """What the prompt's summary of history is made of."""
        totals = []
        for knob in self.table.menu.by_name:
            values = [
                PairTotal(
                    knob=knob,
                    new_value=f"{value}",
                    proposed=pair.proposed,
                    kept=pair.kept,
                    reverted=pair.reverted,
                    blocked=0,
                    failed=0,
                    trials=pair.trials,
                    mean_gain=pair.gains / pair.trials,
                )
                for (name, value), pair in self.pairs.items()
                if name == knob
            ]
            if values:
                values.sort(key=lambda total: -(total.mean_gain or 0.0))
                proposed, kept = sum(v.proposed for v in values), sum(v.kept for v in values)
                totals.append(
                    KnobTotal(knob=knob, proposed=proposed, kept=kept, distinct_values=len(values), values=values)
                )
        return totals


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")
