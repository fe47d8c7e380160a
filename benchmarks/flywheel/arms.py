"""The arms that need no language model: who proposes, by name. Each sees a campaign's trials, never the table's truth.

`cheat` is a null check and does read the truth; `others` is a cheap ceiling: it ranks changes by what they gained on
average in campaigns on the other tasks' tables, and reads no truth of its own task.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tasks import TASKS
from world import Campaign, Table, table

from overnight.agent.proposers.protocol import Ask
from overnight.agent.proposers.sampler import OptunaProposer, SamplerName
from overnight.rails.menu import Change

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
    """Any configuration, uniformly, tried ones too."""

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
        reply = json.loads(self._proposer.propose(ask).reply)
        return applied(campaign, Change(reply["knob"], reply["new_value"]))


class Cheat:
    """Reads the table: sets out for the best configuration that improving changes lead to."""

    def __init__(self, campaign: Campaign) -> None:
        self._reachable = reachable(campaign.table.task.name)

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Return the improving change that leads furthest."""
        tab = campaign.table
        held = tab.truth[tab.index_of(campaign.baseline)] - clear_step(tab)

        def rank(config: Proposal) -> tuple[bool, float, float]:
            row = tab.index_of(config)
            return bool(tab.truth[row] >= held), float(self._reachable[row]), float(tab.truth[row])

        return min((applied(campaign, move) for move in campaign.moves()), key=rank, default=None)


def clear_step(tab: Table) -> float:
    """An improvement that the decision rule rarely misses: a tenth of what a middling start may gain."""
    return 0.1 * float(np.median(tab.truth) - tab.best)


@lru_cache(maxsize=64)
def reachable(name: str) -> NDArray[np.float64]:
    """The best truth that clear one-knob improvements lead to, from each configuration of a task."""
    tab = table(name)
    found = tab.truth.copy()
    for row in np.argsort(tab.truth):
        for near in tab.near[row]:
            if tab.truth[near] < tab.truth[row] - clear_step(tab):
                found[row] = min(found[row], found[near])
    return found


class Replay:
    """Proposes what another arm proposed on the same campaign, then searches freely, having seen it all.

    Knowledge first, search after: the student's greedy turns, then unrestricted TPE.
    """

    def __init__(self, configs: Sequence[int], seed: int, *, switch: int) -> None:
        self._configs, self._switch = configs, switch
        self._search = Optuna("tpe", seed, free=True)

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Return the recorded proposal, or the search's."""
        turn = len(campaign.turns)
        if turn < min(self._switch, len(self._configs)):
            return dict(campaign.table.configs[self._configs[turn]])
        return self._search.propose(campaign)


class Others:
    """Ranks the reachable configurations by their mean standing over the other tasks with the same menu."""

    def __init__(self, campaign: Campaign) -> None:
        self._standing = others_standing(campaign.table)

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Return the best standing among the legal changes."""
        configs = [applied(campaign, move) for move in campaign.moves()]
        return min(configs, key=lambda config: self._standing[campaign.table.index_of(config)], default=None)


def others_standing(tab: Table) -> NDArray[np.float64]:
    """Mean standing of each configuration, in standard deviations, over the other texts' tables with the same menu."""
    others = [t for t in TASKS if t.setting is tab.task.setting and t.kind != tab.task.kind]
    truths = [table(other.name).truth for other in others]
    found: NDArray[np.float64] = np.mean([(truth - truth.mean()) / truth.std() for truth in truths], axis=0)
    return found


def play(arm: Arm, campaign: Campaign, turns: int) -> dict[str, object]:
    """Run a campaign; return its curve of missing gain, one number a proposal, and what it spent."""
    curve, started = [], time.perf_counter()
    for _ in range(turns):
        proposal = arm.propose(campaign)
        if proposal is not None:
            campaign.play(proposal)
        curve.append(round(campaign.missing(), 5))
    proposals = [tuple(sorted(turn.config.items())) for turn in campaign.turns]
    return {
        "task": campaign.table.task.name,
        "seed": campaign.seed,
        "missing": curve,
        "trials": campaign.trials,
        "repeats": len(proposals) - len(set(proposals)),
        "knobs": len({turn.change.knob for turn in campaign.turns if turn.change}),
        "seconds": round(time.perf_counter() - started, 3),
        "configs": [campaign.table.index_of(turn.config) for turn in campaign.turns],
    }


def applied(campaign: Campaign, change: Change) -> Proposal:
    """The baseline with one change."""
    return {**campaign.baseline, change.knob: change.value}  # type: ignore[dict-item]


ARMS: dict[str, Callable[[Campaign, int], Arm]] = {
    "random": lambda _campaign, seed: RandomMove("random", seed),
    "random-again": lambda _campaign, seed: RandomMove("again", seed),
    "tpe": lambda _campaign, seed: Optuna("tpe", seed, free=False),
    "gp": lambda _campaign, seed: Optuna("gp", seed, free=False),
    "cmaes": lambda _campaign, seed: Optuna("cmaes", seed, free=False),
    "free-random": lambda _campaign, seed: RandomConfig("free", seed),
    "free-tpe": lambda _campaign, seed: Optuna("tpe", seed, free=True),
    "others": lambda campaign, _seed: Others(campaign),
    "cheat": lambda campaign, _seed: Cheat(campaign),
}
