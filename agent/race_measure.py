"""Spending paired trials on picks of a race that nobody ever measured, so that every contender's gain is known.

Each pick runs beside its turn's baseline on one seed that no decision uses. What was run for an earlier race is not run
again. Nothing is kept or reverted, and no prompt tells of it.
"""

from __future__ import annotations

from overnight.agent.decide import gain_scale
from overnight.agent.measure import run_trial, series_of, trials_on
from overnight.agent.runtime import Runtime
from overnight.agent.seeds import RACE_SEED
from overnight.store.protocol import CampaignState


def measure_picks(runtime: Runtime, state: CampaignState, race_id: int) -> tuple[int, int]:
    """Run what is missing; return how many picks were measured, and how many could not be.

    Raises:
        PauseRequested: a pause was asked for between two trials; what was run is there.
        BudgetSpent: the campaign's budget has no room for another trial.
    """
    missing = sorted(
        {
            (runtime.store.attempt(item.attempt_id).baseline_config_id or "", item.config_id)
            for item in runtime.store.race_items(race_id)
            if item.valid and item.config_id is not None and item.expected_gain is None
        }
    )
    measured = 0
    for number, (baseline_id, config_id) in enumerate(missing, 1):
        gain = _gain(runtime, state, baseline_id, config_id, number=number, of=len(missing))
        if gain is None:
            continue
        measured += 1
        with runtime.writing() as writer:
            writer.pick_measured(race_id, baseline_id, config_id, gain)
    return measured, len(missing) - measured


def _gain(
    runtime: Runtime, state: CampaignState, baseline_id: str, config_id: str, *, number: int, of: int
) -> float | None:
    """Return a pick's gain over its baseline; None where one of them fails."""
    base, pick = (_metric(runtime, state, each, number, of) for each in (baseline_id, config_id))
    if base is None or pick is None:
        return None
    settings = runtime.campaign.decision
    sign = settings.sign
    return sign * (pick - base) / gain_scale({RACE_SEED: base}, settings.gain)


def _metric(runtime: Runtime, state: CampaignState, config_id: str, number: int, of: int) -> float | None:
    """Return what a configuration measures on the races' seed, from the store where it was run before."""
    while True:
        series = series_of(trials_on(runtime, state, config_id, range(RACE_SEED, RACE_SEED + 1)))
        if series.failure is not None or RACE_SEED in series.metrics:
            return series.metrics.get(RACE_SEED)
        run_trial(
            runtime,
            runtime.store.config_of(config_id),
            RACE_SEED,
            purpose="race",
            replicate=series.last_replicate.get(RACE_SEED, -1) + 1,
            number=number,
            of=of,
        )
