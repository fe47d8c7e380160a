"""The start of a campaign, or of a new environment: measure the baseline on several seeds.

One seed is run twice, which tells whether the trainer repeats exactly, roughly, or ignores its seed. It refuses to
start what cannot work: a baseline that does not run, data that changed, a gain that cannot be told from noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from overnight.agent.decide import check_resolvable
from overnight.agent.events import Calibrated, EnvironmentChanged
from overnight.agent.measure import calibration_seeds, last_line, run_trial, series_of, stored_trials
from overnight.agent.runtime import Runtime
from overnight.store.errors import CampaignError, TrainerError
from overnight.store.protocol import CampaignState
from overnight.store.records import Config, FailureClass, TrainerKind, TrialResult
from overnight.trainer.noise import Spread, classify, paired_noise, trial_noise


def calibrate(runtime: Runtime) -> None:
    """Measure the baseline where the present environment lacks it.

    Raises:
        CampaignError: the campaign cannot be run as it is; the message says what to change.
        TrainerError: the device or the harness is at fault.
        PauseRequested: a pause was asked for.
        BudgetSpent: a budget ends before the baseline is measured.
    """
    state = runtime.state()
    check_same_trainer(runtime, state)
    if is_calibrated(runtime, state):
        return
    baseline = (
        runtime.campaign.menu.default
        if state.baseline_config_id is None
        else runtime.store.config_of(state.baseline_config_id)
    )
    _check_runs_here(runtime, baseline)
    if state.environment_hash is not None and not _was_told(runtime, state):
        runtime.emit(EnvironmentChanged(campaign=runtime.name, changed=changed_environment(runtime, state)))
    _measure_baseline(runtime, state, baseline)
    _conclude(runtime, state, baseline)


def check_same_trainer(runtime: Runtime, state: CampaignState) -> None:
    """Refuse a trainer whose results would not compare with those that are stored.

    Raises:
        CampaignError: its data, its settings or its function changed since the campaign began.
    """
    if state.trainer_hash is not None and state.trainer_hash != runtime.trainer_hash:
        raise CampaignError(
            f"campaign `{runtime.name}`: the trainer's data or settings changed since it began; put them back, or "
            "start a new campaign (`overnight run --fresh`, or another `name`)"
        )


def is_calibrated(runtime: Runtime, state: CampaignState) -> bool:
    """Whether the baseline was measured in the present environment."""
    return state.environment_hash == runtime.environment_hash and state.baseline_config_id is not None


def changed_environment(runtime: Runtime, state: CampaignState) -> list[str]:
    """Return what differs between the environment that the campaign was last calibrated in and the present one."""
    before: Mapping[str, str] = json.loads(state.environment or "{}")
    assert runtime.info is not None
    now = runtime.info.environment
    return sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


def _check_runs_here(runtime: Runtime, baseline: Config) -> None:
    problem = runtime.capability().problem(baseline)
    if problem and "R7_capability" not in runtime.campaign.file.rails.skip:
        raise CampaignError(f"{runtime.campaign.path}: the baseline cannot run here: {problem} as a knob's `default`")


def _was_told(runtime: Runtime, state: CampaignState) -> bool:
    """Whether the change was recorded by a run that was cut off before it had measured the baseline."""
    changed = runtime.store.last_event(state.id, "environment_changed")
    measured = runtime.store.last_event(state.id, "calibrated")
    return changed is not None and (measured is None or changed[0] > measured[0])


def _measure_baseline(runtime: Runtime, state: CampaignState, baseline: Config) -> None:
    """Run what is missing: each calibration seed once, the first of them twice.

    A baseline that was kept here has trials on these seeds already. They are why it was kept, so that they say too
    little about the noise, and do not count.
    """
    seeds = calibration_seeds(runtime)
    runs = [*seeds, seeds[0]] if len(seeds) > 1 else seeds
    with runtime.writing() as writer:
        config_id = writer.config(baseline)
    for number, seed in enumerate(runs, 1):
        trials = [trial for trial in stored_trials(runtime, state, config_id) if trial.seed == seed]
        good = sum(trial.purpose == "calibration" and trial.metric is not None for trial in trials)
        if good >= (2 if number > len(seeds) else 1):
            continue
        replicate = max((trial.replicate for trial in trials), default=-1) + 1
        result = run_trial(
            runtime, baseline, seed, purpose="calibration", replicate=replicate, number=number, of=len(runs)
        )
        if result.failure is not None:
            _refuse(runtime, result)


def _refuse(runtime: Runtime, result: TrialResult) -> None:
    what = f"the baseline failed ({result.failure}): {last_line(result.trace)}"
    if result.failure == "harness":
        raise TrainerError(f"campaign `{runtime.name}`: {what}")
    raise CampaignError(f"{runtime.campaign.path}: {what}; {remedy_of(result.failure)}")


def remedy_of(failure: FailureClass | None) -> str:
    """Return what to do about a baseline that failed."""
    return {
        "oom": "choose smaller defaults",
        "timeout": "raise `budget.trial_timeout_s` or choose smaller defaults",
        "nan": "choose a smaller default learning rate",
        "unsupported": "choose other defaults",
    }.get(failure or "", "mend the trainer or its settings")


def _conclude(runtime: Runtime, state: CampaignState, baseline: Config) -> None:
    """Record what kind of trainer it is and how noisy, or refuse a gain that cannot be resolved."""
    with runtime.writing() as writer:
        config_id = writer.config(baseline)
    trials = [trial for trial in stored_trials(runtime, state, config_id) if trial.purpose == "calibration"]
    series = series_of(trials)
    calibrated = [series.metrics[seed] for seed in calibration_seeds(runtime)]
    first = [t.metric for t in trials if t.seed == calibration_seeds(runtime)[0] and t.metric is not None]
    kind: TrainerKind = "noisy" if len(first) < 2 else classify([(first[0], first[1])], calibrated)
    noise_sd = Spread.from_values(calibrated).sd if len(calibrated) > 1 else None
    _check_resolvable(runtime, kind, dict(zip(calibration_seeds(runtime), calibrated, strict=True)))
    assert runtime.info is not None
    with runtime.writing(changes_campaign=True, changes_noise=True) as writer:
        writer.trainer(runtime.info, kind, noise_sd)
        writer.baseline(config_id)
        position = runtime.store.next_stage(state.id)
        if position.attempt_id is not None:  # it was being measured in another environment
            writer.measured_anew(position.attempt_id)
        runtime.emit(  # inside: its row is committed with what it says
            Calibrated(
                campaign=runtime.name,
                trainer_kind=kind,
                baseline_metric=math.fsum(calibrated) / len(calibrated),
                noise_sd=noise_sd,
                trials=len(trials),
            )
        )


def _check_resolvable(runtime: Runtime, kind: TrainerKind, baseline: Mapping[int, float]) -> None:
    """Refuse a campaign that could never keep anything, before anything but its trials is recorded."""
    if runtime.campaign.file.metric.gain == "relative" and math.fsum(baseline.values()) == 0:
        raise CampaignError(
            f"{runtime.campaign.path}: the baseline's `{runtime.campaign.file.metric.name}` is 0, so a relative gain "
            'means nothing; set `gain = "absolute"` in `[metric]`'
        )
    if len(baseline) < 2:
        return
    spread = Spread.from_values(list(baseline.values()))
    noise = trial_noise(spread) if kind == "unseeded" else paired_noise(spread)
    problem = check_resolvable(noise, runtime.campaign.decision, baseline, kind)
    if problem:
        raise CampaignError(f"{runtime.campaign.path}: `decision`: {problem}")
