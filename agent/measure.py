"""Spending trials: the baseline's calibration, and a candidate's seeds one after another until the rule has enough.

Every finished trial is committed at once under its key, so that a killed campaign repeats at most the trial that was
running. Pairs are formed on the same seed, environment and execution mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overnight.agent.decide import Verdict, judge, seed_order
from overnight.agent.events import TrialFinished, TrialStarted, TrialStepped
from overnight.agent.runtime import Runtime
from overnight.store.protocol import Attempt, CampaignState, NewTrial, Trial
from overnight.store.records import Config, FailureClass, Purpose, Split, TrialProgress, TrialRequest, TrialResult

HARNESS_RETRIES = 1
"""How often a trial is run again when the harness, not the candidate, was at fault."""


class PauseRequested(Exception):
    """Somebody asked to pause; raised between trials, handled by the node."""


@dataclass(frozen=True, slots=True)
class Series:
    """A configuration's trials on one split in the present environment."""

    metrics: dict[int, float]
    """By seed; the first good run of each."""
    failure: Trial | None
    """The trial that ended the series, if one failed for good."""
    last_replicate: dict[int, int]
    """By seed; the number of the last run."""


def series_of(trials: Sequence[Trial]) -> Series:
    """Sum a configuration's trials up, oldest first."""
    metrics: dict[int, float] = {}
    harness: dict[int, int] = {}
    last: dict[int, int] = {}
    failure = None
    for trial in trials:
        if trial.seed is None:
            continue
        last[trial.seed] = trial.replicate
        if trial.metric is not None:
            metrics.setdefault(trial.seed, trial.metric)
        elif trial.failure == "harness" and harness.get(trial.seed, 0) < HARNESS_RETRIES:
            harness[trial.seed] = harness.get(trial.seed, 0) + 1
        else:
            failure = trial
    return Series(metrics, failure, last)


def run_trial(
    runtime: Runtime,
    config: Config,
    seed: int,
    *,
    purpose: Purpose,
    attempt: Attempt | None = None,
    replicate: int = 0,
    split: Split = "val",
    number: int = 1,
    of: int = 1,
) -> TrialResult:
    """Run one trial and commit it.

    Raises:
        PauseRequested: a pause was asked for; nothing was run.
    """
    if runtime.pause_wanted() is not None:
        raise PauseRequested
    iteration = None if attempt is None else attempt.iteration
    name = runtime.name
    runtime.emit(TrialStarted(campaign=name, iteration=iteration, purpose=purpose, number=number, of=of))

    def report(progress: TrialProgress) -> None:
        event = TrialStepped(campaign=name, step=progress.step, steps=progress.steps, loss=progress.loss)
        runtime.emit(event)

    timeout_s = runtime.campaign.file.budget.trial_timeout_s
    result = runtime.trainer.run(TrialRequest(config, seed, split, timeout_s), report)
    with runtime.writing() as writer:
        writer.trial(
            NewTrial(
                attempt_id=None if attempt is None else attempt.id,
                purpose=purpose,
                config_id=writer.config(config),
                trainer_hash=runtime.trainer_hash,
                environment_hash=runtime.environment_hash,
                split=split,
                seed=seed,
                replicate=replicate,
                result=result,
            )
        )
    runtime.emit(
        TrialFinished(
            campaign=name,
            iteration=iteration,
            purpose=purpose,
            metric=result.metric,
            failure=result.failure,
            wall_s=result.wall_s,
        )
    )
    return result


def stored_trials(runtime: Runtime, state: CampaignState, config_id: str, *, split: Split = "val") -> Sequence[Trial]:
    """Read a configuration's trials in the present environment, oldest first."""
    where = {"trainer_hash": runtime.trainer_hash, "environment_hash": runtime.environment_hash}
    return runtime.store.trials_of(state.id, config_id, **where, split=split)


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known about a candidate so far."""

    verdict: Verdict | None
    """None once it failed."""
    candidate: Series
    baseline: Series
    next_seed: int | None
    """The seed to measure next, or None when nothing more is needed."""
    failure: FailureClass | None = None
    trace: str = ""


def standing(runtime: Runtime, state: CampaignState, attempt: Attempt) -> Standing:
    """Judge a candidate from its stored trials; asking again after a crash gives the same answer."""
    assert attempt.config_id is not None
    assert attempt.baseline_config_id is not None
    own = series_of([t for t in runtime.store.trials_of_attempt(attempt.id) if t.config_id == attempt.config_id])
    trials = stored_trials(runtime, state, attempt.baseline_config_id)
    baseline = series_of(trials)
    failed = own.failure or baseline.failure
    if failed is not None:
        return Standing(None, own, baseline, None, failed.failure, failed.trace or "")
    settings = runtime.campaign.decision
    # What this attempt itself adds to the baseline must not change the order that it began with.
    before = sorted(series_of([trial for trial in trials if trial.attempt_id != attempt.id]).metrics)
    order = seed_order(before or calibration_seeds(runtime), attempt.iteration, settings.max_trials)
    noise = runtime.noise_for(state, attempt.id)
    kind = state.trainer_kind or "noisy"
    verdict = judge(own.metrics, baseline.metrics, order, noise=noise, settings=settings, kind=kind)
    unmeasured = [seed for seed in order if seed not in own.metrics or seed not in baseline.metrics]
    audited = attempt.audit and settings.rule == "confirmed"
    next_seed = verdict.seed if verdict.action == "measure" else unmeasured[0] if audited and unmeasured else None
    return Standing(verdict, own, baseline, next_seed)


def calibration_seeds(runtime: Runtime) -> list[int]:
    """Return the seeds that the campaign calibrates on: apart from every other campaign seed's."""
    first = runtime.campaign.file.campaign.seed * 1000
    return [first + i for i in range(runtime.campaign.decision.calibration_trials)]


def measure_candidate(runtime: Runtime, state: CampaignState, attempt: Attempt) -> Standing:
    """Run trials of a candidate, and of the baseline where it lacks the seed, until the rule needs no more.

    Raises:
        PauseRequested: a pause was asked for between two trials.
    """
    assert attempt.config_id is not None
    assert attempt.baseline_config_id is not None
    of = runtime.campaign.decision.max_trials
    while True:
        now = standing(runtime, state, attempt)
        seed = now.next_seed
        if seed is None:
            return now
        if seed not in now.baseline.metrics:
            config = runtime.store.config_of(attempt.baseline_config_id)
            purpose: Purpose = "baseline"
            replicate = now.baseline.last_replicate.get(seed, -1) + 1
        else:
            config = runtime.store.config_of(attempt.config_id)
            purpose = _purpose(now)
            replicate = now.candidate.last_replicate.get(seed, -1) + 1
        number = len(now.candidate.metrics) + 1
        run_trial(runtime, config, seed, purpose=purpose, attempt=attempt, replicate=replicate, number=number, of=of)


def _purpose(now: Standing) -> Purpose:
    if not now.candidate.metrics:
        return "screening"
    return "confirmation" if now.verdict is not None and now.verdict.action == "measure" else "audit"
