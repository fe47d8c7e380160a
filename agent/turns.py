"""Whose turn it is, what it may propose, and what it is told.

The order: a duel's second turn, a person's request, the warm-up (each knob once), an exploring turn for the least tried
knobs, a duel that was drawn for this turn, the predecessor of a champion on probation, the champion.
Everything is derived from the store and from draws that the campaign's seed fixes, so that a resumed campaign plans
what an undisturbed one would.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from overnight.agent import duels
from overnight.agent.campaign import Campaign
from overnight.agent.contest import is_contested
from overnight.agent.contest import standing as standing_now
from overnight.agent.duels import DuelTurn
from overnight.agent.proposers.protocol import Proposer, Rejection
from overnight.agent.proposers.uniform import RandomProposer
from overnight.agent.runtime import Runtime
from overnight.distill.histories import Frame
from overnight.rails.gate import Candidate, Proposal, Rail
from overnight.rails.menu import Change, Menu
from overnight.store.hashing import JsonValue
from overnight.store.prompt import KnobFact, PromptFacts, render_prompt
from overnight.store.protocol import MAX_TRIES, Attempt, CampaignState, KnobTotal, Position
from overnight.store.records import Config
from overnight.store.writer import OFF_MENU_RAILS

FALLBACK_NAME = "random"
"""What a fallback is called where the campaign names no proposer of kind `random`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Who proposes on one try, and why."""

    role: str
    proposer: Proposer
    knobs: tuple[str, ...] | None = None
    """Only these knobs, or any."""
    request: tuple[int, Mapping[str, JsonValue]] | None = None
    """A person's proposal, by the id of its event."""
    duel: DuelTurn | None = None
    """The duel that this turn belongs to."""


def plan_turn(
    runtime: Runtime,
    state: CampaignState,
    position: Position,
    *,
    totals: Sequence[KnobTotal],
    moves: Sequence[Change],
) -> Turn:
    """Return who proposes at `position`; only knobs with an open move are warmed up or explored."""
    earlier = runtime.store.attempts_of_turn(state.id, position.iteration) if position.try_no > 1 else ()
    if position.try_no >= MAX_TRIES or any(attempt.outcome == "failed" for attempt in earlier):
        return Turn("fallback", fallback(runtime))
    standing = standing_now(runtime, state)
    if is_contested(runtime):
        duel = duels.under_way(runtime, state, position)
        if duel is not None:
            return Turn(f"duel_{duel.side}", duel.proposer, duel=duel)
    requests = runtime.store.pending_requests(state.id)
    if requests and position.try_no == 1:
        return Turn("request", standing.champion, request=requests[0])
    router, tried = runtime.campaign.file.router, _tries(moves, totals)
    if router.warmup:
        untouched = tuple(knob for knob, count in tried.items() if count == 0)
        if untouched:
            return Turn("warmup", fallback(runtime), knobs=untouched)
    if runtime.draw_unit("explore", position.iteration) < router.explore:
        least = min(tried.values())
        return Turn("explore", fallback(runtime), knobs=tuple(knob for knob, count in tried.items() if count == least))
    begins = duels.drawn(runtime, position, standing)
    if begins is not None:
        return Turn(f"duel_{begins.side}", begins.proposer, duel=begins)
    if standing.predecessor is not None and duels.is_predecessors(position, standing):
        return Turn("predecessor", standing.predecessor)
    return Turn("champion", standing.champion)


def fallback(runtime: Runtime) -> Proposer:
    """Return the uniform proposer: the campaign's own, or one made here."""
    uniform = (proposer for proposer in runtime.proposers.values() if isinstance(proposer, RandomProposer))
    return next(uniform, None) or RandomProposer(FALLBACK_NAME)


def _tries(moves: Sequence[Change], totals: Sequence[KnobTotal]) -> dict[str, int]:
    """Return how often each knob was proposed: a block counts, or a knob that is always vetoed had every turn."""
    tried = dict.fromkeys((move.knob for move in moves), 0)
    return tried | {total.knob: total.proposed for total in totals if total.knob in tried}


def open_moves(
    runtime: Runtime, state: CampaignState, baseline: Config, *, before: int | None = None
) -> tuple[Change, ...]:
    """Return the legal one-knob changes that every rail would let through, in the menu's order.

    `before` asks for those that were open before a turn: what was measured in it or later does not count as tried.
    """
    moves = runtime.campaign.menu.moves(baseline, refinement=state.refinement)
    return let_through(runtime, state, baseline, moves, _rails_after_novelty(runtime, state), before=before)


def open_neighbours(
    runtime: Runtime, state: CampaignState, baseline: Config, moves: Sequence[Change], *, before: int | None = None
) -> tuple[Change, ...]:
    """Return the values next to the present ones, of the knobs of `moves`, that every rail would let through."""
    beside = neighbours_of(runtime.campaign.menu, baseline, moves)
    return let_through(runtime, state, baseline, beside, _rails_after_novelty(runtime, state), before=before)


def neighbours_of(menu: Menu, baseline: Config, moves: Sequence[Change]) -> list[Change]:
    """Return the legal values next to the present ones, of the knobs of `moves`, that are not among these."""
    known = set(moves)
    return [change for change in menu.neighbours(baseline, dict.fromkeys(m.knob for m in moves)) if change not in known]


def let_through(
    runtime: Runtime,
    state: CampaignState,
    baseline: Config,
    changes: Iterable[Change],
    rails: Sequence[Rail],
    *,
    before: int | None = None,
    beside: Config | None = None,
) -> tuple[Change, ...]:
    """Return the changes that nobody measured, where the campaign asks for that, and that `rails` let through.

    Args:
        runtime: the campaign's.
        state: where it stands.
        baseline: what the changes start from, the menu's knobs alone.
        changes: legal ones.
        rails: those after `R6_novelty`, which is asked for all changes at once.
        before: what was measured in that turn or later does not count as tried.
        beside: what an imported configuration holds besides, and its hash with it.
    """
    menu, found = runtime.campaign.menu, list(changes)
    if "R6_novelty" not in runtime.campaign.file.rails.skip:
        configs = [{**menu.apply(baseline, change), **(beside or {})} for change in found]
        done = runtime.earlier(state, configs, before=before)
        found = [change for change, words in zip(found, done, strict=True) if words is None]
    candidates = [_candidate(runtime, baseline, change) for change in found]
    return tuple(
        change
        for change, candidate in zip(found, candidates, strict=True)
        if not any(rail.check(candidate) for rail in rails)
    )


def _rails_after_novelty(runtime: Runtime, state: CampaignState) -> list[Rail]:
    return [rail for rail in runtime.rails(state) if rail.id != "R6_novelty"]


def _candidate(runtime: Runtime, baseline: Config, move: Change) -> Candidate:
    menu = runtime.campaign.menu
    return Candidate(menu, baseline, Proposal(move.knob, move.value, ""), menu.apply(baseline, move))


def narrowed(moves: tuple[Change, ...], knobs: tuple[str, ...] | None) -> tuple[Change, ...]:
    """Return the moves of some knobs, or all."""
    return moves if knobs is None else tuple(move for move in moves if move.knob in knobs)


def rejections(runtime: Runtime, state: CampaignState, position: Position) -> tuple[Rejection, ...]:
    """Return this turn's blocked replies, first to last."""
    if position.try_no == 1:
        return ()
    tries = runtime.store.attempts_of_turn(state.id, position.iteration)
    return tuple(
        Rejection(attempt.reply or "", attempt.rail, attempt.rail_reason or "") for attempt in tries if attempt.rail
    )


def turn_prompt(
    runtime: Runtime,
    state: CampaignState,
    *,
    baseline: Config,
    baseline_metric: float | None,
    totals: Sequence[KnobTotal],
    turns: int,
) -> str:
    """Render the prompt of a turn, whoever proposes."""
    file = runtime.campaign.file
    recent = runtime.store.recent(state.id, file.prompt.recent) if file.prompt.recent else ()
    noise = runtime.noise(state)
    gain_sd = None
    if noise is not None and baseline_metric:
        gain_sd = noise.sd / abs(baseline_metric) if file.metric.gain == "relative" else noise.sd
    return render_prompt(
        replace(
            prompt_frame(runtime.campaign).facts,
            config=baseline,
            baseline_metric=baseline_metric,
            turns=turns,
            totals=totals,
            gain_sd=gain_sd,
            recent=[without_forgery(attempt) for attempt in recent],
        )
    )


def prompt_frame(campaign: Campaign) -> Frame:
    """Return what all prompts of a campaign share, and what its rails ask of a change."""
    file, menu = campaign.file, campaign.menu
    facts = PromptFacts(
        metric=file.metric.name,
        direction=file.metric.direction,
        gain=file.metric.gain,
        min_gain=file.decision.min_gain,
        knobs=[KnobFact(knob.name, knob.describe(), knob.doc) for knob in menu.knobs],
        rules=[f"{rule.rule}" + (f" ({rule.doc})" if rule.doc else "") for rule in menu.constraints],
        brief=campaign.read_brief(),
        config=menu.default,
        baseline_metric=None,
        turns=0,
        totals=[],
        gain_sd=None,
        recent=[],
        lineage=file.prompt.lineage,
    )
    novelty = "R6_novelty" not in file.rails.skip
    students = [table for table in file.proposers.values() if table.get("kind") == "student"]
    neighbours = any(table.get("neighbours", True) for table in students)
    return Frame(facts=facts, menu=menu, recent=file.prompt.recent, novelty=novelty, neighbours=neighbours)


def without_forgery(attempt: Attempt) -> Attempt:
    """Return an attempt whose knob and value are shown only where they are on the menu."""
    return attempt if attempt.rail not in OFF_MENU_RAILS else replace(attempt, knob=None)


def request_reply(payload: Mapping[str, JsonValue]) -> str:
    """Return a person's queued proposal as a reply for the rails."""
    return json.dumps({key: payload.get(key) for key in ("knob", "new_value", "reason")}, ensure_ascii=False)
