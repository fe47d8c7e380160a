"""The nodes of the graph: each does one stage of one attempt and commits it in one transaction.

A node reads where it stands from the store, never from the graph's state, which only carries what a host application
wants to know. Running a node again after a crash writes nothing twice.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypedDict

from overnight.agent import calibrate as calibration
from overnight.agent import distilling, duels, switching
from overnight.agent import finish as finishing
from overnight.agent import race as racing
from overnight.agent.budget import stop_reason
from overnight.agent.distilling import distill_due, say_waiting
from overnight.agent.events import Accepted, Blocked, Decided, Trained, Validated
from overnight.agent.measure import Standing, last_line, measure_candidate, standing
from overnight.agent.propose import propose
from overnight.agent.runtime import Runtime
from overnight.agent.signals import PauseRequested
from overnight.agent.state import ASKED, BudgetSpent, StageName, TurnState, TurnUpdate
from overnight.rails.gate import check_reply
from overnight.rails.menu import Change
from overnight.store.protocol import Attempt, CampaignState, Measurement, NewDecision, NewVerdict, Position
from overnight.store.records import FailureClass, KnobValue, Outcome
from overnight.trainer.noise import Spread
from overnight.trainer.output import cut

VETO = "veto"
"""What stands in an attempt's `rail` when a node of the host's own was against it."""
__all__ = ["calibrate", "check_rails", "decide", "distill", "finish", "propose", "race", "route", "train", "validate"]


def next_stage(runtime: Runtime) -> StageName:
    """Return the node that goes on with the campaign, from what is committed."""
    state = runtime.state()
    if runtime.info is None:
        return "calibrate"
    if (state.environment_hash, state.trainer_hash) != (runtime.environment_hash, runtime.trainer_hash):
        return "calibrate"  # which measures the baseline anew, or refuses other data
    position = runtime.store.next_stage(state.id)
    if position.stage == "propose" and position.try_no == 1:
        reason = stop_reason(runtime, state, position)
        due = _due(runtime, state, position, reason)
        if due is not None:
            return due
        if reason is not None:
            return "done" if reason == ASKED else "finish"
    return position.stage


def _due(runtime: Runtime, state: CampaignState, position: Position, reason: str | None) -> StageName | None:
    """Return what comes between two turns; once the budget is used up, only what brings a duel to its end."""
    if reason is None and distill_due(runtime, state, position.iteration - 1) == "due":
        return "distill"
    return switching.due(runtime, state, position, over=reason is not None)


def _onward(runtime: Runtime) -> TurnUpdate:
    """Go on after what came between two turns."""
    stage = next_stage(runtime)
    return {"stage": stage if stage in ("distill", "race", "route", "finish") else "done"}


def calibrate(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Measure the baseline where the present environment lacks it."""
    try:
        calibration.calibrate(runtime)
    except PauseRequested:
        return {"stage": "done", "stop_reason": "paused"}
    except BudgetSpent as spent:
        return {"stage": "finish", "stop_reason": spent.reason}
    stage = next_stage(runtime)
    return {"stage": stage, "stop_reason": ASKED} if stage == "done" else {"stage": stage}


def check_rails(runtime: Runtime, state: TurnState) -> TurnUpdate:
    """Put the reply through the rails, and before a host's own node that may be against it."""
    campaign, attempt = _current(runtime)
    assert attempt.baseline_config_id is not None
    baseline = runtime.store.config_of(attempt.baseline_config_id)
    verdict = check_reply(
        attempt.reply or "", menu=runtime.campaign.menu, baseline=baseline, rails=runtime.rails(campaign)
    )
    veto = state.get("veto")
    if verdict.passed and veto is not None:
        verdict = replace(verdict, rail=VETO, reason=cut(veto))
    proposal = verdict.proposal
    on_menu = verdict.value is not None
    with runtime.writing() as writer:
        writer.verdict(
            NewVerdict(
                attempt_id=attempt.id,
                rail=verdict.rail,
                rail_reason=verdict.reason,
                knob=proposal.knob if proposal and proposal.knob in runtime.campaign.menu.by_name else None,
                new_value=verdict.value if on_menu else _scalar(proposal.new_value if proposal else None),
                reason=proposal.reason if proposal else None,
                config=verdict.config,
                diff=verdict.diff,
            )
        )
    if verdict.rail is not None:
        where = {"iteration": attempt.iteration, "try_no": attempt.try_no}
        runtime.emit(Blocked(campaign=runtime.name, **where, rail=verdict.rail, reason=verdict.reason))
        again = runtime.store.next_stage(campaign.id)
        if again.iteration == attempt.iteration:
            return {"stage": "propose", "attempt_id": attempt.id}
        return _turn_over(runtime, attempt.id)
    assert proposal is not None
    assert verdict.value is not None
    change = Change(proposal.knob, verdict.value)
    runtime.emit(
        Accepted(
            campaign=runtime.name,
            iteration=attempt.iteration,
            proposer=attempt.proposer,
            knob=change.knob,
            old_value=baseline[change.knob],
            new_value=change.value,
        )
    )
    return {"stage": "train", "attempt_id": attempt.id}


def _scalar(value: object) -> KnobValue | None:
    """Return a refused value as far as a column can show it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    return value[:100] if isinstance(value, str) else value if abs(value) < 1e300 else None


def train(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Run trials of the candidate until the decision rule needs no more."""
    campaign, attempt = _current(runtime)
    try:
        measure_candidate(runtime, campaign, attempt)
    except PauseRequested:
        return {"stage": "done", "attempt_id": attempt.id, "stop_reason": "paused"}
    except BudgetSpent as spent:  # the candidate keeps its trials and waits for a budget that reaches
        return {"stage": "finish", "attempt_id": attempt.id, "stop_reason": spent.reason}
    with runtime.writing() as writer:
        writer.trained(attempt.id)
    runtime.emit(Trained(campaign=runtime.name, iteration=attempt.iteration))
    return {"stage": "validate", "attempt_id": attempt.id}


def validate(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Turn the candidate's trials into one result, or into the failure that ended them."""
    campaign, attempt = _current(runtime)
    now = standing(runtime, campaign, attempt)
    trials = runtime.store.trials_of_attempt(attempt.id)
    energies = [trial.energy_wh for trial in trials if trial.energy_wh is not None]
    result = _result_of(now)
    with runtime.writing() as writer:
        writer.measurement(
            Measurement(
                attempt_id=attempt.id,
                **result,
                failure=now.failure,
                trace=now.trace,
                notes=next((trial.notes for trial in reversed(trials) if trial.notes), ""),
                wall_s=math.fsum(trial.wall_s or 0.0 for trial in trials) + (attempt.proposal_latency_s or 0.0),
                energy_wh=math.fsum(energies) if energies else None,
            )
        )
    runtime.emit(
        Validated(
            campaign=runtime.name,
            iteration=attempt.iteration,
            metric=result["metric"],
            gain=result["gain"],
            failure=now.failure,
        )
    )
    return {"stage": "decide", "attempt_id": attempt.id}


class _Result(TypedDict):
    metric: float | None
    metric_se: float | None
    baseline_metric: float | None
    gain: float | None
    gain_se: float | None
    gain_lower: float | None
    trials: int


def _result_of(now: Standing) -> _Result:
    own, verdict = now.candidate.metrics, now.verdict
    paired = [now.baseline.metrics[seed] for seed in own if seed in now.baseline.metrics]
    known = verdict is not None and bool(own)
    mean = math.fsum(own.values()) / len(own) if known else None
    sd = Spread.from_values(list(own.values())).sd if known and len(own) > 1 else None
    return {
        "metric": mean,
        "metric_se": sd / math.sqrt(len(own)) if sd is not None else None,
        "baseline_metric": math.fsum(paired) / len(paired) if known and paired else None,
        "gain": verdict.gain if verdict else None,
        "gain_se": verdict.gain_se if verdict else None,
        "gain_lower": verdict.lower_bound if verdict else None,
        "trials": len(own),
    }


def decide(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Keep or revert, and in a rolling campaign make a keep the new baseline."""
    campaign, attempt = _current(runtime)
    now = standing(runtime, campaign, attempt)
    outcome: Outcome
    failure: FailureClass | None = now.failure
    if now.verdict is None:
        outcome, explanation = "failed", f"{failure}: {last_line(now.trace)}"
    else:
        outcome = "kept" if now.verdict.action == "keep" else "reverted"
        explanation = now.verdict.explanation
    rolling = runtime.campaign.file.campaign.baseline == "rolling"
    if outcome == "kept" and rolling and attempt.baseline_config_id != campaign.baseline_config_id:
        better, words = duels.beats_kept(runtime, campaign, now)
        outcome, explanation = ("kept" if better else "reverted"), f"{explanation}; {words}"
    is_best = outcome == "kept" and _beats_best(runtime, campaign, now)
    with runtime.writing(changes_campaign=outcome == "kept", changes_noise=attempt.audit) as writer:
        writer.decision(
            NewDecision(
                attempt_id=attempt.id,
                outcome=outcome,
                explanation=explanation,
                is_best=is_best,
                new_baseline_config_id=attempt.config_id if outcome == "kept" and rolling else None,
            )
        )
    return _turn_over(runtime, attempt.id)


def _beats_best(runtime: Runtime, campaign: CampaignState, now: Standing) -> bool:
    """A rolling campaign's keep beats what was best, which was its baseline; a fixed one compares gains."""
    if runtime.campaign.file.campaign.baseline == "rolling" or campaign.best_attempt_id is None:
        return True
    best = runtime.store.attempt(campaign.best_attempt_id)
    assert now.verdict is not None
    return best.gain is None or (now.verdict.gain or 0.0) > best.gain


def _turn_over(runtime: Runtime, attempt_id: int) -> TurnUpdate:
    attempt = runtime.store.attempt(attempt_id)
    assert attempt.outcome is not None
    runtime.emit(
        Decided(
            campaign=runtime.name,
            iteration=attempt.iteration,
            proposer=attempt.proposer,
            knob=attempt.knob,
            new_value=attempt.new_value,
            outcome=attempt.outcome,
            metric=attempt.metric,
            gain=attempt.gain,
            failure=attempt.failure,
            rail=attempt.rail,
            trials=attempt.trials,
            explanation=attempt.decision or attempt.rail_reason or "",
            is_best=bool(attempt.is_best),
        )
    )
    campaign = runtime.state()
    position = runtime.store.next_stage(campaign.id)
    reason = stop_reason(runtime, campaign, position)
    best = None if campaign.best_attempt_id is None else runtime.store.attempt(campaign.best_attempt_id).metric
    over: TurnUpdate = {"attempt_id": attempt_id, "outcome": attempt.outcome, "best": best}
    due = _due(runtime, campaign, position, reason)
    if due is not None:
        return {**over, "stage": due}
    if reason == ASKED:
        return {**over, "stage": "done", "stop_reason": ASKED}
    if reason is not None:
        return {**over, "stage": "finish"}
    if distill_due(runtime, campaign, position.iteration - 1) == "waiting":
        say_waiting(runtime, campaign, position.iteration - 1)
    return {**over, "stage": "done"}


def distill(runtime: Runtime, state: TurnState) -> TurnUpdate:
    """Train the challenger on the history up to now; a race and a route may follow."""
    update = distilling.distill(runtime, state)
    return update if update.get("stop_reason") else _onward(runtime)


def race(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Look back over the held-out turns for a challenger; whatever it meets, the campaign goes on."""
    try:
        racing.look_back(runtime, runtime.state())
    except PauseRequested:
        return {"stage": "done", "stop_reason": "paused"}
    except BudgetSpent as spent:
        return {"stage": "finish", "stop_reason": spent.reason}
    return _onward(runtime)


def route(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Settle the duel that is over, and change the champion where the evidence, or a person, says so."""
    campaign = runtime.state()
    switching.route(runtime, campaign, runtime.store.next_stage(campaign.id))
    return _onward(runtime)


def finish(runtime: Runtime, state: TurnState) -> TurnUpdate:
    """Measure the winner on the locked holdout, once, and close the campaign."""
    campaign = runtime.state()
    position = runtime.store.next_stage(campaign.id)
    reason = state.get("stop_reason") or stop_reason(runtime, campaign, position) or "iterations"
    try:
        finishing.finish(runtime, campaign, reason, position.iteration - 1)
    except PauseRequested:
        return {"stage": "done", "stop_reason": "paused"}
    return {"stage": "done", "stop_reason": reason}


def _current(runtime: Runtime) -> tuple[CampaignState, Attempt]:
    """Return the campaign and the attempt that its next stage works on."""
    campaign = runtime.state()
    attempt = runtime.store.last_attempt(campaign.id)
    assert attempt is not None
    return campaign, attempt
