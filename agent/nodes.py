"""The nodes of the graph: each does one stage of one attempt and commits it in one transaction.

A node reads where it stands from the store, never from the graph's state, which only carries what a host application
wants to know. Running a node again after a crash writes nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, TypedDict

from overnight.agent import calibrate as calibration
from overnight.agent import finish as finishing
from overnight.agent.events import Accepted, Blocked, Decided, GridRefined, ProposalFailed, TurnStarted
from overnight.agent.measure import PauseRequested, Standing, measure_candidate, series_of, standing, stored_trials
from overnight.agent.proposers.protocol import Answer, Ask, Observation
from overnight.agent.runtime import Runtime
from overnight.agent.turns import (
    Turn,
    narrowed,
    open_moves,
    plan_turn,
    rejections,
    request_reply,
    turn_prompt,
)
from overnight.rails.gate import check_reply
from overnight.rails.menu import Change
from overnight.store.errors import ProposerError
from overnight.store.protocol import (
    Attempt,
    CampaignState,
    Measurement,
    NewAttempt,
    NewDecision,
    NewVerdict,
    Position,
)
from overnight.store.records import FailureClass, KnobValue, Outcome
from overnight.store.tables import utc_now
from overnight.trainer.noise import Spread

ASKED = "iterations_asked"
"""The turns asked for in this run are done, though the campaign's budget is not: it pauses and keeps its holdout."""
StageName = Literal["calibrate", "propose", "check_rails", "train", "validate", "decide", "finish", "done"]


class TurnInput(TypedDict):
    """What the graph is invoked with."""

    campaign: str


class TurnOutput(TypedDict, total=False):
    """What one invocation, one turn, gives back."""

    attempt_id: int | None
    outcome: Outcome | None
    best: float | None
    stop_reason: str | None


class TurnUpdate(TurnOutput, total=False):
    """What a node hands on; never history."""

    stage: StageName


class TurnState(TurnInput, TurnUpdate):
    """The graph's state."""


def next_stage(runtime: Runtime) -> StageName:
    """Return the node that goes on with the campaign, from what is committed."""
    state = runtime.state()
    if runtime.info is None or state.environment_hash != runtime.environment_hash:
        return "calibrate"
    position = runtime.store.next_stage(state.id)
    if position.stage == "propose" and position.try_no == 1:
        reason = stop_reason(runtime, state, position)
        if reason is not None:
            return "done" if reason == ASKED else "finish"
    return position.stage


def stop_reason(runtime: Runtime, state: CampaignState, position: Position) -> str | None:
    """Return which budget is used up before the turn at `position`, or None."""
    budget, spent = runtime.campaign.file.budget, runtime.store.spent(state.id)
    done = position.iteration - 1
    if done >= budget.iterations:
        return "iterations"
    if runtime.iterations is not None and done >= runtime.iterations:
        return ASKED
    if runtime.deadline is not None and runtime.clock() >= runtime.deadline:
        return "until"
    if budget.gpu_hours is not None and spent.trial_hours >= budget.gpu_hours:
        return "gpu_hours"
    if budget.energy_kwh is not None and spent.energy_kwh >= budget.energy_kwh:
        return "energy_kwh"
    if budget.patience is not None and min(spent.since_keep, done) >= budget.patience:
        return "patience"
    return None


def calibrate(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Prepare the trainer, and measure the baseline where the present environment lacks it."""
    try:
        calibration.calibrate(runtime)
    except PauseRequested:
        return {"stage": "done", "stop_reason": "paused"}
    return {"stage": next_stage(runtime)}


def propose(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Ask whoever has the turn, and store the prompt with the reply."""
    campaign = runtime.state()
    position = runtime.store.next_stage(campaign.id)
    assert campaign.baseline_config_id is not None
    baseline = runtime.store.config_of(campaign.baseline_config_id)
    moves = open_moves(runtime, campaign, baseline)
    if not moves:
        return _refine_or_finish(runtime, campaign)
    totals = runtime.store.knob_totals(campaign.id)
    turn = plan_turn(runtime, campaign, position, totals)
    metrics = series_of(stored_trials(runtime, campaign, campaign.baseline_config_id)).metrics
    baseline_metric = math.fsum(metrics.values()) / len(metrics) if metrics else None
    prompt = turn_prompt(
        runtime,
        campaign,
        baseline=baseline,
        baseline_metric=baseline_metric,
        totals=totals,
        turns=position.iteration - 1,
    )
    ask = Ask(
        iteration=position.iteration,
        prompt=prompt,
        menu=runtime.campaign.menu,
        direction=runtime.campaign.file.metric.direction,
        baseline=baseline,
        baseline_metric=baseline_metric,
        moves=narrowed(moves, turn.knobs),
        rejections=rejections(runtime, campaign, position),
        history=StoredHistory(runtime, campaign),
        seed=runtime.draw_seed("propose", position.iteration, position.try_no),
    )
    return _ask(runtime, campaign, position, turn, ask)


def _ask(runtime: Runtime, campaign: CampaignState, position: Position, turn: Turn, ask: Ask) -> TurnUpdate:
    where = {"iteration": position.iteration, "try_no": position.try_no}
    name = turn.proposer.name
    runtime.emit(TurnStarted(campaign=runtime.name, **where, proposer=name, role=turn.role))
    started, answer, failed = utc_now(), None, None
    try:
        answer = _answer(turn, ask)
    except ProposerError as error:
        failed = error
    assert campaign.baseline_config_id is not None
    with runtime.writing() as writer:
        description = turn.proposer.describe()
        attempt_id = writer.attempt(
            NewAttempt(
                **where,
                role=turn.role,
                proposer_id=writer.proposer(name, str(description.get("kind", name)), description),
                baseline_config_id=campaign.baseline_config_id,
                prompt=ask.prompt,
                audit=runtime.draw_unit("audit", position.iteration) < runtime.campaign.file.decision.audit,
                request_event_id=turn.request[0] if turn.request else None,
                reply=answer.reply if answer else None,
                settings=answer.settings if answer else {},
                usage=answer.usage if answer else {},
                probabilities=answer.probabilities if answer else {},
                latency_s=answer.latency_s if answer else None,
                failure=failed.failure if failed else None,
                trace=str(failed) if failed else "",
                started_at=started,
            )
        )
    if failed is None:
        return {"stage": "check_rails", "attempt_id": attempt_id}
    runtime.emit(
        ProposalFailed(campaign=runtime.name, **where, proposer=name, failure=failed.failure, reason=str(failed))
    )
    return {"stage": "propose", "attempt_id": attempt_id}


def _answer(turn: Turn, ask: Ask) -> Answer:
    if turn.request is not None:
        return Answer(reply=request_reply(turn.request[1]), latency_s=0.0, settings={"requested": True})
    return turn.proposer.propose(ask)


def _refine_or_finish(runtime: Runtime, campaign: CampaignState) -> TurnUpdate:
    """Grid float ranges finer, once; with nothing left then, the campaign is over."""
    if campaign.refinement > 0:
        return {"stage": "finish", "stop_reason": "menu_exhausted"}
    refinement = campaign.refinement + 1
    runtime.emit(GridRefined(campaign=runtime.name, refinement=refinement))
    with runtime.writing(changes_campaign=True) as writer:
        writer.refined(refinement)
    return {"stage": "propose"}


class StoredHistory:
    """Implements `History` over the store."""

    def __init__(self, runtime: Runtime, campaign: CampaignState) -> None:
        self._runtime, self._campaign = runtime, campaign

    def since(self, attempt_id: int) -> Iterator[Observation]:
        """Yield the attempts decided after `attempt_id`, oldest first."""
        for row in self._runtime.store.measured_since(self._campaign.id, attempt_id):
            yield Observation(row.attempt_id, row.config, row.metric, row.failure)


def check_rails(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Put the reply through the rails."""
    campaign, attempt = _current(runtime)
    assert attempt.baseline_config_id is not None
    baseline = runtime.store.config_of(attempt.baseline_config_id)
    verdict = check_reply(
        attempt.reply or "", menu=runtime.campaign.menu, baseline=baseline, rails=runtime.rails(campaign)
    )
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
    with runtime.writing() as writer:
        writer.trained(attempt.id)
    return {"stage": "validate", "attempt_id": attempt.id}


def validate(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Turn the candidate's trials into one result, or into the failure that ended them."""
    campaign, attempt = _current(runtime)
    now = standing(runtime, campaign, attempt)
    trials = runtime.store.trials_of_attempt(attempt.id)
    energies = [trial.energy_wh for trial in trials if trial.energy_wh is not None]
    with runtime.writing() as writer:
        writer.measurement(
            Measurement(
                attempt_id=attempt.id,
                **_result_of(now),
                failure=now.failure,
                trace=now.trace,
                notes=next((trial.notes for trial in reversed(trials) if trial.notes), ""),
                wall_s=math.fsum(trial.wall_s or 0.0 for trial in trials) + (attempt.proposal_latency_s or 0.0),
                energy_wh=math.fsum(energies) if energies else None,
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
        outcome, explanation = "failed", f"{failure}: {_last_line(now.trace)}"
    else:
        outcome = "kept" if now.verdict.action == "keep" else "reverted"
        explanation = now.verdict.explanation
    is_best = outcome == "kept" and _beats_best(runtime, campaign, now)
    rolling = runtime.campaign.file.campaign.baseline == "rolling"
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


def _last_line(trace: str) -> str:
    return next((line.strip()[:200] for line in reversed(trace.splitlines()) if line.strip()), "no trace")


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
    if reason == ASKED:
        return {**over, "stage": "done", "stop_reason": ASKED}
    return {**over, "stage": "finish" if reason else "done"}


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
