"""Looking back: champion, challenger and controls answer the stored prompts of turns that no student was trained on.

It is a gate, never the evidence: it shows whether a challenger answers legally, fast, and not the same whatever it is
asked. Every answered turn is committed at once, so that a race that was killed goes on where it was. An endpoint that
is down or a model that does not load loses answers, which are missing and count neither for nor against; a held-out
turn that was in the training rows fails the whole race.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overnight.agent import contest
from overnight.agent.answers import DRAWS, answer_turn
from overnight.agent.budget import ending_in_time, time_left
from overnight.agent.contest import Standing, label_of, stored_id
from overnight.agent.contest_events import RaceFinished, RaceStarted, RaceStepped, Weighed
from overnight.agent.proposers.protocol import Proposer, Rewindable
from overnight.agent.race_gate import gate_on
from overnight.agent.router import why_not
from overnight.agent.runtime import Runtime
from overnight.agent.signals import PauseRequested
from overnight.agent.state import BudgetSpent
from overnight.agent.switching import weighed
from overnight.agent.turns import prompt_frame
from overnight.distill.adapter import read_record
from overnight.distill.corpus import reconstruct_prompts
from overnight.store.contests import HeldOutTurn, NewRace, adapter_version
from overnight.store.errors import CampaignError
from overnight.store.learning import Distillation
from overnight.store.protocol import CampaignState

FAILURES_IN_A_ROW = 3
"""After so many turns without an answer a contestant is not asked any more in this race."""
UNTRAINED_TURNS = 20
"""Turns to look back over where nobody was trained on any, and the campaign has so many."""
NOTHING = "there is no held-out turn to look back at"


@dataclass(slots=True)
class Contender:
    """Somebody who answers, as the store knows it."""

    proposer: Proposer
    id: int
    label: str
    failed: int = 0
    """Turns in a row without an answer."""
    failure: str | None = None
    """Why it last gave none."""
    gone: bool = False
    """Whether it cannot be used here at all."""

    @property
    def is_asked(self) -> bool:
        """Whether there is still hope."""
        return not self.gone and self.failed < FAILURES_IN_A_ROW


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a race is to be run over, and by whom."""

    standing: Standing
    turns: Sequence[HeldOutTurn]
    distillation: Distillation | None
    contenders: Sequence[Contender] = field(default_factory=list)
    challenger_id: int | None = None
    made_here: frozenset[Path] = frozenset()
    """Folders of the adapters that this campaign's distillations made: only those know this store's attempts."""


def look_back(runtime: Runtime, state: CampaignState, *, draws: int = DRAWS) -> int:
    """Run the race, or go on with the one that was cut off; return its id.

    Raises:
        PauseRequested: a pause was asked for between two turns; what was answered is there.
    """
    plan = plan_race(runtime, state)
    leak = find_leak(plan)
    race = None if leak else runtime.store.open_race(state.id, plan.challenger_id)
    turn = runtime.store.next_stage(state.id).iteration - 1
    if race is None:
        with runtime.writing() as writer:
            race_id = writer.begin_race(
                NewRace(
                    iteration=turn,
                    distillation_id=None if plan.distillation is None else plan.distillation.id,
                    challenger_id=plan.challenger_id,
                    held_out=len(plan.turns),
                )
            )
    else:
        race_id = race.id
    names = [contender.label for contender in plan.contenders]
    runtime.emit(RaceStarted(campaign=runtime.name, iteration=turn, proposers=names, items=len(plan.turns)))
    if leak is None:
        _answer_all(runtime, state, plan, race_id, draws)
    _conclude(runtime, state, plan, race_id, turn=turn, leak=leak)
    return race_id


def plan_race(runtime: Runtime, state: CampaignState) -> Plan:
    """Return the held-out turns and who answers them; imported turns get the prompts that they never had."""
    if runtime.store.unprompted(state.id):
        with runtime.writing() as writer:
            reconstruct_prompts(runtime.store, state, prompt_frame(runtime.campaign), writer)
    standing = contest.standing(runtime, state)
    challenge = standing.challenge
    distillation = _distillation(runtime, state, challenge)
    turns = [turn for turn in _held_out(runtime, state, distillation) if turn.prompt_id is not None]
    controls = [contest.seated(runtime, state, name) for name in runtime.campaign.file.router.controls]
    named = runtime.campaign.file.router.challenger
    others = [contest.seated(runtime, state, named)] if challenge is None and named is not None else []
    asked = [standing.champion, *([] if challenge is None else [challenge.proposer]), *others, *controls]
    contenders: dict[str, Contender] = {}
    with runtime.writing() as writer:
        for proposer in asked:
            name = label_of(proposer)
            contenders.setdefault(name, Contender(_rewound(proposer), stored_id(writer, proposer), name))
        challenger_id = None if challenge is None else stored_id(writer, challenge.proposer)
    contest.forget(runtime)
    return Plan(
        standing=standing,
        turns=turns,
        distillation=distillation,
        contenders=list(contenders.values()),
        challenger_id=challenger_id,
        made_here=frozenset(
            Path(each.adapter).resolve() for each in runtime.store.distillations(state.id) if each.adapter
        ),
    )


def _rewound(proposer: Proposer) -> Proposer:
    """Return a proposer that remembers nothing of what came after the turns that it is asked about."""
    return proposer.rewound() if isinstance(proposer, Rewindable) else proposer


def _distillation(runtime: Runtime, state: CampaignState, challenge: contest.Challenge | None) -> Distillation | None:
    """Return the distillation whose cut says what is held out: the challenger's own, else the newest."""
    made = [each for each in runtime.store.distillations(state.id) if each.version is not None]
    if challenge is not None:
        version = adapter_version(challenge.proposer.describe())
        own = [each for each in made if f"v{each.version}" == version and each.proposer == challenge.proposer.name]
        if own:
            return own[0]
    return made[0] if made else None


def _held_out(runtime: Runtime, state: CampaignState, distillation: Distillation | None) -> Sequence[HeldOutTurn]:
    """Return the turns after a distillation's cut, or the newest part of a history that nobody was trained on."""
    store = runtime.store
    if distillation is not None and distillation.cut_attempt_id is not None:
        cut = store.attempt(distillation.cut_attempt_id).iteration
        return store.held_out(state.id, after=cut, until=distillation.iteration)
    turns, newest = store.decided_turns(state.id)
    section = runtime.campaign.file.distill
    share = max(math.ceil(section.holdout_fraction * turns), UNTRAINED_TURNS)
    wanted = min(share if section.holdout is None else section.holdout, turns)
    if wanted == 0:
        return ()
    return store.held_out(state.id, after=store.turn_before(state.id, newest, wanted), until=newest)


def find_leak(plan: Plan) -> str | None:
    """Say which held-out turn was in the training rows of a contender, by its attempt or by the hash of its prompt.

    Attempts are numbers that mean something in one store alone: an adapter from elsewhere is judged by its prompts.
    """
    for contender in plan.contenders:
        proposer = contender.proposer
        if not isinstance(proposer, contest.AdapterProposer) or proposer.adapter is None:
            continue
        try:
            told = read_record(proposer.adapter).facts.get("corpus")
        except CampaignError:
            continue  # trained elsewhere, or not readable: then it does not load either
        trained = told if isinstance(told, dict) else {}
        attempts, prompts = set(trained.get("attempts") or ()), set(trained.get("prompts") or ())
        if proposer.adapter.resolve() not in plan.made_here:
            attempts = set()
        for turn in plan.turns:
            if turn.attempt_id in attempts or turn.prompt_id in prompts:
                what = "attempt" if turn.attempt_id in attempts else "prompt"
                return (
                    f"leak: the {what} of held-out turn {turn.iteration} was in the training rows of "
                    f"`{contender.label}`, so this race says nothing"
                )
    return None


def _answer_all(runtime: Runtime, state: CampaignState, plan: Plan, race_id: int, draws: int) -> None:
    done = {item.attempt_id for item in runtime.store.race_items(race_id)}
    for number, turn in enumerate(plan.turns, 1):
        if turn.attempt_id in done:
            continue
        if runtime.pause_wanted() is not None or (runtime.until is not None and runtime.clock() >= runtime.until):
            raise PauseRequested
        if time_left(runtime, state) <= 0:
            raise BudgetSpent("until")
        with runtime.waiting(), ending_in_time(runtime, state):
            items = [item for who in plan.contenders for item in answer_turn(runtime, state, turn, who, draws)]
        with runtime.writing() as writer:
            for item in items:
                writer.race_item(race_id, item)
        runtime.emit(RaceStepped(campaign=runtime.name, done=number, items=len(plan.turns)))


def _conclude(runtime: Runtime, state: CampaignState, plan: Plan, race_id: int, *, turn: int, leak: str | None) -> None:
    """Close the race with what it showed, and say how far the challenger is now: one transaction."""
    champion_id = plan.contenders[0].id
    challenge, names = plan.standing.challenge, (plan.contenders[0].label, "")
    verdict = leak or (f"looked back at {len(plan.turns)} turns" if plan.turns else NOTHING)
    event = None
    if challenge is not None and plan.challenger_id is not None:
        names = names[0], label_of(challenge.proposer)
        items = () if leak else runtime.store.race_items(race_id)
        limit = runtime.campaign.file.router.max_latency_s
        gate = gate_on(items, plan.challenger_id, champion_id, max_latency_s=limit, leak=leak)
        verdict = leak or ("the gate holds" if gate.holds else "the gate does not hold: " + "; ".join(gate.failures))
        if not plan.turns:
            verdict = NOTHING
        _, evidence = contest.weigh_pair(runtime, state, "challenge", champion_id, plan.challenger_id)
        words = why_not(evidence, gate)
        event = weighed(Weighed, runtime.name, turn, names=names, evidence=evidence, words=words, gate=gate.failures)
    with runtime.writing() as writer:
        writer.end_race(race_id, verdict=verdict, failure=leak)
        runtime.emit(
            RaceFinished(
                campaign=runtime.name,
                iteration=turn,
                race_id=race_id,
                challenger=names[1] or None,
                items=len(plan.turns),
                verdict=verdict,
            )
        )
        if event is not None:
            runtime.emit(event)
    contest.forget(runtime)
