"""When a campaign ends: whichever budget comes first, planned so that its last trial and its `finish` fit in.

What comes next is judged by what trials took here: nine in ten of the last ones took no longer. Before each trial the
campaign asks whether that trial AND the look at the locked holdout would still be over in time, and stops where they
would not. A trial that takes longer than expected is dropped rather than let past the deadline. Only measured trials
teach what trials take: before the first one nothing is reserved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from overnight.agent.runtime import Runtime
from overnight.agent.seeds import HOLDOUT_SEEDS
from overnight.agent.signals import PauseRequested
from overnight.agent.state import ASKED, BudgetSpent
from overnight.store.hashing import digest
from overnight.store.protocol import CampaignState, Position, Spent, Trial
from overnight.store.records import Purpose

RECENT_TRIALS = 40
SHARE_COVERED = 0.9
"""Share of the last trials that took no longer than what is planned with."""
_MEASURED = ("gpu_hours", "energy_kwh")


@dataclass(frozen=True, slots=True)
class Costs:
    """What is still to come takes about so much."""

    trial_s: float
    """The next trial."""
    trial_wh: float
    finish_s: float
    """The look at the holdout, as far as it is not taken."""
    finish_wh: float


def stop_reason(runtime: Runtime, state: CampaignState, position: Position) -> str | None:
    """Return which budget does not reach for the turn at `position`, or None."""
    budget, spent = runtime.campaign.file.budget, runtime.store.spent(state.id)
    done = position.iteration - 1
    if done >= budget.iterations:
        return "iterations"
    if runtime.iterations is not None and done >= runtime.iterations:
        return ASKED
    if runtime.until is not None and runtime.clock() >= runtime.until:
        return ASKED
    short = _short_of(runtime, state, spent)
    if short is not None:
        return short
    if budget.patience is not None and min(spent.since_keep, done) >= budget.patience:
        return "patience"
    return None


def is_over(runtime: Runtime, state: CampaignState) -> bool:
    """Whether a finished campaign's budget still says so: it may have been raised since."""
    if state.stop_reason == "menu_exhausted":
        return True
    if state.stop_reason in _MEASURED:  # what was reserved for `finish` is no reason to go on
        before = state.spec["budget"]
        assert isinstance(before, dict)
        now = runtime.campaign.file.budget.model_dump()[state.stop_reason]
        return now is not None and now <= (before.get(state.stop_reason) or math.inf)
    return stop_reason(runtime, state, runtime.store.next_stage(state.id)) not in (None, ASKED)


def check_trial(runtime: Runtime, state: CampaignState, purpose: Purpose) -> None:
    """Let a trial begin only where it, and what has to follow it, is over in time; limit it to that time.

    Raises:
        BudgetSpent: it would not be; names the budget.
        PauseRequested: the time asked for in this run (`--until`) would pass meanwhile.
    """
    runtime.trial_ends_by = None
    budget = runtime.campaign.file.budget
    if runtime.deadline is None and runtime.until is None and budget.gpu_hours is None and budget.energy_kwh is None:
        return
    costs = costs_of(runtime, state)
    if runtime.until is not None and runtime.clock() + costs.trial_s > runtime.until:
        raise PauseRequested
    is_last = purpose == "holdout"
    if runtime.deadline is not None:
        ends_by = runtime.deadline - (0.0 if is_last else costs.finish_s)
        if runtime.clock() + costs.trial_s > ends_by:
            raise BudgetSpent("until")
        runtime.trial_ends_by = ends_by
    if not is_last:  # `finish` is what was reserved for
        short = _short_of(runtime, state, runtime.store.spent(state.id), costs)
        if short is not None:
            raise BudgetSpent(short)


def time_left(runtime: Runtime, state: CampaignState, *, last: bool = False) -> float:
    """Return the seconds until the look at the holdout has to begin, or this run has to pause; inf without a limit.

    With `last` nothing but that look is left to do: until the campaign has to end.
    """
    left = math.inf
    if runtime.deadline is not None:
        left = runtime.deadline - (0.0 if last else costs_of(runtime, state).finish_s) - runtime.clock()
    return left if runtime.until is None else min(left, runtime.until - runtime.clock())


@contextmanager
def ending_in_time(runtime: Runtime, state: CampaignState) -> Iterator[None]:
    """Let what is inside take no time that the end of the campaign needs: `Runtime.idle` raises BudgetSpent then."""
    if runtime.deadline is not None:
        runtime.trial_ends_by = runtime.deadline - costs_of(runtime, state).finish_s
    try:
        yield
    finally:
        runtime.trial_ends_by = None


def _short_of(runtime: Runtime, state: CampaignState, spent: Spent, costs: Costs | None = None) -> str | None:
    """Return which of the budgets that are used up continuously does not reach for a trial and the finish."""
    budget = runtime.campaign.file.budget
    if runtime.deadline is None and budget.gpu_hours is None and budget.energy_kwh is None:
        return None
    costs = costs or costs_of(runtime, state)
    if runtime.deadline is not None and runtime.clock() + costs.trial_s + costs.finish_s > runtime.deadline:
        return "until"
    hours, kwh = (costs.trial_s + costs.finish_s) / 3600, (costs.trial_wh + costs.finish_wh) / 1000
    if budget.gpu_hours is not None and spent.trial_hours + hours > budget.gpu_hours:
        return "gpu_hours"
    if budget.energy_kwh is not None and spent.energy_kwh + kwh > budget.energy_kwh:
        return "energy_kwh"
    return None


def costs_of(runtime: Runtime, state: CampaignState) -> Costs:
    """Return what the next trial and the finish take, judged by what trials took here; nothing is known at first."""
    if runtime.info is None:
        return Costs(0.0, 0.0, 0.0, 0.0)
    trials_of = partial(
        runtime.store.trials_of, trainer_hash=runtime.trainer_hash, environment_hash=runtime.environment_hash
    )
    recent = runtime.store.recent_trials(
        state.id, trainer_hash=runtime.trainer_hash, environment_hash=runtime.environment_hash, count=RECENT_TRIALS
    )
    trial_s, trial_wh = _cost(recent)
    finish_s, finish_wh = 0.0, 0.0
    for config_id in _holdout_configs(runtime, state):
        own = trials_of(state.id, config_id, seeds=runtime.decision_seeds)
        seconds, watt_hours = _cost([trial for trial in own if trial.metric is not None][-RECENT_TRIALS:])
        looked = trials_of(state.id, config_id, split="holdout")
        left = HOLDOUT_SEEDS - len({trial.seed for trial in looked if trial.metric is not None})
        finish_s += left * (seconds or trial_s)
        finish_wh += left * (watt_hours or trial_wh)
    return Costs(trial_s, trial_wh, finish_s, finish_wh)


def _holdout_configs(runtime: Runtime, state: CampaignState) -> Sequence[str]:
    """Return the configurations that `finish` would measure: none where there is nothing to look at."""
    no_holdout = runtime.info is None or not runtime.info.has_holdout
    if no_holdout or state.best_attempt_id is None or runtime.store.last_event(state.id, "holdout_measured"):
        return ()
    winner = runtime.store.attempt(state.best_attempt_id).config_id
    assert winner is not None
    return digest(runtime.campaign.menu.default), winner


def _cost(trials: Sequence[Trial]) -> tuple[float, float]:
    """Return the wall time and the energy that nine in ten of `trials` did not exceed; 0 where none are known."""
    return (
        _covering([trial.wall_s for trial in trials if trial.wall_s is not None]),
        _covering([trial.energy_wh for trial in trials if trial.energy_wh is not None]),
    )


def _covering(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(SHARE_COVERED * len(ordered)) - 1] if ordered else 0.0


def why_stopped(runtime: Runtime, state: CampaignState, reason: str) -> str:
    """Return a reason to stop in words, with the numbers that it rests on."""
    budget, spent = runtime.campaign.file.budget, runtime.store.spent(state.id)
    costs = costs_of(runtime, state)
    needs = f"one more trial ({costs.trial_s:.3g} s) and the look at the holdout ({costs.finish_s:.3g} s)"
    if reason == "until" and runtime.deadline is not None:
        shown = datetime.fromtimestamp(runtime.deadline).strftime("%Y-%m-%d %H:%M")
        return f"`until`: {needs} would not be over by {shown}"
    if reason == "gpu_hours":
        return f"`gpu_hours`: {spent.trial_hours:.3g} of {budget.gpu_hours:g} h were spent; no room for {needs}"
    if reason == "energy_kwh":
        needs = f"one more trial ({costs.trial_wh:.3g} Wh) and the look at the holdout ({costs.finish_wh:.3g} Wh)"
        return f"`energy_kwh`: {spent.energy_kwh:.3g} of {budget.energy_kwh:g} kWh were spent; no room for {needs}"
    if reason == "patience":
        return f"`patience`: {spent.since_keep} turns in a row kept nothing"
    if reason == "menu_exhausted":
        return "every legal change was tried"
    return f"`iterations`: all {budget.iterations} turns were taken"
