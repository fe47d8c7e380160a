"""What a race showed about a challenger, as the gate of its promotion: read from a race's items, decided purely.

A turn without an answer is missing, not lost: it counts neither for nor against anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from overnight.agent.router import Gate, HeldOutAnswer, Look, check_gate, look
from overnight.store.contests import Race, RaceItem

NOT_RACED = Gate(("not looked back at yet",))
NOT_BESIDE = Gate(("not looked back at beside the present champion yet",), wants="champion")
"""For a race that was run against another champion: nothing in it compares with this one."""


def gate_of(
    race: Race | None,
    items: Sequence[RaceItem],
    challenger_id: int | None,
    champion_id: int | None,
    *,
    max_latency_s: float,
) -> Gate:
    """Return whether the newest race of a challenger allows a promotion."""
    if race is None or challenger_id is None:
        return NOT_RACED
    return gate_on(items, challenger_id, champion_id, max_latency_s=max_latency_s, leak=race.failure)


def gate_on(
    items: Sequence[RaceItem],
    challenger_id: int,
    champion_id: int | None,
    *,
    max_latency_s: float,
    leak: str | None = None,
) -> Gate:
    """Return whether these answers allow a promotion: all of the challenger's count, common ones are compared."""
    if leak is not None:
        return Gate((leak,))
    if items and champion_id not in {item.proposer_id for item in items}:
        return NOT_BESIDE
    challenger, champion = (_first_answers(items, who) for who in (challenger_id, champion_id))
    common = challenger.keys() & champion.keys()
    return check_gate(
        _look(challenger, challenger),
        _look(champion, common),
        max_latency_s=max_latency_s,
        beside=_look(challenger, common),
        held_out=len({item.attempt_id for item in items}),
    )


def _first_answers(items: Sequence[RaceItem], proposer_id: int | None) -> dict[int, HeldOutAnswer]:
    """Return a contestant's first answer by turn: one that it was asked for, or else the choice that it made then."""
    found: dict[int, RaceItem] = {}
    for item in items:
        if item.proposer_id != proposer_id or item.failure is not None:
            continue
        before = found.get(item.attempt_id)
        if before is None or (before.source == "recorded" and item.source == "asked"):
            found[item.attempt_id] = item
    return {turn: HeldOutAnswer(_pair(item), bool(item.valid), item.latency_s) for turn, item in found.items()}


def _pair(item: RaceItem) -> tuple[str, str] | None:
    return None if item.knob is None or item.new_value is None else (item.knob, item.new_value)


def _look(answers: Mapping[int, HeldOutAnswer], turns: Iterable[int]) -> Look:
    return look([answers[turn] for turn in sorted(turns)])


def gains_by_turn(items: Sequence[RaceItem], proposer_id: int | None) -> dict[int, float]:
    """Return the mean measured gain of a contestant's picks for each held-out turn where one was measured."""
    gains: dict[int, list[float]] = {}
    for item in items:
        if item.proposer_id == proposer_id and item.expected_gain is not None:
            gains.setdefault(item.attempt_id, []).append(item.expected_gain)
    return {turn: sum(known) / len(known) for turn, known in gains.items()}
