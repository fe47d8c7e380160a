"""What a campaign will take, from the trials and proposals just tried: how many turns fit into the time, how much disk.

A turn is one trial when its candidate is dropped at once, and `max_trials` when it is confirmed; both ends are told.
"""

from __future__ import annotations

from overnight.agent.calibrate import is_calibrated
from overnight.agent.campaign import Campaign
from overnight.agent.doctor.finding import Finding, amiss, note, ok
from overnight.agent.doctor.trials import Tried
from overnight.agent.pace import in_words
from overnight.agent.runtime import Runtime
from overnight.agent.seeds import HOLDOUT_SEEDS
from overnight.store.protocol import CampaignState

TURN_BYTES = 16 * 2**10
"""6.6 KiB of store and 2 KiB of log a turn, measured over 300 turns of the 13-knob menu; doubled for retries, duels."""
ADAPTER_BYTES = 128 * 2**20
"""Of rank 16 on a 3B model, in float32."""
EXTRA_ADAPTERS = 3
"""Champion, its predecessor, and one being written: beside the newest, where adapters do not duel."""
OVERHEAD_BYTES = 2**28
"""SQLite's log, LangGraph's checkpoints, the report, and room to breathe."""


def disk_needed(campaign: Campaign, done: int) -> int:
    """Return how many bytes the rest of the campaign writes beside its store."""
    turns = max(campaign.file.budget.iterations - done, 0)
    section, router = campaign.file.distill, campaign.file.router
    adapters = 0
    if router.challenger is not None:
        adapters = (done + turns) // section.every - done // section.every
        if router.evidence != "duels" or router.duel_share == 0:  # one that duelled is never removed
            adapters = min(adapters, section.keep_adapters + EXTRA_ADAPTERS)
    return OVERHEAD_BYTES + turns * TURN_BYTES + adapters * ADAPTER_BYTES * section.r // 16


def time(runtime: Runtime, state: CampaignState, tried: Tried, largest: Tried | None, latency_s: float) -> Finding:
    """Say how many turns fit before `until` and into `gpu_hours`, or how long the turns take."""
    budget, spent = runtime.campaign.file.budget, runtime.store.spent(state.id)
    left = max(budget.iterations - spent.iterations, 0)
    around = _around_s(runtime, state, tried.whole_s)
    fastest, slowest = _turn_s(runtime, tried, latency_s)
    limits: dict[str, float] = {}
    if runtime.deadline is not None:
        limits["until"] = runtime.deadline - runtime.clock()
    if budget.gpu_hours is not None:
        limits["gpu_hours"] = (budget.gpu_hours - spent.trial_hours) * 3600
    if not limits:
        each = f"{in_words(around + left * fastest)} to {in_words(around + left * slowest)}"
        return ok("time", f"{left} turns take {each}")
    name = min(limits, key=lambda limit: limits[limit])
    room = limits[name] - around
    few, many = (min(max(int(room / turn), 0), left) for turn in (slowest, fastest))
    words = f"{name}: {in_words(max(limits[name], 0.0))} have room for {_span(few, many)} of {left} turns"
    if largest is not None:
        big = min(max(int(room / _turn_s(runtime, largest, latency_s)[0]), 0), left)
        words += f"; for {big} if every candidate were the largest"
    if many == 0:
        return amiss("time", words, f"raise `budget.{name}`, or make trials shorter")
    return ok("time", words) if few >= left else note("time", words, f"`budget.{name}` ends the campaign first")


def _around_s(runtime: Runtime, state: CampaignState, trial_s: float) -> float:
    """Return what calibration and the look at the holdout take."""
    seeds = runtime.campaign.decision.calibration_trials
    calibration = 0 if is_calibrated(runtime, state) else seeds + (seeds > 1)
    holdout = 2 * HOLDOUT_SEEDS if runtime.info is not None and runtime.info.has_holdout else 0
    return (calibration + holdout) * trial_s


def _turn_s(runtime: Runtime, tried: Tried, latency_s: float) -> tuple[float, float]:
    """Return what a turn takes, dropped at once and confirmed."""
    settings = runtime.campaign.decision
    most = settings.max_trials if settings.rule == "confirmed" else 1
    return max(tried.whole_s + latency_s, 1e-3), max(most * tried.whole_s + latency_s, 1e-3)


def _span(few: int, many: int) -> str:
    return str(few) if few == many else f"{few} to {many}"
