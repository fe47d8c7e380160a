"""The end of a campaign: one look at the locked holdout, and the last word in the store.

First baseline and winner are measured on the same fresh seeds, once. The gain is reported with its 95% interval,
whatever it says; a second look is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from overnight.agent.budget import why_stopped
from overnight.agent.decide import gain_scale
from overnight.agent.events import Finished, HoldoutMeasured, HoldoutSkipped
from overnight.agent.measure import Series, last_line, run_trial, series_of, stored_trials
from overnight.agent.runtime import Runtime
from overnight.agent.seeds import holdout_seeds
from overnight.agent.state import BudgetSpent
from overnight.store.errors import TrainerError
from overnight.store.protocol import CampaignState
from overnight.store.records import Config, FailureClass, TrialResult
from overnight.trainer.noise import Spread

CONFIDENCE = 0.95
TRIES = 2
"""How often one look runs a seed before it gives up on it."""
REPEATABLE: tuple[FailureClass, ...] = ("nan", "timeout", "crash", "unsupported")
"""What a configuration does by itself, and would do again."""


def finish(runtime: Runtime, state: CampaignState, reason: str, iterations: int) -> None:
    """Measure the holdout where there is something to measure, and record why the campaign stopped.

    Raises:
        PauseRequested: a pause was asked for between two trials; the look goes on at the next run.
        TrainerError: the machine is at fault; the holdout stays locked, and the look goes on when it works again.
    """
    why = why_stopped(runtime, state, reason)
    try:
        looked = _why_not(runtime, state) or _measure_holdout(runtime, state)
    except BudgetSpent:
        looked = "there was no time left for it; it stays locked, and the next run looks at it"
    said = HoldoutSkipped(campaign=runtime.name, reason=looked) if isinstance(looked, str) else looked
    with runtime.writing(changes_campaign=True) as writer:
        writer.status("finished", reason)
        runtime.emit(said)  # inside: their rows are committed with what they say, and never without
        runtime.emit(Finished(campaign=runtime.name, iterations=iterations, stop_reason=reason, why=why))


def winner(runtime: Runtime, state: CampaignState) -> Config | None:
    """Return the configuration that the campaign ends with, or None when nothing was kept."""
    if state.best_attempt_id is None:
        return None
    config_id = runtime.store.attempt(state.best_attempt_id).config_id
    assert config_id is not None
    return runtime.store.config_of(config_id)


def _why_not(runtime: Runtime, state: CampaignState) -> str | None:
    looked = runtime.store.last_event(state.id, "holdout_measured")
    if looked is not None:
        return f"the holdout was looked at on {looked[0]}; a second look is refused"
    if winner(runtime, state) is None:
        return "nothing was kept, so there is nothing to compare; the holdout stays locked"
    if runtime.info is None or not runtime.info.has_holdout:
        return "the trainer has no holdout"
    return None


def _measure_holdout(runtime: Runtime, state: CampaignState) -> HoldoutMeasured | str:
    """Run the pairs and return the gain, or why it could not be measured."""
    best = winner(runtime, state)
    assert best is not None
    seeds = holdout_seeds(runtime.campaign.file.campaign.seed)
    measured = []
    for part, config in enumerate((runtime.campaign.menu.default, best)):
        metrics = _series(runtime, state, config, seeds, part)
        if isinstance(metrics, str):
            return metrics
        measured.append(metrics)
    assert state.best_attempt_id is not None
    return _verdict(runtime, state.best_attempt_id, measured[0], measured[1])


def _series(
    runtime: Runtime, state: CampaignState, config: Config, seeds: Sequence[int], part: int
) -> dict[int, float] | str:
    """Measure what is missing, or return why it cannot be; what failed before this look is tried again.

    Raises:
        TrainerError: see `_why_failed`.
    """
    with runtime.writing() as writer:
        config_id = writer.config(config)

    def stored() -> Series:
        return series_of(stored_trials(runtime, state, config_id, split="holdout"))

    for number, seed in enumerate(seeds, 1 + part * len(seeds)):
        failed: list[TrialResult] = []
        while seed not in stored().metrics:
            if len(failed) == TRIES:
                return _why_failed(runtime, failed, seed)
            result = run_trial(
                runtime, config, seed, purpose="holdout", split="holdout", number=number, of=2 * len(seeds),
                replicate=stored().last_replicate.get(seed, -1) + 1,
            )  # fmt: skip
            if result.failure is not None:
                failed.append(result)
    metrics = stored().metrics
    return {seed: metrics[seed] for seed in seeds}


def _why_failed(runtime: Runtime, failed: Sequence[TrialResult], seed: int) -> str:
    """Return why a seed cannot be measured, where trying once more would not help.

    Raises:
        TrainerError: memory or the harness failed, with time left: both configurations ran before, so that passes.
    """
    failure = failed[-1].failure
    time_is_over = runtime.deadline is not None and runtime.clock() >= runtime.deadline
    if time_is_over or all(result.failure in REPEATABLE for result in failed):
        return f"a holdout trial failed ({failure})"
    raise TrainerError(
        f"campaign `{runtime.name}`: a holdout trial failed ({failure}) on seed {seed}, though its configuration ran "
        f"before: {last_line(failed[-1].trace)}; free what it needs and run again to look at the holdout"
    )


def _verdict(
    runtime: Runtime, winner_attempt_id: int, baseline: Mapping[int, float], candidate: Mapping[int, float]
) -> HoldoutMeasured:
    """Return the paired gain with its interval by Student's t."""
    from scipy.special import stdtrit

    settings = runtime.campaign.decision
    sign = settings.sign / gain_scale(baseline, settings.gain)
    gains = [sign * (candidate[seed] - baseline[seed]) for seed in baseline]
    mean, n = math.fsum(gains) / len(gains), len(gains)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * Spread.from_values(gains).sd / math.sqrt(n)
    return HoldoutMeasured(
        campaign=runtime.name,
        winner_attempt_id=winner_attempt_id,
        baseline_metric=math.fsum(baseline.values()) / n,
        metric=math.fsum(candidate.values()) / n,
        gain=mean,
        gain_low=mean - half,
        gain_high=mean + half,
        seeds=n,
        fresh_data=runtime.info is None or runtime.info.holdout_data,
    )
