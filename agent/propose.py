"""The `propose` node: ask whoever has the turn, and store the prompt with the reply before anything judges it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from overnight.agent import duels
from overnight.agent.contest import stored_id
from overnight.agent.duels import DuelTurn
from overnight.agent.events import GridRefined, ProposalFailed, Proposed, TurnStarted
from overnight.agent.measure import series_of, stored_trials
from overnight.agent.proposers.protocol import Answer, Ask, Observation
from overnight.agent.runtime import Runtime
from overnight.agent.signals import PauseRequested
from overnight.agent.state import BudgetSpent, TurnState, TurnUpdate
from overnight.agent.turns import (
    Turn,
    narrowed,
    open_moves,
    open_neighbours,
    plan_turn,
    rejections,
    request_reply,
    turn_prompt,
)
from overnight.rails.menu import Change
from overnight.store.errors import CampaignError, ProposerError, TrainerError
from overnight.store.protocol import CampaignState, NewAttempt, Position, TrajectoryStore
from overnight.store.records import Config
from overnight.store.tables import utc_now


def propose(runtime: Runtime, state: TurnState) -> TurnUpdate:
    """Ask whoever has the turn, and store the prompt with the reply."""
    campaign = runtime.state()
    position = runtime.store.next_stage(campaign.id)
    assert campaign.baseline_config_id is not None
    baseline = runtime.store.config_of(campaign.baseline_config_id)
    try:
        moves = _moves_or_wait(runtime, campaign, baseline)
    except PauseRequested:
        return {"stage": "done", "stop_reason": "paused"}
    except BudgetSpent as spent:
        return {"stage": "finish", "stop_reason": spent.reason}
    asked_for = position.try_no == 1 and bool(runtime.store.pending_requests(campaign.id))
    if not moves and not asked_for:  # a person may ask for what no grid has
        return _refine_or_finish(runtime, campaign, state)
    totals = runtime.store.knob_totals(campaign.id)
    turn = plan_turn(runtime, campaign, position, totals=totals, moves=moves)
    if turn.duel is not None and turn.duel.answers_stored:
        return _ask(runtime, position, turn, *_stored_ask(runtime, campaign, position, turn.duel))
    baseline_metric = _mean_metric(runtime, campaign, campaign.baseline_config_id)
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
        neighbours=open_neighbours(runtime, campaign, baseline, narrowed(moves, turn.knobs)),
        rejections=rejections(runtime, campaign, position),
        history=StoredHistory(runtime.store, campaign.id),
        seed=runtime.draw_seed("propose", position.iteration, position.try_no),
    )
    return _ask(runtime, position, turn, ask, campaign.baseline_config_id)


def _moves_or_wait(runtime: Runtime, campaign: CampaignState, baseline: Config) -> tuple[Change, ...]:
    """Return the open moves; where not even the baseline fits, the memory is somebody else's, and it waits for it.

    Raises:
        PauseRequested: a pause was asked for meanwhile.
        BudgetSpent: the campaign's time ran out meanwhile.
        TrainerError: the memory has been taken for too long.
    """
    while not (moves := open_moves(runtime, campaign, baseline)):
        if "R7_capability" in runtime.campaign.file.rails.skip:
            break
        shortage = runtime.capability().problem(baseline)
        if shortage is None:
            break
        error = TrainerError(f"campaign `{runtime.name}`: no change fits now, nor does the baseline, {shortage}")
        runtime.faults.hold("memory", error)
    runtime.faults.over("memory")
    return moves


def _mean_metric(runtime: Runtime, campaign: CampaignState, config_id: str) -> float | None:
    metrics = series_of(stored_trials(runtime, campaign, config_id)).metrics
    return math.fsum(metrics.values()) / len(metrics) if metrics else None


def _stored_ask(runtime: Runtime, campaign: CampaignState, position: Position, duel: DuelTurn) -> tuple[Ask, str]:
    """Return what a duel's first side was asked, as it was then, with the baseline's id."""
    first = duels.first_attempt(runtime, duel)
    assert first.prompt_id is not None
    assert first.baseline_config_id is not None
    baseline = runtime.store.config_of(first.baseline_config_id)
    moves = open_moves(runtime, campaign, baseline, before=first.iteration)
    ask = Ask(
        iteration=position.iteration,
        prompt=runtime.store.prompts_of([first.prompt_id])[first.prompt_id],
        menu=runtime.campaign.menu,
        direction=runtime.campaign.file.metric.direction,
        baseline=baseline,
        baseline_metric=_mean_metric(runtime, campaign, first.baseline_config_id),
        moves=moves,
        neighbours=open_neighbours(runtime, campaign, baseline, moves, before=first.iteration),
        history=StoredHistory(runtime.store, campaign.id, before=first.id),
        seed=runtime.draw_seed("propose", position.iteration, position.try_no),
    )
    return ask, first.baseline_config_id


def _ask(runtime: Runtime, position: Position, turn: Turn, ask: Ask, baseline_config_id: str) -> TurnUpdate:
    where = {"iteration": position.iteration, "try_no": position.try_no}
    name = turn.proposer.name
    runtime.emit(TurnStarted(campaign=runtime.name, **where, proposer=name, role=turn.role))
    started, answer, failed = utc_now(), None, None
    try:
        with runtime.waiting():
            answer = _answer(runtime, turn, ask)
    except PauseRequested:  # the question is put again at the next run
        return {"stage": "done", "stop_reason": "paused"}
    except ProposerError as error:
        failed = error
    with runtime.writing() as writer:
        attempt_id = writer.attempt(
            NewAttempt(
                **where,
                role=turn.role,
                proposer_id=stored_id(writer, turn.proposer),
                baseline_config_id=baseline_config_id,
                prompt=ask.prompt,
                audit=_is_audited(runtime, position),
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
        if turn.duel is not None:
            duels.record(writer, position, turn.duel, attempt_id)
    if answer is not None:
        runtime.emit(Proposed(campaign=runtime.name, **where, proposer=name, latency_s=answer.latency_s))
    if failed is None:
        return {"stage": "check_rails", "attempt_id": attempt_id}
    runtime.emit(
        ProposalFailed(campaign=runtime.name, **where, proposer=name, failure=failed.failure, reason=str(failed))
    )
    return {"stage": "propose", "attempt_id": attempt_id}


def _is_audited(runtime: Runtime, position: Position) -> bool:
    """Whether the turn is audited, drawn beforehand; what pairs show tells nothing where seeds do not pair."""
    drawn = runtime.draw_unit("audit", position.iteration) < runtime.campaign.file.decision.audit
    return drawn and runtime.state().trainer_kind != "unseeded"


def _answer(runtime: Runtime, turn: Turn, ask: Ask) -> Answer:
    """Return the answer, and record when a proposer begins to fail and when it answers again.

    Raises:
        ProposerError: no answer. A proposer that answered before and now cannot be used is as good as away.
        CampaignError: the champion of the campaign file never answered and cannot be used.
    """
    if turn.request is not None:
        return Answer(reply=request_reply(turn.request[1]), latency_s=0.0, settings={"requested": True})
    name = turn.proposer.name
    fault = f"proposer:{name}"
    try:
        answer = turn.proposer.propose(ask)
    except ProposerError as error:
        runtime.faults.began(fault, str(error), iteration=ask.iteration)
        raise
    except CampaignError as error:
        named = turn.proposer is runtime.proposers[runtime.campaign.champion]
        if named and name not in runtime.answered:
            raise
        runtime.faults.began(fault, str(error), iteration=ask.iteration)
        raise ProposerError(str(error), failure="llm_error") from error
    runtime.answered.add(name)
    if turn.role != "fallback":  # which may have the same name, and always answers
        runtime.faults.over(fault)
    return answer


def _refine_or_finish(runtime: Runtime, campaign: CampaignState, state: TurnState) -> TurnUpdate:
    """Grid float ranges finer, once; with nothing left then, the campaign is over."""
    if campaign.refinement > 0:
        return {"stage": "finish", "stop_reason": "menu_exhausted"}
    refinement = campaign.refinement + 1
    with runtime.writing(changes_campaign=True) as writer:
        writer.refined(refinement)
        runtime.emit(GridRefined(campaign=runtime.name, refinement=refinement))
    return propose(runtime, state)


class StoredHistory:
    """Implements `History` over the store, whole or as it was before an attempt."""

    def __init__(self, store: TrajectoryStore, campaign_id: int, *, before: int | None = None) -> None:
        self._store, self._campaign_id, self._before = store, campaign_id, before

    def since(self, attempt_id: int) -> Iterator[Observation]:
        """Yield the attempts decided after `attempt_id`, oldest first."""
        for row in self._store.measured_since(self._campaign_id, attempt_id):
            if self._before is not None and row.attempt_id >= self._before:
                return
            yield Observation(row.attempt_id, row.config, row.metric, row.failure)
