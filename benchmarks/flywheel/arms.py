"""The arms that need no language model: who proposes, by name. Each sees a campaign's trials, never the table's truth.

`cheat` is a null check and does read the truth; `others` is a cheap ceiling: it ranks changes by what they gained on
average in campaigns on the other tasks' tables, and reads no truth of its own task.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

import numpy as np

from overnight.agent.proposers.protocol import Ask
from overnight.agent.proposers.sampler import OptunaProposer, SamplerName
from overnight.rails.menu import Change
from tasks import TASKS
from world import Campaign, table

Proposal = dict[str, int | float]


class Arm(Protocol):
    """Proposes the next configuration of one campaign, or None when nothing is left."""

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Return a whole configuration."""
        ...


class RandomMove:
    """A legal, untried change, uniformly."""

    def __init__(self, name: str, seed: int) -> None:
        self._rng = random.Random(f"{name}/{seed}")

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Draw one."""
        moves = campaign.moves()
        return applied(campaign, self._rng.choice(moves)) if moves else None


class RandomConfig(RandomMove):
    """An untried configuration, uniformly."""

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Draw one."""
        return dict(self._rng.choice(campaign.table.configs))


class Optuna:
    """The project's own control, one knob at a time or free."""

    def __init__(self, sampler: SamplerName, seed: int, *, free: bool) -> None:
        moves = "free" if free else "onestep"
        self._proposer = OptunaProposer(sampler, OptunaProposer.Settings(sampler=sampler, moves=moves))
        self._free, self._seed = free, seed

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Ask it."""
        moves = campaign.moves()
        if not moves and not self._free:
            return None
        turn = len(campaign.turns)
        ask = Ask(
            iteration=turn + 1,
            prompt="",
            menu=campaign.table.menu,
            direction="min",
            baseline=campaign.baseline,
            baseline_metric=campaign.baseline_metric,
            moves=tuple(moves),
            history=campaign,
            seed=self._seed * 100_003 + turn,
        )
        if self._free:
            return self._proposer.suggest_config(ask)  # type: ignore[return-value]
        import json

        reply = json.loads(self._proposer.propose(ask).reply)
        return applied(campaign, Change(reply["knob"], reply["new_value"]))


class Cheat:
    """Reads the table: the best legal change by the truth."""

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Return it."""
        configs = [applied(campaign, move) for move in campaign.moves()]
        truth = campaign.table.truth
        return min(configs, key=lambda config: truth[campaign.table.index_of(config)], default=None)


class Others:
    """Ranks the reachable configurations by their mean standing over the other tasks with the same menu."""

    def __init__(self, campaign: Campaign) -> None:
        task = campaign.table.task
        others = [t for t in TASKS if t.setting is task.setting and t.kind != task.kind]
        standings = []
        for other in others:
            truth = table(other.name).truth
            standings.append((truth - truth.mean()) / truth.std())
        self._standing = np.mean(standings, axis=0)

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Return the best standing among the legal changes."""
        configs = [applied(campaign, move) for move in campaign.moves()]
        return min(configs, key=lambda config: self._standing[campaign.table.index_of(config)], default=None)


def applied(campaign: Campaign, change: Change) -> Proposal:
    """The baseline with one change."""
    return {**campaign.baseline, change.knob: change.value}  # type: ignore[dict-item]


ARMS: dict[str, Callable[[Campaign, int], Arm]] = {
    "random": lambda campaign, seed: RandomMove("random", seed),
    "random-again": lambda campaign, seed: RandomMove("again", seed),
    "tpe": lambda campaign, seed: Optuna("tpe", seed, free=False),
    "gp": lambda campaign, seed: Optuna("gp", seed, free=False),
    "cmaes": lambda campaign, seed: Optuna("cmaes", seed, free=False),
    "free-random": lambda campaign, seed: RandomConfig("free", seed),
    "free-tpe": lambda campaign, seed: Optuna("tpe", seed, free=True),
    "others": lambda campaign, seed: Others(campaign),
    "cheat": lambda campaign, seed: Cheat(),
}
