"""Duels: champion and challenger answer one stored prompt in two turns in a row, and both changes are measured with the
baseline on one seed of the duel's own.

Which turns begin a duel, and who answers first, is drawn beforehand. Both attempts count and teach like any other; the
decision rule looks at neither of the duel's trials, and no other duel does. The item is settled from what is stored
once both turns are over, so that a campaign killed in between comes to the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from overnight.agent.contest import Standing, stored_id, usable
from overnight.agent.decide import gain_scale, judge
from overnight.agent.evidence import RECENT, Bank
from overnight.agent.measure import Standing as Measured
from overnight.agent.measure import series_of, stored_trials
from overnight.agent.proposers.protocol import Proposer
from overnight.agent.router import probation_turn
from overnight.agent.runtime import Runtime
from overnight.agent.seeds import duel_seed
from overnight.store.contests import Duel, DuelKind, NewDuel, Settlement, Side
from overnight.store.protocol import Attempt, CampaignState, Position, StoreWriter, Trial


@dataclass(frozen=True, slots=True)
class DuelTurn:
    """One side's turn of a duel."""

    kind: DuelKind
    side: Side
    champion: Proposer
    challenger: Proposer
    begun: Duel | None = None
    """None on the turn that begins it."""

    @property
    def proposer(self) -> Proposer:
        """Whose turn it is."""
        return self.champion if self.side == "champion" else self.challenger

    @property
    def answers_stored(self) -> bool:
        """Whether the prompt is the one that the first side answered."""
        return self.begun is not None and self.begun.waits_for == self.side


def under_way(runtime: Runtime, state: CampaignState, position: Position) -> DuelTurn | None:
    """Return the duel that the turn at `position` belongs to already, by an earlier try or by the turn before."""
    duel = runtime.store.last_duel(state.id)
    if duel is None or duel.settled_at is not None or position.iteration not in (duel.iteration, duel.iteration + 1):
        return None
    side: Side = duel.first
    if position.iteration > duel.iteration:
        side = "challenger" if duel.first == "champion" else "champion"
    champion, challenger = (usable(runtime, state, who) for who in (duel.champion_id, duel.challenger_id))
    return DuelTurn(duel.kind, side, champion, challenger, duel)


def drawn(runtime: Runtime, position: Position, standing: Standing) -> DuelTurn | None:
    """Return the duel that begins at `position`, if one was drawn for this turn; it takes the next turn too."""
    if position.try_no > 1 or position.iteration >= runtime.campaign.file.budget.iterations:
        return None
    kind = _kind(runtime, position.iteration, standing)
    if kind is None:
        return None
    opponent = standing.predecessor
    if kind == "challenge" and standing.challenge is not None:
        opponent = standing.challenge.proposer
    assert opponent is not None
    side: Side = "champion" if runtime.draw_unit("duel side", position.iteration) < 0.5 else "challenger"
    return DuelTurn(kind, side, standing.champion, opponent)


def _kind(runtime: Runtime, iteration: int, standing: Standing) -> DuelKind | None:
    """Return what kind of duel was drawn: a champion just promoted answers beside its predecessor first of all."""
    router = runtime.campaign.file.router
    if standing.promoted_after is not None and standing.predecessor is not None:
        turn = probation_turn(iteration - standing.promoted_after)
        if turn != "champion":
            return "return" if turn == "duel" else None
    challenge = standing.challenge
    is_open = challenge is not None and (
        challenge.race is None
        or challenge.gate.holds
        or challenge.gate.wants == "champion"  # which says nothing against the student
        or not challenge.is_student
    )
    if is_open and router.evidence == "duels" and runtime.draw_unit("duel", iteration) < chance(router.duel_share):
        return "challenge"
    if standing.predecessor is not None and runtime.draw_unit("recheck", iteration) < router.explore:
        return "return"
    return None


def chance(share: float) -> float:
    """Return the chance that a free turn begins a duel, so that `share` of all turns do: a duel takes two."""
    return 1.0 if share >= 0.5 else share / (1 - share)


def is_predecessors(position: Position, standing: Standing) -> bool:
    """Whether the turn is the predecessor's alone: it alternates with a champion that was just promoted."""
    if standing.promoted_after is None or standing.predecessor is None:
        return False
    return probation_turn(position.iteration - standing.promoted_after) == "predecessor"


def first_attempt(runtime: Runtime, duel: DuelTurn) -> Attempt:
    """Return the first side's answer in a duel that is under way."""
    assert duel.begun is not None
    begun = duel.begun
    attempt_id = begun.champion_attempt_id if begun.first == "champion" else begun.challenger_attempt_id
    assert attempt_id is not None
    return runtime.store.attempt(attempt_id)


def record(writer: StoreWriter, position: Position, duel: DuelTurn, attempt_id: int) -> None:
    """Store, with a side's first answer, that it is one: later tries of the turn are none of the duel's."""
    if duel.begun is not None:
        if duel.answers_stored:
            writer.answer_duel(duel.begun.id, duel.side, attempt_id)
        return
    champion_id, challenger_id = (stored_id(writer, who) for who in (duel.champion, duel.challenger))
    writer.begin_duel(
        NewDuel(
            iteration=position.iteration,
            kind=duel.kind,
            seed=duel_seed(position.iteration),
            champion_id=champion_id,
            challenger_id=challenger_id,
            first=duel.side,
            attempt_id=attempt_id,
        )
    )
    writer.alias("champion", champion_id, position.iteration - 1)
    if duel.kind == "challenge":
        writer.alias("challenger", challenger_id, position.iteration - 1)


def beats_kept(runtime: Runtime, state: CampaignState, now: Measured) -> tuple[bool, str]:
    """Say whether a duel's second keep also beats what its first side had kept meanwhile, by the same rule.

    Both were measured against the same baseline, mostly on the same seeds, so that no trial has to be run for it; where
    they share too few, the larger gain stands.
    """
    assert state.baseline_config_id is not None
    other = series_of(stored_trials(runtime, state, state.baseline_config_id)).metrics
    own = now.candidate.metrics
    shared = [seed for seed in own if seed in other]
    settings = runtime.campaign.decision
    order = [*shared, *range(-1, -1 - max(settings.max_trials - len(shared), 0), -1)]
    noise, kind = runtime.noise(state), state.trainer_kind or "noisy"
    verdict = judge(own, other, order, noise=noise, settings=settings, kind=kind)
    if verdict.action != "measure":
        better = verdict.action == "keep"
        words = f"against the other side's change, which was kept: {verdict.explanation}"
        return better, words if better else f"{words}; the first keep stands"
    first = runtime.store.earlier(state.id, [state.baseline_config_id]).get(state.baseline_config_id)
    theirs = -math.inf if first is None or first.gain is None else first.gain
    ours = -math.inf if now.verdict is None or now.verdict.gain is None else now.verdict.gain
    return ours > theirs, f"the other side's change was kept with a gain of {theirs:+.4g}; the larger one stands"


def to_settle(runtime: Runtime, state: CampaignState, position: Position) -> Duel | None:
    """Return the duel whose two turns are over before `position` and that has no item yet."""
    duel = runtime.store.last_duel(state.id)
    if duel is None or duel.settled_at is not None or position.iteration <= duel.iteration + 1:
        return None
    return duel


@dataclass(frozen=True, slots=True)
class _Half:
    """One side of a duel, measured or not."""

    attempt: Attempt
    gain: float | None = None
    """On the duel's seed; None for an answer that was blocked or failed."""
    environment: str | None = None
    scale: float | None = None
    """What a difference of metrics was divided by."""
    void: str | None = None
    """Why the duel counts for nothing, whatever the other side did."""


def settle(runtime: Runtime, state: CampaignState, duel: Duel) -> Settlement:
    """Return what a duel came to, from what is stored; it writes nothing."""
    if duel.champion_attempt_id is None or duel.challenger_attempt_id is None:
        return Settlement(duel_id=duel.id, note="one side never had its turn")
    champion = _half(runtime, state, duel, duel.champion_attempt_id)
    challenger = _half(runtime, state, duel, duel.challenger_attempt_id)
    same = champion.attempt.config_id is not None and champion.attempt.config_id == challenger.attempt.config_id
    if same:
        known = champion if champion.gain is not None else challenger
        return _settled(runtime, state, duel, (known, known), "both gave the same answer")
    void = champion.void or challenger.void
    if void is None and len({half.environment for half in (champion, challenger) if half.environment}) > 1:
        void = "the two sides were measured in different environments"
    if void is not None:
        gains = {"champion_gain": champion.gain, "challenger_gain": challenger.gain}
        return Settlement(duel_id=duel.id, **gains, note=void)
    return _settled(runtime, state, duel, (champion, challenger))


def _settled(
    runtime: Runtime, state: CampaignState, duel: Duel, halves: tuple[_Half, _Half], note: str | None = None
) -> Settlement:
    """Bank both gains by what was measured before the duel."""
    champion, challenger = halves
    gains = {"champion_gain": champion.gain, "challenger_gain": challenger.gain}
    scale = champion.scale or challenger.scale
    assert duel.champion_attempt_id is not None
    assert duel.challenger_attempt_id is not None
    noise = runtime.noise_before(state, min(duel.champion_attempt_id, duel.challenger_attempt_id))
    if scale is None:  # nothing was measured, so nothing is banked
        return Settlement(duel_id=duel.id, **gains, champion_banked=0.0, challenger_banked=0.0, item=0.0, note=note)
    if noise is None:
        return Settlement(duel_id=duel.id, **gains, note="the noise is not known, so no gain can be banked")
    of_pair = math.sqrt(2) if state.trainer_kind == "unseeded" else 1.0
    se = noise.sd * of_pair / scale
    bank = Bank.from_recent(runtime.store.recent_gains(state.id, before=duel.iteration, most=RECENT), se)
    return Settlement(
        duel_id=duel.id,
        **gains,
        gain_se=se,
        champion_banked=bank.banked(champion.gain),
        challenger_banked=bank.banked(challenger.gain),
        cap=bank.cap,
        item=bank.item(challenger.gain, champion.gain),
        note=note,
    )


def _half(runtime: Runtime, state: CampaignState, duel: Duel, attempt_id: int) -> _Half:
    attempt = runtime.store.attempt(attempt_id)
    if attempt.outcome == "blocked":
        return _Half(attempt, void=_measured_between(runtime, state, duel, attempt))
    if attempt.outcome == "failed":
        return _Half(attempt, void="the harness failed" if attempt.failure == "harness" else None)
    trial = _last([t for t in runtime.store.trials_of_attempt(attempt_id) if t.config_id == attempt.config_id], duel)
    if trial is None:
        return _Half(attempt, void="the baseline could not be measured on the duel's seed")
    if trial.metric is None:
        return _Half(attempt, void="the harness failed" if trial.failure == "harness" else None)
    assert attempt.baseline_config_id is not None
    of_baseline = partial(
        runtime.store.trials_of,
        state.id,
        attempt.baseline_config_id,
        trainer_hash=trial.trainer_hash,
        environment_hash=trial.environment_hash,
    )
    base = _last(of_baseline(seeds=range(duel.seed, duel.seed + 1)), duel)
    if base is None or base.metric is None:
        return _Half(attempt, void="the baseline could not be measured on the duel's seed")
    settings = runtime.campaign.decision
    scale = gain_scale(series_of(of_baseline(seeds=runtime.decision_seeds)).metrics, settings.gain)
    sign = settings.sign
    return _Half(attempt, sign * (trial.metric - base.metric) / scale, trial.environment_hash, scale)


def _last(trials: Sequence[Trial], duel: Duel) -> Trial | None:
    """Return a configuration's good trial on the duel's seed, or its last one."""
    own = [trial for trial in trials if trial.purpose == "duel" and trial.seed == duel.seed]
    return next((trial for trial in own if trial.metric is not None), own[-1] if own else None)


def _measured_between(runtime: Runtime, state: CampaignState, duel: Duel, attempt: Attempt) -> str | None:
    """Say that a blocked answer was open when the duel began, and was measured by a later try of its first turn."""
    if attempt.rail != "R6_novelty" or attempt.config_id is None or attempt.iteration == duel.iteration:
        return None
    between = runtime.store.attempts_of_turn(state.id, duel.iteration)
    first = duel.champion_attempt_id if duel.first == "champion" else duel.challenger_attempt_id
    if any(each.config_id == attempt.config_id and each.id != first for each in between):
        return "the second answer was measured by another try of the first turn"
    return None
