"""How often each rule keeps a change that does nothing, how often it finds one that helps, and what that costs.

Simulates whole campaigns with numpy: calibration, rotating paired seeds, audits, rolling and fixed baselines, the noise
estimated the way a campaign estimates it. `confirmed` is `overnight.agent.decide` itself: its `plan` gives the design,
and `decide_all` repeats `judge` over arrays (tests/agent_tests/test_decide.py holds them equal).

    python benchmarks/decisions.py --quick          # under a minute, writes nothing
    python benchmarks/decisions.py                  # minutes; writes decisions.json, decisions.md, decisions.svg here
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from overnight.agent.decide import AUDIT_SHARE, DecisionSettings, Plan, plan
from overnight.agent.seeds import AUDIT_TRIALS
from overnight.trainer.noise import Noise, Spread, paired_noise, trial_noise

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
BaselineMode = Literal["rolling", "fixed"]
Shape = Literal["normal", "t3"]
MODES: tuple[BaselineMode, ...] = ("rolling", "fixed")
SHAPES: tuple[Shape, ...] = ("normal", "t3")
Rows = list[dict[str, Any]]
HERE = Path(__file__).parent
AUDITED = AUDIT_TRIALS
GAINS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
FIRST_CAMPAIGN = 2.75
"""Its threshold, 0.5% of 10.96 = 0.055, in units of its trial sd of 0.020."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A kind of campaign. One trial of the baseline has standard deviation 1."""

    baseline: BaselineMode = "fixed"
    calibration: int = 5
    shape: Shape = "normal"
    excess: float = 1.0
    """A candidate's trial sd over the first baseline's."""
    compound: bool = False
    """The excess is over the current baseline's, whatever was kept before."""
    noisy_share: float = 1.0
    """Share of the candidates that have the excess; the others are as noisy as the baseline."""
    seed_share: float = 0.0
    """Share of a trial's variance that the seed explains; pairing removes it."""
    audit_share: float = AUDIT_SHARE
    gain: float = 0.0
    """True gain of every proposal, in true paired standard deviations."""
    gain_share: float = 1.0
    """Share of the proposals that have this gain; the others change nothing."""
    known: Literal["", "calibration", "audit"] = ""
    """Not empty: the noise is given with 20 degrees of freedom, as if it came from there."""
    unseeded: bool = False
    max_trials: int = 5
    min_gain: float = 0.0
    alpha: float = 0.01


@dataclass(frozen=True)
class Figures:
    """What a simulation showed."""

    false_keeps: float
    """Per null proposal."""
    upper: float
    """The upper 95% limit of `false_keeps`, clustered by campaign."""
    campaigns_with: float
    """Share of campaigns with at least one false keep."""
    power: float
    """Keeps per proposal that has the gain."""
    trials: float
    """Candidate trials per null proposal, audits left out."""
    audit_trials: float
    """Further trials per proposal for audits."""
    baseline_trials: float
    """Baseline trials per proposal beyond calibration."""
    trial_bias: float
    """Estimated over true variance of a trial from calibration, less 1."""
    variance_bias: float
    """Estimated over true variance of a paired difference from audits, less 1."""
    sd_bias: float
    """The same for `Spread.sd_unbiased` of the trial noise from calibration."""


def decide_all(gains: Floats, sd: Floats, design: Plan, min_gain: float) -> tuple[Bools, Ints]:
    """`judge` over rows of gains in the order of the looks: which rows are kept, and the trials each took."""
    n = design.n
    alive = np.ones(len(gains), dtype=bool)
    trials = np.ones(len(gains), dtype=np.int64)
    total = np.zeros(len(gains))
    for k in range(1, n):
        total = total + gains[:, k - 1]
        threshold = np.maximum(min_gain - design.slack(k) * sd, design.drop_below(k, sd))
        alive &= total / k >= threshold
        trials += alive
    mean = (total + gains[:, n - 1]) / n
    own_ss = np.square(gains - mean[:, None]).sum(axis=1)
    bound = mean - design.critical * np.sqrt(design.squared_error(n, sd, own_ss))
    return alive & (mean >= min_gain) & (bound > 0), trials


Decide = Callable[["Campaigns", Floats, Floats], tuple[Bools, Ints]]


class Campaigns:
    """Many campaigns of one world at once, one row each; `turn` makes a proposal in all of them."""

    def __init__(self, world: World, count: int, rng: np.random.Generator) -> None:
        self.world, self.count, self.rng = world, count, rng
        self.n = world.max_trials
        places = max(world.calibration, self.n)
        self.own = math.sqrt(1 - world.seed_share)
        self.effects = math.sqrt(world.seed_share) * self.draw((count, places))
        self.baseline = self.effects + self.own * self.draw((count, places))
        self.known = np.full(count, world.calibration)
        """How many places of `baseline` are measured; places further on are drawn already but cost on first use."""
        self.scale = np.ones(count)
        """The current baseline's trial sd, before the share of the seed is taken off."""
        self.audit_truth = np.zeros(count)
        calibrated = self.baseline[:, : world.calibration]
        self.calibration_ss = np.square(calibrated - calibrated.mean(axis=1, keepdims=True)).sum(axis=1)
        self.audit_ss = np.zeros(count)
        self.audit_df = np.zeros(count)
        self.given = np.sqrt(rng.chisquare(20, count) / 20)

    def draw(self, shape: tuple[int, ...]) -> Floats:
        """Noise with standard deviation 1."""
        if self.world.shape == "normal":
            return self.rng.standard_normal(shape)
        return self.rng.standard_t(3, shape) / math.sqrt(3)

    @property
    def paired_sd(self) -> float:
        return self.own * math.sqrt(1 + self.world.excess**2)

    def noises(self) -> tuple[Floats, list[tuple[Noise, int]], Ints]:
        """The sd that each campaign works with; its distinct (noise, baseline trials) and which row has which."""
        world = self.world
        if world.known:
            model = trial_noise if world.unseeded else paired_noise
            noise = (
                model(Spread(20.0, 20.0))
                if world.known == "calibration"
                else paired_noise(Spread(1, 1), Spread(20, 20))
            )
            true = 1.0 if world.unseeded else self.own * math.sqrt(2)
            return (
                true * self.given,
                [(replace(noise, sd=true), world.calibration)],
                np.zeros(self.count, dtype=np.int64),
            )
        state = np.stack([self.audit_df, self.known if world.unseeded else np.zeros(self.count)], axis=1)
        distinct, which = np.unique(state, axis=0, return_inverse=True)
        which = which.reshape(-1)
        sd, kinds = np.empty(self.count), []
        calibration_df = world.calibration - 1
        for index, (audit_df, known) in enumerate(distinct):
            rows = which == index
            calibration = Spread(calibration_df, calibration_df)
            audit = Spread(audit_df, audit_df) if audit_df else None
            noise = trial_noise(calibration) if world.unseeded else paired_noise(calibration, audit)
            kinds.append((noise, int(known)))
            ss = (
                self.audit_ss[rows] / audit_df
                if noise.source == "audit"
                else self.calibration_ss[rows] / calibration_df
            )
            sd[rows] = np.sqrt(ss) * noise.sd
        return sd, kinds, which

    def order(self, rotation: int) -> Ints:
        """Places in the order of the looks, as `seed_order` gives them."""
        steps = np.arange(self.n)[None, :]
        known = self.known[:, None]
        return np.where(steps < known, (rotation + steps) % known, steps)

    def turn(self, rotation: int, decide: Decide) -> tuple[Bools, Bools, Ints, Ints, Ints]:
        """One proposal everywhere: (has the gain, kept, trials, audit trials, new baseline trials)."""
        world = self.world
        order = self.order(rotation)
        helps = self.rng.random(self.count) < world.gain_share
        true = np.where(helps, world.gain * self.paired_sd, 0.0)
        noisy = np.where(self.rng.random(self.count) < world.noisy_share, world.excess, 1.0)
        scale = noisy * (self.scale if world.compound else 1.0)
        effects = math.sqrt(world.seed_share) * self.draw(order.shape)
        if not world.unseeded:
            effects = np.take_along_axis(self.effects, order, axis=1)
        candidate = effects + (scale * self.own)[:, None] * self.draw(order.shape) + true[:, None]
        kept, trials = decide(self, candidate, np.take_along_axis(self.baseline, order, axis=1))
        fresh = np.zeros(self.count, dtype=np.int64)
        if not world.unseeded:
            fresh = np.maximum(trials - self.known, 0)
            self.known = np.maximum(self.known, trials)
        audited = self.rng.random(self.count) < world.audit_share
        fresh += AUDITED * audited
        self._audit(audited, scale)
        if world.baseline == "rolling" and kept.any():
            self._roll(kept, candidate - true[:, None], effects, scale)
        return helps, kept, trials, AUDITED * audited, fresh

    def _audit(self, audited: Bools, scale: Floats) -> None:
        """Audit some candidates: candidate and baseline on fresh seeds, whose own effects cancel in the pairs."""
        rows = int(audited.sum())
        candidate = (scale[audited] * self.own)[:, None] * self.draw((rows, AUDITED))
        baseline = (self.scale[audited] * self.own)[:, None] * self.draw((rows, AUDITED))
        gains = candidate - baseline
        self.audit_ss[audited] += np.square(gains - gains.mean(axis=1, keepdims=True)).sum(axis=1)
        self.audit_df[audited] += AUDITED - 1
        self.audit_truth[audited] += (AUDITED - 1) * self.own**2 * (scale**2 + self.scale**2)[audited]

    def _roll(self, kept: Bools, candidate: Floats, effects: Floats, scale: Floats) -> None:
        """The kept candidate, with the trials it has, is the new baseline; gains are counted from it."""
        rows, places = int(kept.sum()), self.baseline.shape[1]
        self.effects[kept] = math.sqrt(self.world.seed_share) * self.draw((rows, places))
        self.effects[kept, : self.n] = effects[kept]
        self.baseline[kept] = self.effects[kept] + (scale[kept] * self.own)[:, None] * self.draw((rows, places))
        self.baseline[kept, : self.n] = candidate[kept]
        self.known[kept] = self.n
        self.scale[kept] = scale[kept]


def confirmed(campaigns: Campaigns, candidate: Floats, measured: Floats) -> tuple[Bools, Ints]:
    world = campaigns.world
    settings = DecisionSettings(
        min_gain=world.min_gain, alpha=world.alpha, max_trials=world.max_trials, gain="absolute", direction="max"
    )
    sd, kinds, which = campaigns.noises()
    kept = np.zeros(campaigns.count, dtype=bool)
    trials = np.zeros(campaigns.count, dtype=np.int64)
    for index, (noise, known) in enumerate(kinds):
        rows = which == index
        reference = measured[rows]
        if world.unseeded:
            reference = campaigns.baseline[rows, :known].mean(axis=1, keepdims=True)
        design = plan(settings, noise, unpaired_baseline=known if world.unseeded else None)
        kept[rows], trials[rows] = decide_all(candidate[rows] - reference, sd[rows], design, world.min_gain)
    return kept, trials


def _of_one(threshold: float) -> Decide:
    """One run against ONE baseline run, the first, as the first campaign did it."""

    def decide(campaigns: Campaigns, candidate: Floats, _: Floats) -> tuple[Bools, Ints]:
        return candidate[:, 0] - campaigns.baseline[:, 0] >= threshold, np.ones(campaigns.count, dtype=np.int64)

    return decide


def two_sd(campaigns: Campaigns, candidate: Floats, _: Floats) -> tuple[Bools, Ints]:
    """Two (estimated) trial sd over one baseline run."""
    sd = np.sqrt(campaigns.calibration_ss / (campaigns.world.calibration - 1))
    return candidate[:, 0] - campaigns.baseline[:, 0] >= 2 * sd, np.ones(campaigns.count, dtype=np.int64)


def mean_of_three(campaigns: Campaigns, candidate: Floats, measured: Floats) -> tuple[Bools, Ints]:
    """The mean of three runs is better than the baseline's."""
    better = (candidate[:, :3] - measured[:, :3]).mean(axis=1) > 0
    return better, np.full(campaigns.count, 3)


def screened_t(campaigns: Campaigns, candidate: Floats, measured: Floats) -> tuple[Bools, Ints]:
    """Two standard errors over the mean of `max_trials` paired runs, all always run, the candidate's own sd."""
    gains = candidate - measured
    error = gains.std(axis=1, ddof=1) / math.sqrt(campaigns.n)
    return gains.mean(axis=1) >= 2 * error, np.full(campaigns.count, campaigns.n)


RULES: dict[str, Decide] = {
    "confirmed": confirmed,
    "single_shot": _of_one(FIRST_CAMPAIGN),
    "two sd over one baseline": two_sd,
    "two standard errors over five": screened_t,
    "mean of 3": mean_of_three,
    "any improvement": _of_one(0.0),
}


def simulate(world: World, decide: Decide, campaigns: int, proposals: int, seed: int) -> Figures:
    """Run them and count."""
    state = Campaigns(world, campaigns, np.random.default_rng(seed))
    false, null, true, helped = (np.zeros(campaigns) for _ in range(4))
    null_trials = audits = fresh_trials = 0
    for turn in range(proposals):
        helps, kept, trials, extra, fresh = state.turn(turn, decide)
        real = helps & (world.gain > 0)
        false += kept & ~real
        null += ~real
        true += kept & real
        helped += real
        null_trials += int(trials[~real].sum())
        audits += int(extra.sum())
        fresh_trials += int(fresh.sum())
    rate = false.sum() / null.sum() if null.sum() else math.nan
    spread = (false - rate * null).std(ddof=1) / null.mean() / math.sqrt(campaigns) if null.sum() else math.nan
    calibration_df = world.calibration - 1
    sd = [Spread(ss, calibration_df).sd_unbiased for ss in state.calibration_ss]
    return Figures(
        false_keeps=float(rate),
        upper=float(rate + 1.96 * spread),
        campaigns_with=float((false > 0).mean()),
        power=float(true.sum() / helped.sum()) if helped.sum() else math.nan,
        trials=float(null_trials / null.sum()) if null.sum() else math.nan,
        audit_trials=audits / campaigns / proposals,
        baseline_trials=fresh_trials / campaigns / proposals,
        trial_bias=float(state.calibration_ss.mean() / calibration_df - 1),
        variance_bias=float(state.audit_ss.sum() / state.audit_truth.sum() - 1) if state.audit_df.any() else math.nan,
        sd_bias=float(np.mean(sd) - 1),
    )


def must_hold(campaigns: int, seed: int) -> Rows:
    """False keeps under the null in every combination that issue 4 names, `single_shot` beside it."""
    rows: Rows = []
    for audit, baseline, calibration, shape, excess in product(
        (0.0, AUDIT_SHARE), MODES, (3, 5, 10), SHAPES, (1.0, 2.0)
    ):
        world = World(baseline=baseline, calibration=calibration, shape=shape, excess=excess, audit_share=audit)
        ours = simulate(world, confirmed, campaigns, 50, seed)
        old = simulate(replace(world, audit_share=0.0), RULES["single_shot"], min(campaigns, 2000), 50, seed)
        rows.append({"world": asdict(world), "confirmed": asdict(ours), "single_shot": asdict(old)})
    return rows


def power_curves(campaigns: int, seed: int) -> Rows:
    """Keeps of true gains from 0.5 to 4 paired sd by what is known about the noise, half of the proposals null."""
    cases: dict[str, World] = {
        "20 df from calibration": World(known="calibration"),
        "20 df from audits": World(known="audit"),
        "3 calibration trials": World(calibration=3, audit_share=0.0),
        "5 calibration trials": World(audit_share=0.0),
        "10 calibration trials": World(calibration=10, audit_share=0.0),
        "5, default audits": World(),
        "5, t3": World(audit_share=0.0, shape="t3"),
        "5, candidates twice as noisy": World(audit_share=0.0, excess=2.0),
        "5, pairing removes 80%": World(seed_share=0.8),
        "5, rolling": World(baseline="rolling"),
        "5, unseeded": World(unseeded=True),
    }
    rows: Rows = []
    for name, world in cases.items():
        proposals = 5 if world.known else 50
        found = [
            simulate(
                replace(world, gain=gain, gain_share=0.1 if world.baseline == "rolling" else 0.5),
                confirmed,
                campaigns * 50 // proposals,
                proposals,
                seed,
            )
            for gain in GAINS
        ]
        null = simulate(world, confirmed, campaigns * 50 // proposals, proposals, seed)
        rows.append({"case": name, "power": [one.power for one in found], "null": asdict(null)})
    return rows


def alternatives(campaigns: int, seed: int) -> Rows:
    """Every rule in the default campaign, fixed and rolling."""
    rows: Rows = []
    for (name, rule), baseline in product(RULES.items(), MODES):
        null = simulate(World(baseline=baseline), rule, campaigns, 50, seed)
        # Power of a fixed baseline: in a rolling campaign a rule that keeps noise changes what it compares with.
        power = [simulate(World(gain=gain), rule, campaigns // 2, 50, seed).power for gain in GAINS]
        rows.append({"rule": name, "baseline": baseline, "null": asdict(null), "power": power})
    return rows


def beyond(campaigns: int, seed: int) -> Rows:
    """Null worlds that issue 4 does not name, and the noise estimate while baselines roll on."""
    worlds = {
        "a tenth of the candidates twice as noisy": World(excess=2.0, noisy_share=0.1),
        "a third of the candidates twice as noisy": World(excess=2.0, noisy_share=0.3),
        "twice the current baseline's noise, compounding": World(baseline="rolling", excess=2.0, compound=True),
        "candidates three times as noisy": World(excess=3.0),
        "three times, no audits": World(excess=3.0, audit_share=0.0),
        "pairing removes 80%, twice as noisy": World(seed_share=0.8, excess=2.0),
        "unseeded, twice as noisy": World(unseeded=True, excess=2.0),
        "unseeded, twice as noisy, 3 calibration trials": World(unseeded=True, excess=2.0, calibration=3),
        "a tenth gain 2 sd, rolling": World(baseline="rolling", gain=2.0, gain_share=0.1),
        "a third gain 2 sd, rolling": World(baseline="rolling", gain=2.0, gain_share=0.3),
        "a tenth gain 2 sd, rolling, twice as noisy": World(baseline="rolling", gain=2.0, gain_share=0.1, excess=2.0),
        "max_trials 3": World(max_trials=3, excess=2.0, audit_share=0.0),
        "max_trials 8": World(max_trials=8, excess=2.0, audit_share=0.0),
        "alpha 0.05": World(alpha=0.05, excess=2.0, audit_share=0.0),
    }
    return [{"case": k, "figures": asdict(simulate(w, confirmed, campaigns, 50, seed))} for k, w in worlds.items()]


def noise_estimates(campaigns: int, batches: int, seed: int) -> Rows:
    """The bias of both noise estimates, pooled over batches of whole campaigns, with its scatter.

    Calibration comes before every decision, so campaigns of no turns show its bias: 25 times as many.
    """
    rows: Rows = []
    for shape in SHAPES:
        many = batches if shape == "normal" else 3 * batches
        drawn = [Campaigns(World(shape=shape), 25 * campaigns, np.random.default_rng(seed + i)) for i in range(many)]
        found = [float(one.calibration_ss.mean() / 4 - 1) for one in drawn]
        rows.append(_pooled("trial, from calibration", shape, 25 * campaigns, found))
    worlds = {
        "paired, from audits: nothing helps, fixed": World(),
        "paired, from audits: a third gain 2 sd, rolling": World(baseline="rolling", gain=2.0, gain_share=0.3),
    }
    for (name, world), shape in product(worlds.items(), SHAPES):
        many = batches if shape == "normal" else 3 * batches
        runs = [simulate(replace(world, shape=shape), confirmed, campaigns, 50, seed + i) for i in range(many)]
        rows.append(_pooled(name, shape, campaigns, [one.variance_bias for one in runs]))
    return rows


def _pooled(name: str, shape: Shape, campaigns: int, found: list[float]) -> dict[str, Any]:
    """Pool batches of equal size.

    The mean of n variances scatters as n^-1/2; with Student t noise of 3 degrees of freedom, whose variances have no
    variance, as n^-1/3 (a stable law of index 3/2; Feller 1971, XVII.5). Quartiles of the batches serve both.
    """
    low, high = np.quantile(found, [0.25, 0.75])
    scatter = (high - low) / 1.349 / len(found) ** (1 / 2 if shape == "normal" else 1 / 3)
    total = campaigns * len(found)
    return {
        "estimate": name, "shape": shape, "campaigns": total, "bias": float(np.mean(found)), "scatter": float(scatter)
    }  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.{digits}f}%"


def report(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    null, power, rules, other = (results[name] for name in ("must_hold", "power", "alternatives", "beyond"))
    estimates = results["noise_estimates"]
    worst = max(row["confirmed"]["upper"] for row in null)
    gains = [f"{gain:g} sd" for gain in GAINS]
    parts = [
        "# Decisions, simulated",
        f"`python benchmarks/decisions.py`, {results['date']}, {results['machine']}, {results['seconds']:.0f} s. "
        f"{results['campaigns']} campaigns of 50 proposals a row (half of that for power and alternatives), "
        "alpha 0.01, min_gain 0, 5 trials. "
        "How decisions are made: docs/decisions.md. What failed: benchmarks/LOG.md.",
        "## Nothing helps: false keeps per proposal",
        f"Upper limit: 95%, clustered by campaign. The largest is {_percent(worst)}; at most 1.2% is asked. Noise: a "
        "candidate's trial sd over the baseline's. Trials: of the candidate, per null proposal; audits apart.",
        _table(
            ["audits", "baseline", "calibration", "shape", "noise", "confirmed", "upper", "per campaign", "trials",
             "audit", "baseline trials", "single_shot"],
            [
                [
                    f"{row['world']['audit_share']:g}", row["world"]["baseline"], str(row["world"]["calibration"]),
                    row["world"]["shape"], f"x{row['world']['excess']:g}", _percent(row["confirmed"]["false_keeps"]),
                    _percent(row["confirmed"]["upper"]), _percent(row["confirmed"]["campaigns_with"], 1),
                    f"{row['confirmed']['trials']:.2f}", f"{row['confirmed']['audit_trials']:.2f}",
                    f"{row['confirmed']['baseline_trials']:.2f}", _percent(row["single_shot"]["false_keeps"]),
                ]
                for row in null
            ],
        ),
        "## A change helps: kept within 5 trials",
        "Gains in true paired standard deviations, against a fixed baseline unless named. Trials: per null proposal.",
        _table(
            ["noise known from", *gains, "trials", "false keeps"],
            [
                [row["case"], *(_percent(p, 1) for p in row["power"]), f"{row['null']['trials']:.3f}",
                 _percent(row["null"]["false_keeps"])]
                for row in power
            ],
        ),
        "## The usual alternatives",
        f"5 calibration trials, normal noise. `single_shot` with the first campaign's threshold of {FIRST_CAMPAIGN} "
        "trial sd. Power is against a fixed baseline.",
        _table(
            ["rule", "baseline", "false keeps", "campaigns with one", "trials", *gains],
            [
                [row["rule"], row["baseline"], _percent(row["null"]["false_keeps"]),
                 _percent(row["null"]["campaigns_with"], 1), f"{row['null']['trials']:.2f}",
                 *(_percent(p, 1) for p in row["power"])]
                for row in rules
            ],
        ),
        "## The noise estimates",
        "Estimated over true variance less one; the bias of the sd is half of it. Behind +-: one standard error; with "
        "Student t noise of 3 degrees of freedom a variance has no variance, and it is the scale of the stable law "
        "that its mean follows.",
        _table(
            ["estimate", "shape", "campaigns", "bias"],
            [
                [row["estimate"], row["shape"], str(row["campaigns"]),
                 f"{100 * row['bias']:+.2f}% +- {100 * row['scatter']:.2f}"]
                for row in estimates
            ],
        ),
        "## Beyond what was asked",
        "Bias as above, over fewer campaigns: it scatters by 0.5% (trial: 0.7%).",
        _table(
            ["world", "false keeps", "upper", "power", "trials", "bias, trial", "bias, paired (audits)"],
            [
                [row["case"], *(_percent(row["figures"][name]) for name in ("false_keeps", "upper", "power")),
                 f"{row['figures']['trials']:.2f}", f"{100 * row['figures']['trial_bias']:+.1f}%",
                 f"{100 * row['figures']['variance_bias']:+.1f}%".replace("+nan%", "-")]
                for row in other
            ],
        ),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def draw_power(rules: Rows) -> str:
    """Keeps against the true gain, a line for each rule, as SVG; at gain 0 stand the false keeps."""
    colours = ("#0b6e4f", "#c1292e", "#e08e45", "#7a5195", "#555555", "#999999")

    def x(gain: float) -> float:
        return 60 + 120 * gain

    def y(share: float) -> float:
        return 320 - 280 * share

    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 380" font-family="sans-serif" font-size="13">',
        '<rect width="780" height="380" fill="white"/>',
        '<text x="60" y="24">Proposals kept, by true gain (fixed baseline, 5 calibration trials)</text>',
        '<text x="220" y="370">true gain in paired standard deviations</text>',
    ]
    out += [
        f'<path d="M60 {y(share)}H540" stroke="#ddd"/><text x="22" y="{y(share) + 4}">{share:.0%}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    out += [f'<text x="{x(gain) - 4:.0f}" y="340">{gain:g}</text>' for gain in (0, 1, 2, 3, 4)]
    fixed = [row for row in rules if row["baseline"] == "fixed"]
    for index, (row, colour) in enumerate(zip(fixed, colours, strict=True)):
        shares = [row["null"]["false_keeps"], *row["power"]]
        points = " ".join(f"{x(gain):.0f},{y(share):.1f}" for gain, share in zip((0.0, *GAINS), shares, strict=True))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="555" y="{60 + 24 * index}" fill="{colour}">{row["rule"]}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    """Run, print, and unless quick write the results beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 campaigns a row, under a minute; writes nothing")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    campaigns = 2000 if arguments.quick else 10_000
    few = campaigns // (10 if arguments.quick else 2)
    started = time.perf_counter()
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"1 core of {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
        "campaigns": campaigns,
        "must_hold": must_hold(campaigns, arguments.seed),
        "power": power_curves(few, arguments.seed),
        "alternatives": alternatives(few, arguments.seed),
        "beyond": beyond(campaigns if not arguments.quick else few, arguments.seed),
        "noise_estimates": noise_estimates(2 * few, 4 if arguments.quick else 12, arguments.seed),
    }
    results["seconds"] = round(time.perf_counter() - started, 1)
    text = report(results)
    print(text)
    if not arguments.quick:
        (HERE / "decisions.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "decisions.md").write_text(text)
        (HERE / "decisions.svg").write_text(draw_power(results["alternatives"]))


if __name__ == "__main__":
    main()
