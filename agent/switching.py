"""The `route` node: settle the duel that is over, weigh the evidence, and let the champion change where it says so.

A switch is one transaction: its row with the evidence, the aliases, the event. Whether there is anything to do is
found in the store between two turns, so that a campaign that was killed at any moment comes to the same champion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Literal

from overnight.agent import contest, duels
from overnight.agent.contest import Challenge, Standing, label_of, stored_id
from overnight.agent.contest_events import (
    DuelSettled,
    PredecessorWeighed,
    Promoted,
    PromotionAsked,
    PromotionDeclined,
    RolledBack,
    SwitchRefused,
    Weighed,
)
from overnight.agent.events import Event
from overnight.agent.evidence import Evidence
from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.protocol import Proposer
from overnight.agent.race_gate import NOT_BESIDE, NOT_RACED
from overnight.agent.router import route_predecessor, why_not
from overnight.agent.runtime import Runtime
from overnight.store.contests import Duel, NewPromotion, Switch
from overnight.store.errors import InputError
from overnight.store.hashing import JsonValue, canonical_json
from overnight.store.protocol import CampaignState, Position

REQUESTS = ("promote_requested", "rollback_requested")
ANSWERS = ("promoted", "rolled_back", "switch_refused", "promotion_declined")
Answer = Literal["yes", "no", "later"]


def due(runtime: Runtime, state: CampaignState, position: Position, *, over: bool) -> Literal["race", "route"] | None:
    """Return what comes before the turn at `position`, whose first try it is.

    Args:
        runtime: the campaign.
        state: where it stands.
        position: the turn that comes next.
        over: whether the campaign's budget is used up: then only what is measured already is brought to its end.
    """
    standing = contest.standing(runtime, state)
    stood = runtime.stood
    if stood is None or not contest.is_contested(runtime):
        return None
    if stood.clear_before == (position.iteration, over):
        return None
    if duels.to_settle(runtime, state, position) is not None or _request(runtime, state) is not None:
        return "route"
    if not over:
        challenge = standing.challenge
        if challenge is not None and _needs_race(runtime, challenge, position):
            return "race"
        if _switch_due(runtime, standing):
            return "route"
    stood.clear_before = position.iteration, over
    return None


def _needs_race(runtime: Runtime, challenge: Challenge, position: Position) -> bool:
    """Whether a challenger has to be looked back at now.

    A student is once, when it was trained, and again after `distill.every` turns while only answers are wanting.
    Whoever else challenges is when everything but the gate speaks for it, and again after `distill.every` turns while
    the gate alone stands against it. Anybody is at once when the champion is another than the one of its last race.
    """
    file, turn, race = runtime.campaign.file, position.iteration - 1, challenge.race
    heldout = file.router.evidence == "heldout"
    if race is None:
        due = challenge.evidence.reached or (heldout and turn % file.distill.every == 0)
        return due or challenge.distillation_id is not None
    if challenge.gate == NOT_BESIDE:
        return challenge.evidence.reached or heldout or challenge.distillation_id is not None
    if turn - race.iteration < file.distill.every:
        return False
    if challenge.distillation_id is not None:
        return challenge.gate.wants is not None and race.held_out > 1
    if challenge.gate.holds:
        return heldout
    return challenge.evidence.reached or (heldout and turn % file.distill.every == 0)


def _switch_due(runtime: Runtime, standing: Standing) -> bool:
    if standing.back is not None and standing.back.action == "rollback":
        return True
    challenge = standing.challenge
    if challenge is None:
        return False
    action = challenge.route.action
    return action == "promote" or (action == "ask" and challenge.id not in runtime.deferred)


def _request(runtime: Runtime, state: CampaignState) -> tuple[int, str, Mapping[str, JsonValue]] | None:
    """Return what a person asked for and nobody has done yet."""
    last = runtime.store.last_of(state.id, (*REQUESTS, *ANSWERS))
    return last if last is not None and last[1] in REQUESTS else None


def route(runtime: Runtime, state: CampaignState, position: Position) -> None:
    """Bring the last duel to its item, and the champion to what duels, races and people say."""
    turn = position.iteration - 1
    duel = duels.to_settle(runtime, state, position)
    if duel is not None:
        _settle(runtime, state, duel, turn)
    request = _request(runtime, state)
    if request is not None:
        _do_as_asked(runtime, state, turn, request)
    standing = contest.standing(runtime, state)
    if standing.back is not None and standing.back.action == "rollback":
        assert standing.predecessor is not None
        assert standing.returning is not None
        evidence = _numbers(standing.returning)
        _switch(
            runtime,
            standing,
            standing.predecessor,
            "rollback",
            turn=turn,
            evidence=evidence,
            reason=standing.back.reason,
        )
    elif standing.challenge is not None and standing.challenge.route.action in ("promote", "ask"):
        _promote(runtime, state, standing, standing.challenge, turn)
    contest.forget(runtime)


def _settle(runtime: Runtime, state: CampaignState, duel: Duel, turn: int) -> None:
    """Store a duel's item with what the evidence says now: one transaction, whatever happens to this process."""
    settled = duels.settle(runtime, state, duel)
    sides = duel.champion_id, duel.challenger_id
    champion, challenger = (runtime.store.contestant(who).label for who in sides)
    more = () if settled.item is None else (settled.item,)
    _, evidence = contest.weigh_pair(runtime, state, duel.kind, *sides, more=more)
    gate = (
        NOT_RACED if duel.kind == "return" else contest.gate_now(runtime, state, duel.challenger_id, duel.champion_id)
    )
    words = route_predecessor(evidence).reason if duel.kind == "return" else why_not(evidence, gate)
    failures = () if duel.kind == "return" else gate.failures
    with runtime.writing() as writer:
        writer.settle_duel(settled)
        runtime.emit(
            DuelSettled(
                campaign=runtime.name,
                iteration=duel.iteration,
                champion=champion,
                challenger=challenger,
                item=settled.item,
                note=settled.note,
            )
        )
        kind = PredecessorWeighed if duel.kind == "return" else Weighed
        names = champion, challenger
        runtime.emit(weighed(kind, runtime.name, turn, names=names, evidence=evidence, words=words, gate=failures))
    contest.forget(runtime)


def _promote(runtime: Runtime, state: CampaignState, standing: Standing, challenge: Challenge, turn: int) -> None:
    """Promote, or ask first where the campaign says so."""
    reason, who = challenge.route.reason, label_of(challenge.proposer)
    by: Literal["router", "person"] = "router"
    if challenge.route.action == "ask":
        if challenge.id in runtime.deferred:
            return
        answer = _asked(runtime, who, label_of(standing.champion), reason)
        assert challenge.id is not None
        name, whose = runtime.name, challenge.id
        if answer == "no":
            with runtime.writing():
                runtime.emit(PromotionDeclined(campaign=name, iteration=turn, challenger=who, proposer_id=whose))
            return
        if answer == "later":
            runtime.deferred.add(challenge.id)
            waiting = runtime.store.last_event(state.id, "promotion_asked")
            if waiting is None or waiting[1].get("proposer_id") != challenge.id:
                with runtime.writing():
                    runtime.emit(
                        PromotionAsked(campaign=name, iteration=turn, challenger=who, proposer_id=whose, reason=reason)
                    )
            return
        by, reason = "person", f"a person agreed: {reason}"
    evidence = {**_numbers(challenge.evidence), **_gate_numbers(challenge)}
    _switch(
        runtime, standing, challenge.proposer, "promotion", turn=turn, evidence=evidence, reason=reason, decided_by=by
    )


def _asked(runtime: Runtime, challenger: str, champion: str, reason: str) -> Answer:
    """Ask whoever runs the graph; without a checkpointer nobody can answer, and the question waits."""
    from langgraph.config import get_config
    from langgraph.types import interrupt

    try:
        can_ask = get_config().get("configurable", {}).get("__pregel_checkpointer") is not None
    except RuntimeError:
        can_ask = False
    if not can_ask:
        return "later"
    question = {"question": "promote", "campaign": runtime.name, "challenger": challenger, "champion": champion}
    answer = interrupt({**question, "reason": reason, "answers": ["yes", "no", "later"]})
    return answer if answer in ("yes", "no") else "later"


def _switch(
    runtime: Runtime,
    standing: Standing,
    to: Proposer,
    kind: Switch,
    *,
    turn: int,
    evidence: Mapping[str, JsonValue],
    reason: str,
    decided_by: Literal["router", "person"] = "router",
    request_event_id: int | None = None,
) -> None:
    """Change the champion, in one transaction."""
    names = {"from_proposer": label_of(standing.champion), "to_proposer": label_of(to)}
    said: Event
    if kind == "promotion":
        said = Promoted(campaign=runtime.name, iteration=turn, **names, decided_by=decided_by, reason=reason)
    else:
        said = RolledBack(campaign=runtime.name, iteration=turn, **names, decided_by=decided_by, reason=reason)
    with runtime.writing() as writer:
        writer.promotion(
            NewPromotion(
                iteration=turn,
                kind=kind,
                from_proposer_id=stored_id(writer, standing.champion),
                to_proposer_id=stored_id(writer, to),
                evidence=evidence,
                decided_by=decided_by,
                reason=reason,
                request_event_id=request_event_id,
            )
        )
        runtime.emit(said)


def _do_as_asked(
    runtime: Runtime, state: CampaignState, turn: int, request: tuple[int, str, Mapping[str, JsonValue]]
) -> None:
    """Do what a person asked of the running campaign, or record why it cannot be done."""
    event_id, kind, said = request
    try:
        by_hand(runtime, state, turn, kind, said, request_event_id=event_id)
    except InputError as error:
        with runtime.writing():
            runtime.emit(SwitchRefused(campaign=runtime.name, iteration=turn, reason=str(error)))


def by_hand(
    runtime: Runtime,
    state: CampaignState,
    turn: int,
    kind: str,
    said: Mapping[str, JsonValue],
    *,
    request_event_id: int | None = None,
) -> Switch:
    """Promote or roll back because a person says so.

    Raises:
        InputError: there is no such contestant, it is the champion already, or nothing was promoted.
    """
    to = check_by_hand(runtime, state, kind, said)
    standing = contest.standing(runtime, state)
    reason = str(said.get("reason") or "asked by a person")
    switch: Switch = "promotion" if kind == "promote_requested" else "rollback"
    numbers = {} if standing.challenge is None else _numbers(standing.challenge.evidence)
    if switch == "rollback":
        numbers = {} if standing.returning is None else _numbers(standing.returning)
    _switch(
        runtime,
        standing,
        to,
        switch,
        turn=turn,
        evidence=numbers,
        reason=reason,
        decided_by="person",
        request_event_id=request_event_id,
    )
    contest.forget(runtime)
    return switch


def check_by_hand(runtime: Runtime, state: CampaignState, kind: str, said: Mapping[str, JsonValue]) -> Proposer:
    """Return whom a person wants for champion; writes nothing.

    Raises:
        InputError: there is no such contestant, it is the champion already, or nothing was promoted.
    """
    standing = contest.standing(runtime, state)
    if kind == "rollback_requested":
        if standing.predecessor is None:
            raise InputError(f"campaign `{runtime.name}`: nothing was promoted, so there is nobody to roll back to")
        return standing.predecessor
    to = named(runtime, state, str(said.get("proposer")))
    if label_of(to) == label_of(standing.champion):
        raise InputError(f"campaign `{runtime.name}`: `{label_of(to)}` is the champion already")
    return to


def named(runtime: Runtime, state: CampaignState, name: str) -> Proposer:
    """Return the contestant that a person names: `nim`, `student` (its newest adapter) or `student@v2`.

    One that serves adapters elsewhere has the one that its table asks for, if no version is named.

    Raises:
        InputError: the campaign has none such; the message lists those it has.
    """
    bare, _, version = name.partition("@")
    if bare not in runtime.proposers:
        known = ", ".join(f"`{each}`" for each in runtime.proposers)
        raise InputError(f"campaign `{runtime.name}` has no proposer `{bare}`; it has {known}")
    plain = runtime.proposers[bare]
    if not isinstance(plain, contest.AdapterProposer) or (isinstance(plain, OpenAIProposer) and plain.wanted is None):
        if version:
            raise InputError(f"`{bare}` is no student, so it has no version `{version}`; leave `@{version}` out")
        return plain
    found = _version_of(runtime, state, plain, version)
    if isinstance(found, contest.Unusable):
        raise InputError(f"`{label_of(found)}` cannot be promoted: {found.why}")
    return found


def _version_of(runtime: Runtime, state: CampaignState, plain: contest.AdapterProposer, version: str) -> Proposer:
    if version:
        folder = contest.adapter_folder(runtime, state, plain, version)
        if folder is None:
            words = f"has no adapter `{version}` of `{plain.name}`; see `distillations`"
            raise InputError(f"campaign `{runtime.name}` {words}")
        return contest.with_adapter(runtime, plain, version, folder)
    if isinstance(plain, OpenAIProposer):
        return contest.seated(runtime, state, plain.name)
    newest = runtime.store.newest_adapter(state.id, plain.name)
    return plain if newest is None else contest.with_adapter(runtime, plain, newest[1], newest[2])


def weighed(
    kind: type[Weighed],
    campaign: str,
    turn: int,
    *,
    names: tuple[str, str],
    evidence: Evidence,
    words: str,
    gate: Sequence[str],
) -> Weighed:
    """Return the event that says how far a challenger is; `names` are champion and challenger."""
    low, high = evidence.interval or (None, None)
    return kind(
        campaign=campaign,
        iteration=turn,
        champion=names[0],
        challenger=names[1],
        e_value=evidence.e_value,
        threshold=evidence.threshold,
        duels=evidence.duels,
        wins=evidence.wins,
        losses=evidence.losses,
        needed=evidence.needed,
        mean=evidence.mean,
        low=low,
        high=high,
        sign_p=evidence.sign_p,
        gate=list(gate),
        words=words,
    )


def _numbers(evidence: Evidence) -> dict[str, JsonValue]:
    plain: dict[str, JsonValue] = json.loads(canonical_json(asdict(evidence)))
    return plain


def _gate_numbers(challenge: Challenge) -> dict[str, JsonValue]:
    race_id = None if challenge.race is None else challenge.race.id
    return {"race_id": race_id, "gate": list(challenge.gate.failures) or "holds", "challenger_number": challenge.number}
