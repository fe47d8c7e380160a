"""How often promotion is wrong, how much better a student must be to be promoted, and how soon a bad one goes.

Simulates whole campaigns with numpy: duels drawn beforehand, gains measured with noise, banked as
`overnight.agent.evidence.Bank` does, tested by its mixture of bets, retrained challengers with shrinking shares of
alpha. `bank_all` and `Wealth` repeat `Bank` and `e_value` over arrays (tests/agent_tests/test_evidence.py holds them
equal); the gate is `overnight.agent.router` itself. Gains are in units of the noise of one pair.

    python benchmarks/promotion.py --quick          # seconds; writes nothing
    python benchmarks/promotion.py                  # minutes; writes promotion.json, promotion.md, promotion.svg here
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from overnight.agent.evidence import CAP_LEAST, CAP_QUANTILE, RECENT, WINSOR, bets, share
from overnight.agent.router import HELDOUT_ITEMS, LEAD, PROBATION_TURNS, HeldOutAnswer, check_gate, look
from overnight.trainer.noise import MIN_PRIOR_COUNT

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Rows = list[dict[str, Any]]
HERE = Path(__file__).parent
CHANGES = 30
ALPHA = 0.05
SPREADS = (1.0, 0.3, 0.1)
"""Dirichlet concentrations of policies over the changes: from spread to a few favourites."""
World = Literal["even", "harsh", "sparse", "skewed"]
WORLDS: dict[World, str] = {
    "even": "true gains normal around 0 with the noise's sd",
    "harsh": "normal around -3 with sd 3",
    "sparse": "one change in ten gains 2, the others nothing",
    "skewed": "one in ten gains 2, two in ten nothing, the others lose log-normally, 1.6 in the median",
}


def true_gains(world: World, count: int, rng: np.random.Generator) -> Floats:
    """The gains of `CHANGES` changes in each campaign."""
    shape = (count, CHANGES)
    if world == "even":
        return rng.standard_normal(shape)
    if world == "harsh":
        return 3 * rng.standard_normal(shape) - 3
    luck = rng.random(shape)
    rest = np.zeros(shape) if world == "sparse" else np.where(luck < 0.3, 0.0, -rng.lognormal(0.5, 1.2, shape))
    return np.where(luck < 0.1, 2.0, rest)


def policies(spread: float, count: int, rng: np.random.Generator) -> Floats:
    weights = rng.dirichlet(np.full(CHANGES, spread), count) + 1e-12
    return weights / weights.sum(axis=1, keepdims=True)


def equalised(weights: Floats, banks: Floats, target: Floats) -> Floats:
    """Tilt policies exponentially until each banks `target` on average (as near as its changes allow)."""
    low, high = np.full(len(weights), -200.0), np.full(len(weights), 200.0)
    top = banks.max(axis=1, keepdims=True)
    tilted = weights
    for _ in range(50):
        middle = (low + high) / 2
        tilted = weights * np.exp(middle[:, None] * (banks - np.where(middle[:, None] > 0, top, 0.0)))
        tilted = tilted / tilted.sum(axis=1, keepdims=True)
        above = (tilted * banks).sum(axis=1) > target
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return tilted


def draw(weights: Floats, rng: np.random.Generator, times: int = 1) -> Ints:
    """`times` changes from each policy."""
    steps = weights.cumsum(axis=1)
    steps[:, -1] = 1.0
    return (rng.random((len(weights), times, 1)) > steps[:, None, :]).sum(axis=2)


def bank_all(gains: Floats) -> tuple[Floats, Floats, Floats]:
    """`Bank.from_recent` for each row of gains, with `se` 1: (pull, prior mean, cap)."""
    count = gains.shape[1]
    if count < MIN_PRIOR_COUNT:
        ones = np.ones(len(gains))
        top = np.maximum(gains.max(axis=1), CAP_LEAST) if count else CAP_LEAST * ones
        return ones, 0 * ones, top
    floored = np.maximum(gains, -WINSOR)
    mean = floored.mean(axis=1)
    seen = floored.var(axis=1, ddof=1)
    variance = np.maximum(seen - 1, np.maximum(seen, 1) * np.sqrt(2 / (count - 1)))
    pull = variance / (variance + 1)
    place = int(np.ceil(CAP_QUANTILE * count)) - 1
    top = np.maximum(np.partition(floored, place, axis=1)[:, place], CAP_LEAST)
    return pull, mean, np.maximum(pull * top + (1 - pull) * mean, pull)


def items_of(challenger: Floats, champion: Floats, bank: tuple[Floats, Floats, Floats]) -> Floats:
    """`Bank.item` for each row."""
    pull, mean, cap = bank

    def banked(gain: Floats) -> Floats:
        return np.minimum(np.maximum(pull * gain + (1 - pull) * mean, 0.0), cap)

    return np.where(cap > 0, (banked(challenger) - banked(champion)) / np.where(cap > 0, cap, 1.0), 0.0)


class Wealth:
    """`e_value` for many campaigns at once."""

    def __init__(self, count: int) -> None:
        self.stakes, self.weights = bets()
        self.logs = np.zeros((count, len(self.stakes)))
        self.duels = np.zeros(count, dtype=np.int64)

    def add(self, items: Floats, where: Bools) -> None:
        self.logs[where] += np.log1p(items[where, None] * self.stakes)
        self.duels += where

    def restart(self, where: Bools) -> None:
        self.logs[where] = 0.0
        self.duels[where] = 0

    def e(self) -> Floats:
        peak = self.logs.max(axis=1)
        mixed: Floats = np.exp(peak + np.log(np.exp(self.logs - peak[:, None]) @ self.weights))
        return mixed


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How challengers come and are tested."""

    turns: int = 200
    first: int = 25
    """The turn after which the first challenger duels."""
    every: int = 25
    duel_share: float = 0.25
    """Of the turns that are free; a duel takes two, one for each side."""
    keep_lead: bool = False
    """A challenger with an e-value of `LEAD` keeps its place when the next one comes (`keeps_place`)."""


class Challengers:
    """The challengers of many campaigns: whose e-process runs, how much it may spend, who is promoted."""

    def __init__(self, rules: Rules, count: int) -> None:
        self.rules = rules
        self.wealth = Wealth(count)
        self.number = np.zeros(count, dtype=np.int64)
        self.promoted = np.zeros(count, dtype=bool)

    def arrive(self, turn: int) -> Bools:
        """Where a new challenger takes the place after this turn."""
        rules = self.rules
        if turn < rules.first or (turn - rules.first) % rules.every:
            return np.zeros(len(self.number), dtype=bool)
        new = (self.number == 0) | ~(rules.keep_lead & (self.wealth.e() >= LEAD))
        self.number += new & ((self.number == 0) | (self.wealth.duels > 0))
        self.wealth.restart(new)
        return new

    def duel(self, items: Floats, where: Bools) -> None:
        self.wealth.add(items, where & (self.number > 0))
        shares = share(ALPHA, 1) / np.square(np.maximum(self.number, 1))
        self.promoted |= (self.number > 0) & (self.wealth.e() >= 1 / shares)


def rate(hits: Bools) -> dict[str, float]:
    """The share of hits with its exact 95% interval (Clopper and Pearson 1934)."""
    n, k = len(hits), int(hits.sum())
    low = float(betaincinv(k, n - k + 1, 0.025)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 0.975)) if k < n else 1.0
    return {"share": k / n, "low": low, "high": high}


def measured(true: Floats, shared: Floats, rng: np.random.Generator) -> Floats:
    """Gains on one seed: half of a pair's variance is the baseline's, which both sides share."""
    return true + shared + np.sqrt(0.5) * rng.standard_normal(len(true))


Picks = Callable[[Floats, Floats, np.random.Generator], Floats]
"""(true gains, champion's policy, generator) -> a challenger's policy over the same changes."""


@dataclass(frozen=True)
class Outcome:
    """What happened in each campaign."""

    promoted: Bools
    heldout: Bools
    """Whether looking back alone would have promoted."""
    mean: float
    """Of the items, as a share of the cap."""
    sd: float


def campaigns(
    world: World, spread: float, picks: Picks | float, rules: Rules, *, count: int, seed: int, held: bool = False
) -> Outcome:
    """Run campaigns in which champion and challengers draw from policies over changes with fixed true gains.

    Args:
        world: how the true gains are distributed.
        spread: Dirichlet concentration of the champion's policy.
        picks: how a challenger's policy is made; a number is a challenger whose every change gains that, each anew.
        rules: how challengers come.
        count: campaigns.
        seed: of everything.
        held: also promote by looking back.
    """
    rng = np.random.default_rng(seed)
    true = true_gains(world, count, rng)
    champion = policies(spread, count, rng)
    challenger = champion
    rows = np.arange(count)
    state = Challengers(rules, count)
    gains = np.empty((count, rules.turns))
    tried = draw(champion, rng, rules.turns)
    heldout = np.zeros(count, dtype=bool)
    duel = np.zeros(count, dtype=bool)
    seen: list[Floats] = []
    for turn in range(rules.turns):
        new = state.arrive(turn)
        if new.any() and not isinstance(picks, float):
            challenger = np.where(new[:, None], picks(true, champion, rng), challenger)
            if held:
                heldout |= _looks_better(challenger, champion, tried[:, :turn], gains[:, :turn], rng)
        duel = ~duel & (rng.random(count) < rules.duel_share)
        # The bank looks at what was measured before: also on this turn it knows nothing of this turn.
        if duel.any() and turn >= rules.first:
            ours = draw(challenger, rng)[:, 0]
            shared = np.sqrt(0.5) * rng.standard_normal(count)
            one = measured(np.full(count, picks) if isinstance(picks, float) else true[rows, ours], shared, rng)
            two = measured(true[rows, tried[:, turn]], shared, rng)
            items = items_of(one, two, bank_all(gains[:, max(turn - RECENT, 0) : turn]))
            if not isinstance(picks, float):
                items[ours == tried[:, turn]] = 0.0
            state.duel(items, duel)
            seen.append(items)
        gains[:, turn] = true[rows, tried[:, turn]] + rng.standard_normal(count)
    every = np.concatenate(seen)
    return Outcome(state.promoted, heldout, float(every.mean()), float(every.std()))


def _looks_better(challenger: Floats, champion: Floats, tried: Ints, gains: Floats, rng: np.random.Generator) -> Bools:
    """`route_heldout` in each campaign: the newest fifth held out, a pick is worth the mean of what it measured."""
    count, turns = tried.shape
    items = turns // 5
    rows = np.arange(count)[:, None]
    runs, total = np.zeros((count, CHANGES)), np.zeros((count, CHANGES))
    np.add.at(runs, (rows, tried), 1.0)
    np.add.at(total, (rows, tried), gains)
    ours, theirs = draw(challenger, rng, items), draw(champion, rng, items)
    both = (runs[rows, ours] > 0) & (runs[rows, theirs] > 0)
    worth = total / np.maximum(runs, 1.0)
    better = np.where(both, worth[rows, ours] - worth[rows, theirs], 0.0).sum(axis=1) > 0
    return better & (both.sum(axis=1) >= HELDOUT_ITEMS)


def equal_bank(spread: float) -> Picks:
    """A different policy with the same mean of max(true gain, 0)."""

    def picks(true: Floats, champion: Floats, rng: np.random.Generator) -> Floats:
        banks = np.maximum(true, 0.0)
        return equalised(policies(spread, len(true), rng), banks, (champion * banks).sum(axis=1))

    return picks


def same_policy(true: Floats, champion: Floats, rng: np.random.Generator) -> Floats:  # noqa: ARG001
    return champion


DENSE = Rules(duel_share=1.0)
"""All turns are duels: a dozen for each challenger."""
LONG = Rules(first=100, every=1000, turns=500, duel_share=1.0)
"""One challenger, never retrained, that duels 200 times with the whole share of a first challenger."""


def null(count: int, seed: int) -> Rows:
    """Campaigns in which no challenger is better: how often one is promoted."""
    rows: Rows = []
    for world, champion, challenger in product(WORLDS, SPREADS, (*SPREADS, None)):
        picks = same_policy if challenger is None else equal_bank(challenger)
        row: dict[str, Any] = {"world": world, "champion": champion, "challenger": challenger}
        for name, rules in {"duels": Rules(), "lead": Rules(keep_lead=True), "dense": DENSE, "long": LONG}.items():
            found = campaigns(world, champion, picks, rules, count=count, seed=seed, held=name == "duels")
            row[name] = rate(found.promoted)
            if name == "duels":
                row["heldout"] = rate(found.heldout)
        rows.append(row)
    return rows


def plain_items(effect: float, sd: float, shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    """Items with this mean (in their sd) and this sd (as a share of the cap); a third of them are exact zeros.

    The others are normal with the mean and variance that the zeros leave to them, cut at the cap.
    """
    mean = 1.5 * effect * sd
    spread = np.sqrt(max(1.5 * (sd**2 + (effect * sd) ** 2) - mean**2, 0.0))
    return np.clip(np.where(rng.random(shape) < 1 / 3, 0.0, rng.normal(mean, spread, shape)), -1, 1)


def by_duels(effect: float, sd: float, *, number: int, duels: int, count: int, seed: int) -> Bools:
    """Whether the `number`-th challenger is promoted within so many duels."""
    rng = np.random.default_rng(seed)
    wealth, hit = Wealth(count), np.zeros(count, dtype=bool)
    for items in plain_items(effect, sd, (duels, count), rng):
        wealth.add(items, np.ones(count, dtype=bool))
        hit |= wealth.e() >= 1 / share(ALPHA, number)
    return hit


def by_the_end(effect: float, sd: float, rules: Rules, count: int, seed: int) -> Bools:
    """Whether a campaign whose every challenger is better by `effect` promotes one."""
    rng = np.random.default_rng(seed)
    state = Challengers(rules, count)
    begun = np.zeros(count, dtype=bool)
    for turn in range(rules.turns):
        state.arrive(turn)
        begun = ~begun & (rng.random(count) < rules.duel_share)
        state.duel(plain_items(effect, sd, (count,), rng), begun)
    return state.promoted


EFFECTS = tuple(round(0.25 * step, 2) for step in range(1, 17))
DEFAULT = Rules(first=100)
"""A default campaign: 100 rows are there after 100 turns, a distillation every 25."""
SCHEDULES: dict[str, Rules] = {
    "replaced every 25 turns": DEFAULT,
    "a leader keeps its place": replace(DEFAULT, keep_lead=True),
    "one challenger from turn 100": replace(DEFAULT, every=1000),
    "a leader keeps its place, duel_share 0.5": replace(DEFAULT, keep_lead=True, duel_share=0.5),
    "a leader keeps its place, duel_share 1": replace(DEFAULT, keep_lead=True, duel_share=1.0),
    "a leader keeps its place, min_rows 25": Rules(keep_lead=True),
}
SDS = (0.15, 0.2, 0.3, 0.4)


def power(count: int, seed: int) -> dict[str, Rows]:
    """What is promoted within 60 duels at one sd an item, and by the end of 200 turns by size of the difference."""
    within = [
        {
            "sd": sd,
            **{
                str(number): rate(by_duels(1.0, sd, number=number, duels=60, count=count, seed=seed))
                for number in (1, 2, 4)
            },
        }
        for sd in SDS
    ]
    end: Rows = []
    for (name, rules), sd in product(SCHEDULES.items(), (0.2, 0.3, 0.4)):
        shares = [float(by_the_end(effect, sd, rules, count, seed).mean()) for effect in EFFECTS]
        reached = next((e for e, found in zip(EFFECTS, shares, strict=True) if found >= 0.8), None)
        end.append({"schedule": name, "sd": sd, "shares": shares, "effect80": reached})
    return {"within60": within, "end": end, "worlds": in_worlds(count, seed)}


def in_worlds(count: int, seed: int) -> Rows:
    """A student whose every change gains the same: what that is worth in sd of an item, and how often it is promoted.

    The gain that makes one sd an item is sought among steps of 0.25 noise sd.
    """
    rows: Rows = []
    sixty = Rules(first=100, every=1000, turns=220, duel_share=1.0)
    for world in WORLDS:
        tried = [0.25 * step for step in range(1, 21)]
        found = [campaigns(world, 1.0, gain, sixty, count=min(count, 300), seed=seed) for gain in tried]
        one_sd = next(gain for gain, one in zip(tried, found, strict=True) if one.mean >= one.sd)
        for gain in (one_sd, 2.0):
            sure = campaigns(world, 1.0, gain, sixty, count=count, seed=seed)
            lead = campaigns(world, 1.0, gain, replace(DEFAULT, keep_lead=True), count=count, seed=seed)
            rows.append({
                "world": world, "gain": gain, "effect": sure.mean / sure.sd, "sd": sure.sd,
                "within60": rate(sure.promoted), "lead": rate(lead.promoted),
            })  # fmt: skip
    return rows


def rolled_back(effect: float, sd: float, count: int, seed: int) -> Bools:
    """Whether probation brings the predecessor back from a student worse by `effect`: a duel every second turn."""
    rng = np.random.default_rng(seed)
    wealth, back = Wealth(count), np.zeros(count, dtype=bool)
    for items in plain_items(effect, sd, (PROBATION_TURNS // 2, count), rng):
        wealth.add(items, np.ones(count, dtype=bool))
        back |= wealth.e() >= 1 / ALPHA
    return back


def rollbacks(count: int, seed: int) -> Rows:
    effects = {"2 sd worse": 2.0, "1 sd worse": 1.0, "equal": 0.0, "1 sd better": -1.0}
    return [
        {"sd": sd, **{name: rate(rolled_back(effect, sd, count, seed)) for name, effect in effects.items()}}
        for sd in SDS
    ]


def gates(count: int, seed: int) -> Rows:
    """How often the gate stops a student with one answer, and one with the champion's own policy."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    for spread, items in product(SPREADS, (10, 20, 40)):
        weights = policies(spread, count, rng)
        champion, equal = draw(weights, rng, items), draw(weights, rng, items)
        one = np.repeat(draw(weights, rng), items, axis=1)
        stopped = {}
        for name, answers in (("one answer", one), ("champion's policy", equal)):
            looks = [
                [look([HeldOutAnswer(("knob", int(pick)), True, 0.02) for pick in row]) for row in side]
                for side in (answers, champion)
            ]
            failures = [
                check_gate(ours, theirs, max_latency_s=5.0).failures for ours, theirs in zip(*looks, strict=True)
            ]
            stopped[name] = rate(np.array([any(why.startswith("collapse") for why in each) for each in failures]))
        rows.append({"champion": spread, "items": items, **stopped})
    return rows


def timid(count: int, seed: int) -> Rows:
    """A student whose every change does nothing, against a champion that tries things (Dirichlet 1)."""
    rules = {"duels": DEFAULT, "lead": replace(DEFAULT, keep_lead=True), "dense": DENSE, "long": LONG}
    rows: Rows = []
    for world in WORLDS:
        true = true_gains(world, 2000, np.random.default_rng(seed))
        found = {name: campaigns(world, 1.0, 0.0, one, count=count, seed=seed) for name, one in rules.items()}
        rows.append({
            "world": world, "banks": float(np.maximum(true, 0.0).mean()),
            "effect": found["long"].mean / found["long"].sd,
            **{name: rate(one.promoted) for name, one in found.items()},
        })  # fmt: skip
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(found: dict[str, float]) -> str:
    return f"{100 * found['share']:.1f}% ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def report(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    none, strong = results["null"], results["power"]
    worst = {name: max(row[name]["share"] for row in none) for name in ("duels", "lead", "dense", "long", "heldout")}
    worlds = "; ".join(f"*{name}*: {words}" for name, words in WORLDS.items())
    parts = [
        "# Promotion, simulated",
        f"`python benchmarks/promotion.py`, {results['date']}, {results['machine']}, {results['seconds']:.0f} s. "
        f"{results['campaigns']} campaigns a figure, alpha {ALPHA}; in brackets the exact 95% interval. How promotion "
        "works: docs/promotion.md. Gains are in units of the noise (sd) of one pair.",
        f"{CHANGES} changes, whose true gains stay the same in a campaign. Worlds: {worlds}.",
        "## No challenger is better",
        "200 turns, a new challenger every 25. Champion and challenger draw from policies with this Dirichlet "
        "concentration, the challenger's tilted until both have the same mean of max(true gain, 0). *Default*: "
        "0.25 drawn for each free turn (a duel takes two, so a fifth of all turns begin one), replaced at once. "
        "*Lead*: a challenger in the lead keeps its "
        "place. *All turns*: "
        "`duel_share` 1. *200 duels*: one challenger, whose share of alpha is "
        f"{100 * share(ALPHA, 1):.1f}%. *heldout*: looking back alone. Worst: "
        + ", ".join(f"{name} {100 * value:.1f}%" for name, value in worst.items()) + ".",
        _table(
            ["world", "champion", "challenger", "default", "lead", "all turns", "200 duels", "heldout"],
            [
                [row["world"], f"{row['champion']:g}", "the same" if row["challenger"] is None else
                 f"{row['challenger']:g}", *(_share(row[name]) for name in worst)]
                for row in none
            ],
        ),
        "## One standard deviation per item, 60 duels",
        "Items: a third zeros, the others normal, with this sd as a share of the cap. By the challenger's number.",
        _table(
            ["sd of an item", "first", "second", "fourth"],
            [[f"{row['sd']:g}", *(_share(row[number]) for number in "124")] for row in strong["within60"]],
        ),
        "A student whose every change gains the same, champion with Dirichlet 1. *Within 60*: duels, first "
        "challenger. *Default, lead*: by the end of 200 turns from row 100 on, a leader keeping its place.",
        _table(
            ["world", "true gain", "sd per item", "sd of an item", "within 60", "default, lead"],
            [
                [row["world"], f"{row['gain']:g}", f"{row['effect']:.2f}", f"{row['sd']:.2f}",
                 _share(row["within60"]), _share(row["lead"])]
                for row in strong["worlds"]
            ],
        ),
        "## Promoted by the end of 200 turns",
        "By the true difference in sd per item, every challenger being as good; first challenger after turn 100.",
        _table(
            ["schedule", "sd of an item", "80% from", *(f"{effect:g} sd" for effect in EFFECTS[1::2])],
            [
                [row["schedule"], f"{row['sd']:g}",
                 "-" if row["effect80"] is None else f"{row['effect80']:g} sd",
                 *(f"{100 * found:.0f}%" for found in row["shares"][1::2])]
                for row in strong["end"]
            ],
        ),
        f"## Rolled back within {PROBATION_TURNS} turns",
        f"{PROBATION_TURNS // 2} duels, reversed test at alpha {ALPHA}.",
        _table(
            ["sd of an item", *list(results["rollbacks"][0])[1:]],
            [[f"{row['sd']:g}", *(_share(found) for found in list(row.values())[1:])] for row in results["rollbacks"]],
        ),
        "## Stopped by the gate, as a collapse",
        _table(
            ["champion", "held-out items", "a student with one answer", "one with the champion's policy"],
            [
                [f"{row['champion']:g}", str(row["items"]), _share(row["one answer"]),
                 _share(row["champion's policy"])]
                for row in results["gates"]
            ],
        ),
        "## A timid student",
        "Promoted, although its changes do nothing. *Banks*: the champion's mean of max(true gain, 0). *Effect*: the "
        "student's lead per item in sd; above zero where rectified noise outweighs what the champion banks.",
        _table(
            ["world", "banks", "effect", "default", "lead", "all turns", "200 duels"],
            [
                [row["world"], f"{row['banks']:.2f}", f"{row['effect']:+.2f}",
                 *(_share(row[name]) for name in ("duels", "lead", "dense", "long"))]
                for row in results["timid"]
            ],
        ),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def draw_power(rows: Rows) -> str:
    """Promotions by the end of a campaign against the size of the difference, as SVG."""
    colours = ("#c1292e", "#0b6e4f", "#7a5195", "#e08e45", "#555555", "#1f77b4")
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 380" font-family="sans-serif" font-size="13">',
        '<rect width="880" height="380" fill="white"/>',
        '<text x="60" y="24">Promoted by the end of 200 turns (sd of an item: 0.3 of the cap)</text>',
        '<text x="150" y="370">true difference in standard deviations per item</text>',
    ]
    out += [
        f'<path d="M60 {320 - 280 * s}H540" stroke="#ddd"/><text x="22" y="{324 - 280 * s}">{s:.0%}</text>'
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    out += [f'<text x="{56 + 120 * effect}" y="340">{effect}</text>' for effect in range(5)]
    for index, (row, colour) in enumerate(zip([r for r in rows if r["sd"] == 0.3], colours, strict=True)):
        points = " ".join(
            f"{60 + 120 * effect:.0f},{320 - 280 * found:.1f}"
            for effect, found in zip(EFFECTS, row["shares"], strict=True)
        )
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="560" y="{60 + 24 * index}" fill="{colour}">{row["schedule"]}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    """Run, print, and unless quick write the results beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 campaigns a figure; writes nothing")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    count = 100 if arguments.quick else 1000
    started = time.perf_counter()
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"1 core of {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
        "campaigns": count,
        "null": null(count, arguments.seed),
        "power": power(count, arguments.seed),
        "rollbacks": rollbacks(count, arguments.seed),
        "gates": gates(count, arguments.seed),
        "timid": timid(count, arguments.seed),
    }
    results["seconds"] = round(time.perf_counter() - started, 1)
    text = report(results)
    print(text)
    if not arguments.quick:
        (HERE / "promotion.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "promotion.md").write_text(text)
        (HERE / "promotion.svg").write_text(draw_power(results["power"]["end"]))


if __name__ == "__main__":
    main()
