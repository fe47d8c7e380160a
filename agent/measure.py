"""Spending trials: the baseline's calibration, and a candidate's seeds one after another until the rule has enough.

Every finished trial is committed at once under its key, so that a killed campaign repeats at most the trial that was
running. Pairs are formed on the same seed, environment and execution mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overnight.agent.budget import check_trial
from overnight.agent.decide import Verdict, judge, seed_order
from overnight.agent.events import TrialDropped, TrialFinished, TrialStarted, TrialStepped
from overnight.agent.runtime import Runtime
from overnight.agent.seeds import audit_seeds
from overnight.agent.signals import PauseRequested
from overnight.agent.state import BudgetSpent
from overnight.store import clock
from overnight.store.errors import StorageFaultError, TrainerError
from overnight.store.hashing import digest
from overnight.store.protocol import Attempt, CampaignState, NewTrial, Trial
from overnight.store.records import Config, FailureClass, Purpose, Split, TrialProgress, TrialRequest, TrialResult

DUEL_ROLES = ("duel_champion", "duel_challenger")
PROBE_STEPS = 2
HARNESS_RETRIES = 1
"""How often a trial is run again when the harness, not the candidate, was at fault."""


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
    """Sum a configuration's trials up, oldest first; a later good run of a seed makes up for a failed one."""
    metrics: dict[int, float] = {}
    failures: dict[int, list[Trial]] = {}
    last: dict[int, int] = {}
    for trial in trials:
        if trial.seed is None:
            continue
        last[trial.seed] = trial.replicate
        if trial.metric is not None:
            metrics.setdefault(trial.seed, trial.metric)
        else:
            failures.setdefault(trial.seed, []).append(trial)
    failed = [runs[-1] for seed, runs in failures.items() if seed not in metrics and not _may_retry(runs)]
    return Series(metrics, failed[0] if failed else None, last)


def _may_retry(runs: Sequence[Trial]) -> bool:
    return len(runs) <= HARNESS_RETRIES and all(run.failure == "harness" for run in runs)


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
    """Run one trial and commit it; a result that the disk has no room for is kept until it has.

    Raises:
        PauseRequested: a pause was asked for; nothing was run, or a trial under way was dropped (SIGTERM).
        BudgetSpent: it would not be over in time, or took too long and was dropped.
    """
    if runtime.pause_wanted() is not None:
        raise PauseRequested
    check_trial(runtime, runtime.state(), purpose)
    iteration = None if attempt is None else attempt.iteration
    name = runtime.name
    runtime.emit(TrialStarted(campaign=name, iteration=iteration, purpose=purpose, number=number, of=of))

    def report(progress: TrialProgress) -> None:
        event = TrialStepped(campaign=name, step=progress.step, steps=progress.steps, loss=progress.loss)
        runtime.emit(event)

    timeout_s = runtime.campaign.file.budget.trial_timeout_s
    began = clock.time()
    try:
        with runtime.waiting():
            result = runtime.trainer.run(TrialRequest(config, seed, split, timeout_s), report)
    except (PauseRequested, BudgetSpent) as ended:
        reason = ended.reason if isinstance(ended, BudgetSpent) else runtime.switch.reason or "a pause"
        wall_s = clock.time() - began
        dropped = TrialDropped(campaign=name, iteration=iteration, purpose=purpose, reason=reason, wall_s=wall_s)
        runtime.emit(dropped)
        raise
    finally:
        runtime.trial_ends_by = None
    new = NewTrial(
        attempt_id=None if attempt is None else attempt.id,
        purpose=purpose,
        config_id=digest(config),
        trainer_hash=runtime.trainer_hash,
        environment_hash=runtime.environment_hash,
        split=split,
        seed=seed,
        replicate=replicate,
        result=result,
        ended_at=clock.utc_text(clock.time()),
    )
    _tell_faults(runtime, result, iteration)
    _commit(runtime, config, new)
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


def probe(runtime: Runtime, state: CampaignState) -> None:
    """Try two steps of the baseline, which ran before: whether the harness works, at the cost of no turn.

    Raises:
        TrainerError: it does not.
        PauseRequested: SIGTERM came.
    """
    assert state.baseline_config_id is not None
    config = runtime.store.config_of(state.baseline_config_id)
    timeout_s = runtime.campaign.file.budget.trial_timeout_s
    request = TrialRequest(config, calibration_seeds(runtime)[0], "val", timeout_s, max_steps=PROBE_STEPS)
    with runtime.waiting():
        result = runtime.trainer.run(request, lambda _progress: None)
    if result.failure is not None:
        raise TrainerError(f"not even the baseline runs now ({result.failure}): {last_line(result.trace)}")
    runtime.faults.over("trainer")


def _commit(runtime: Runtime, config: Config, new: NewTrial) -> None:
    """Store a trial, waiting for the disk where it must: what was measured is not measured again."""
    while True:
        try:
            with runtime.writing() as writer:
                writer.config(config)
                writer.trial(new)
        except StorageFaultError as error:
            runtime.faults.hold("storage", error)
            continue
        runtime.trials.pop((new.config_id, new.split), None)
        runtime.own_trials.clear()
        return


def _tell_faults(runtime: Runtime, result: TrialResult, iteration: int | None) -> None:
    """Record what went wrong with the machine rather than with the candidate, or that it works again."""
    if result.failure == "oom":
        runtime.faults.noted("out_of_memory", last_line(result.trace), iteration=iteration)
    elif result.failure == "harness":
        runtime.faults.noted("worker", last_line(result.trace), iteration=iteration)
    elif result.metric is not None:
        runtime.has_measured = True
        runtime.faults.over("trainer")


def stored_trials(runtime: Runtime, state: CampaignState, config_id: str, *, split: Split = "val") -> Sequence[Trial]:
    """Read the trials of a configuration that decisions look at, in the present environment, oldest first.

    Kept while this process runs. Those of audits, duels and races, of which a baseline that stays gathers thousands,
    are on seeds of their own (`trials_on`).
    """
    key = (config_id, split)
    if key not in runtime.trials:
        runtime.trials = {key: trials_on(runtime, state, config_id, runtime.decision_seeds, split=split)}
    return runtime.trials[key]


def trials_on(
    runtime: Runtime, state: CampaignState, config_id: str, seeds: range, *, split: Split = "val"
) -> Sequence[Trial]:
    """Read a configuration's trials on consecutive seeds in the present environment, oldest first."""
    where = {"trainer_hash": runtime.trainer_hash, "environment_hash": runtime.environment_hash}
    return runtime.store.trials_of(state.id, config_id, **where, split=split, seeds=seeds)


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
    aside: Purpose | None = None
    """`audit` or `duel`: the next trial is one that no decision looks at."""


def standing(runtime: Runtime, state: CampaignState, attempt: Attempt) -> Standing:
    """Judge a candidate from its stored trials; asking again after a crash gives the same answer."""
    assert attempt.config_id is not None
    assert attempt.baseline_config_id is not None
    trials = _own_trials(runtime, attempt)
    baseline_trials = stored_trials(runtime, state, attempt.baseline_config_id)
    own, baseline = series_of(looks(trials)), series_of(baseline_trials)
    if own.failure is not None:
        return Standing(None, own, baseline, None, own.failure.failure, own.failure.trace or "")
    settings = runtime.campaign.decision
    # What this attempt itself adds to the baseline must not change the order that it began with.
    before = sorted(series_of([t for t in baseline_trials if t.attempt_id != attempt.id]).metrics)
    order = seed_order(before or calibration_seeds(runtime), attempt.iteration, settings.max_trials)
    noise = runtime.noise(state)
    kind = state.trainer_kind or "noisy"
    verdict = judge(own.metrics, baseline.metrics, order, noise=noise, settings=settings, kind=kind)
    if verdict.action == "measure":
        return Standing(verdict, own, baseline, verdict.seed)
    if attempt.audit and settings.rule == "confirmed":
        seed = _next_audit(runtime, state, attempt, trials)
        if seed is not None:
            return Standing(verdict, own, baseline, seed, aside="audit")
    seed = _next_of_duel(runtime, state, attempt, trials)
    return Standing(verdict, own, baseline, seed, aside=None if seed is None else "duel")


def _own_trials(runtime: Runtime, attempt: Attempt) -> Sequence[Trial]:
    """Return the candidate's own trials in the present environment; an attempt may pay for its baseline's too."""
    if attempt.id not in runtime.own_trials:
        here = (attempt.config_id, runtime.trainer_hash, runtime.environment_hash)
        trials = runtime.store.trials_of_attempt(attempt.id)
        own = [trial for trial in trials if (trial.config_id, trial.trainer_hash, trial.environment_hash) == here]
        runtime.own_trials = {attempt.id: own}
    return runtime.own_trials[attempt.id]


def looks(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that decisions look at: all but those of audits, duels and races."""
    return [trial for trial in trials if trial.purpose not in ("audit", "duel", "race")]


def _next_audit(runtime: Runtime, state: CampaignState, attempt: Attempt, own: Sequence[Trial]) -> int | None:
    """Return the next seed of a turn's audit; one that failed is over, and changes no decision."""
    assert attempt.baseline_config_id is not None
    seeds = audit_seeds(attempt.iteration)
    baseline = trials_on(runtime, state, attempt.baseline_config_id, seeds)
    return _next_of_pair(own, baseline, seeds)


def _next_of_duel(runtime: Runtime, state: CampaignState, attempt: Attempt, own: Sequence[Trial]) -> int | None:
    """Return the duel's seed while baseline or candidate lack it; a side that failed on it is over."""
    if attempt.role not in DUEL_ROLES or attempt.try_no > 1:
        return None
    duel = runtime.store.last_duel(state.id)
    if duel is None or attempt.id not in (duel.champion_attempt_id, duel.challenger_attempt_id):
        return None
    assert attempt.baseline_config_id is not None
    seeds = range(duel.seed, duel.seed + 1)
    return _next_of_pair(own, trials_on(runtime, state, attempt.baseline_config_id, seeds), seeds)


def _next_of_pair(own: Sequence[Trial], baseline: Sequence[Trial], seeds: range) -> int | None:
    """Return the first seed that one of two configurations lacks, or None once both have all, or one failed."""
    sides = [series_of([trial for trial in side if trial.seed in seeds]) for side in (own, baseline)]
    if any(side.failure for side in sides):
        return None
    return next((seed for seed in seeds if any(seed not in side.metrics for side in sides)), None)


def calibration_seeds(runtime: Runtime) -> list[int]:
    """Return the seeds that the campaign calibrates on: the first of those for decisions."""
    return list(runtime.decision_seeds[: runtime.campaign.decision.calibration_trials])


def measure_candidate(runtime: Runtime, state: CampaignState, attempt: Attempt) -> Standing:
    """Run trials of a candidate, and of the baseline where it lacks the seed, until the rule needs no more.

    Raises:
        PauseRequested: a pause was asked for between two trials.
        TrainerError: the baseline, which ran before, failed; no candidate answers for that.
    """
    of = runtime.campaign.decision.max_trials
    while True:
        now = standing(runtime, state, attempt)
        if now.next_seed is None:
            return now
        number = len(now.candidate.metrics) + 1
        _run_next(runtime, state, attempt, now, number=number, of=of)


def _run_next(runtime: Runtime, state: CampaignState, attempt: Attempt, now: Standing, *, number: int, of: int) -> None:
    """Run the next trial: the baseline's half of the pair first, where it lacks the seed."""
    assert attempt.config_id is not None
    assert attempt.baseline_config_id is not None
    seed = now.next_seed
    assert seed is not None
    baseline = series_of(trials_on(runtime, state, attempt.baseline_config_id, range(seed, seed + 1)))
    if seed not in baseline.metrics:
        config_id, series = attempt.baseline_config_id, baseline
        purpose: Purpose = now.aside or "baseline"
    else:
        config_id, series = attempt.config_id, series_of(_own_trials(runtime, attempt))
        purpose = now.aside or ("confirmation" if now.candidate.metrics else "screening")
    result = run_trial(
        runtime,
        runtime.store.config_of(config_id),
        seed,
        purpose=purpose,
        attempt=attempt,
        replicate=_next_replicate(runtime, state, config_id, seed),
        number=number,
        of=of,
    )
    first_harness = result.failure == "harness" and seed not in series.last_replicate
    counts = now.aside is None and config_id == attempt.baseline_config_id
    if result.failure is not None and counts and not first_harness:
        raise TrainerError(
            f"campaign `{runtime.name}`: the baseline failed ({result.failure}) on seed {seed}, though it ran before: "
            f"{last_line(result.trace)}; free what it needs and run again to go on"
        )


def _next_replicate(runtime: Runtime, state: CampaignState, config_id: str, seed: int) -> int:
    """Return the number of the next run of a seed, whoever ran it before: an earlier attempt may have lost some."""
    runs = trials_on(runtime, state, config_id, range(seed, seed + 1))
    return max((run.replicate for run in runs), default=-1) + 1


def last_line(trace: str) -> str:
    """Return the last line of a trace that says something, cut."""
    return next((line.strip()[:300] for line in reversed(trace.splitlines()) if line.strip()), "no trace")
