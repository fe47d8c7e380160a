"""Contests in words: one line for an event of duels, races and switches, and where a challenger stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from overnight.agent import contest_events as events
from overnight.store.contests import Promotion
from overnight.store.hashing import JsonValue
from overnight.store.protocol import CampaignState, TrajectoryStore

if TYPE_CHECKING:
    from overnight.agent.events import Event

COLUMNS = ("champion", "challenger", "e_value", "threshold", "duels", "duels_needed", "why_no_promotion")


def describe_contest(event: Event) -> str | None:
    """Return one line for an event of a contest, or None for any other."""
    match event:
        case events.DuelSettled():
            return _duel(event)
        case events.Weighed():
            return f"{event.challenger} against {event.champion}: {event.words}"
        case events.RaceStarted():
            return f"looking back over {event.items} held-out turns: {', '.join(event.proposers)}"
        case events.RaceFinished():
            return f"looked back over {event.items} held-out turns: {event.verdict}"
        case events.Promoted():
            return f"PROMOTED {event.to_proposer} over {event.from_proposer} ({event.decided_by}): {event.reason}"
        case events.RolledBack():
            return f"ROLLED BACK {event.from_proposer} to {event.to_proposer} ({event.decided_by}): {event.reason}"
        case events.PromotionAsked():
            ask = f"`overnight promote {event.campaign} {event.challenger}` promotes it"
            return f"{event.challenger} may be promoted: {event.reason}; {ask}"
        case events.PromotionDeclined():
            return f"{event.challenger} is not promoted: a person said no"
        case events.SwitchRefused():
            return f"not done: {event.reason}"
    return None


def _duel(event: events.DuelSettled) -> str:
    if event.item is None:
        return f"duel of turn {event.iteration} counts for nothing: {event.note}"
    winner = event.challenger if event.item > 0 else event.champion
    won = "a tie" if event.item == 0 else f"{winner} won by {abs(event.item):.2f}"
    note = f" ({event.note})" if event.note else ""
    return f"duel of turn {event.iteration}: {event.champion} and {event.challenger}, {won}{note}"


def contest_columns(store: TrajectoryStore, state: CampaignState) -> dict[str, object]:
    """Return who stands where, and why there is no promotion yet; everything is None where nobody challenges."""
    router = state.spec.get("router")
    name = router.get("challenger") if isinstance(router, Mapping) else None
    switches = store.promotions(state.id)
    columns: dict[str, object] = dict.fromkeys(COLUMNS)
    if name is None and not switches:
        return columns
    columns["champion"] = champion_label(store, state, switches)
    said = store.last_event(state.id, "weighed")
    weighed: Mapping[str, JsonValue] = said[1] if said is not None else {}
    if name is None or weighed.get("challenger") == columns["champion"]:
        return columns
    columns["challenger"] = weighed.get("challenger", name)
    columns |= {"e_value": weighed.get("e_value"), "threshold": weighed.get("threshold")}
    columns |= {"duels": weighed.get("duels"), "duels_needed": weighed.get("needed")}
    columns["why_no_promotion"] = _why(store, state, str(name), weighed)
    return columns


def champion_label(store: TrajectoryStore, state: CampaignState, switches: Sequence[Promotion]) -> str | None:
    """Return who has the turns: by the last switch, else by the campaign file."""
    from overnight.agent.router import reigns

    reign = reigns(switches)
    if reign:
        return store.contestant(reign[-1].to_proposer_id).label
    router, proposers = state.spec.get("router"), state.spec.get("proposers")
    named = router.get("champion") if isinstance(router, Mapping) else None
    if isinstance(named, str):
        return named
    return next(iter(proposers), None) if isinstance(proposers, Mapping) else None


def _why(store: TrajectoryStore, state: CampaignState, challenger: str, weighed: Mapping[str, JsonValue]) -> str:
    kinds = ("promotion_asked", "promotion_declined", "promoted", "rolled_back")
    last = store.last_of(state.id, kinds)
    if last is not None and last[1] == "promotion_asked":
        return f"a person is asked: `overnight promote {state.name} {last[2]['challenger']}`; {last[2]['reason']}"
    if weighed:
        return str(weighed["words"])
    proposers = state.spec.get("proposers")
    table = proposers.get(challenger) if isinstance(proposers, Mapping) else None
    is_student = isinstance(table, Mapping) and table.get("kind") == "student"
    if is_student and store.newest_adapter(state.id, challenger) is None:
        return "nothing was distilled yet"
    return "no duel was settled yet"
