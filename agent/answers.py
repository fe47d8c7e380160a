"""One contender's answers to one held-out turn: asked as it would have been then, judged by the rails of that moment.

A stochastic proposer is asked several times. One that knows its probabilities is asked once, and the further draws come
from them. The choice that a contender really made in that turn is its first answer, and is not matched against itself.
`R7_capability` is left to runs: nobody knows what memory was free then.
"""

from __future__ import annotations

import json
import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from overnight.agent.propose import StoredHistory
from overnight.agent.proposers.protocol import Ask, Observation, reply_text
from overnight.agent.runtime import Runtime
from overnight.agent.turns import let_through, neighbours_of
from overnight.rails.gate import NoveltyRail, Rail, check_reply
from overnight.rails.menu import Change, Menu
from overnight.store.contests import HeldOutTurn, NewRaceItem
from overnight.store.errors import CampaignError, ProposerError
from overnight.store.hashing import digest
from overnight.store.protocol import CampaignState
from overnight.store.records import Config
from overnight.store.writer import value_text

if TYPE_CHECKING:
    from overnight.agent.race import Contender

DRAWS = 5


@dataclass(frozen=True, slots=True)
class Then:
    """The moment of a held-out turn."""

    turn: HeldOutTurn
    baseline: Config
    """The menu's knobs alone."""
    beside: Config
    """What an imported configuration holds besides: part of what was run, and of its hash."""
    prompt: str
    moves: tuple[Change, ...]
    neighbours: tuple[Change, ...]
    rails: Sequence[Rail]


class _Past:
    """A history as proposers know it: of an imported configuration, the menu's knobs alone."""

    def __init__(self, stored: StoredHistory, menu: Menu) -> None:
        self._stored, self._menu = stored, menu

    def since(self, attempt_id: int) -> Iterator[Observation]:
        """Yield the attempts decided after `attempt_id`, oldest first."""
        for seen in self._stored.since(attempt_id):
            yield replace(seen, config={k: v for k, v in seen.config.items() if k in self._menu.by_name})


def answer_turn(
    runtime: Runtime, state: CampaignState, turn: HeldOutTurn, who: Contender, draws: int
) -> list[NewRaceItem]:
    """Return a contender's draws for a turn; one that cannot answer gives one item that says why."""
    moment = moment_of(runtime, state, turn)
    first = _recorded(runtime, moment, who)
    asked: list[NewRaceItem] = []
    probabilities: Mapping[str, float] = {}
    while len(asked) + len(first) < draws and who.is_asked and moment.moves:
        if probabilities:
            asked.append(_drawn(runtime, moment, who, probabilities, len(asked) + len(first)))
            continue
        item = _ask(runtime, state, moment, who, len(asked) + len(first))
        if item.failure is not None:
            break
        asked.append(item)
        probabilities = item.probabilities or {}
    items = [*first, *asked] or [_missing(moment, who)]
    return _with_gains(runtime, state, moment, _summed_up(items, moment, probabilities))


def moment_of(runtime: Runtime, state: CampaignState, turn: HeldOutTurn) -> Then:
    """Return what a held-out turn was asked, and which changes were open in it."""
    assert turn.prompt_id is not None
    menu, stored = runtime.campaign.menu, runtime.store.config_of(turn.baseline_config_id)
    baseline = {name: stored[name] for name in menu.by_name if name in stored}
    beside = {name: value for name, value in stored.items() if name not in menu.by_name}
    others = _rails(runtime)
    refinement = bisect_right(runtime.store.refinements(state.id), turn.started_at)
    passing = partial(let_through, runtime, state, baseline, rails=others, before=turn.asked_in, beside=beside)
    moves = passing(menu.moves(baseline, refinement=refinement))
    neighbours = passing(neighbours_of(menu, baseline, moves))
    skips_novelty = "R6_novelty" in runtime.campaign.file.rails.skip
    novelty = NoveltyRail(lambda config: runtime.earlier(state, [{**config, **beside}], before=turn.asked_in)[0])
    prompt = runtime.store.prompts_of([turn.prompt_id])[turn.prompt_id]
    return Then(turn, baseline, beside, prompt, moves, neighbours, others if skips_novelty else [novelty, *others])


def _rails(runtime: Runtime) -> list[Rail]:
    """Return the rails after novelty; what the machine cannot run is known where a trainer was prepared."""
    machine: list[Rail] = []
    if runtime.info is not None and "R7_capability" not in runtime.campaign.file.rails.skip:
        machine = [runtime.capability(memory=False)]
    return [*machine, *runtime.extra_rails]


def _recorded(runtime: Runtime, moment: Then, who: Contender) -> list[NewRaceItem]:
    """Return what the contender really answered in that turn, if it was its turn."""
    turn = moment.turn
    imported = turn.role == "imported" and turn.proposer == who.proposer.name
    if turn.proposer_id != who.id and not imported:
        return []
    return [
        NewRaceItem(
            attempt_id=turn.attempt_id,
            proposer_id=who.id,
            draw=0,
            source="recorded",
            reply=turn.reply,
            knob=turn.knob,
            new_value=turn.new_value,
            config=None if turn.config_id is None else runtime.store.config_of(turn.config_id),
            valid=turn.rail is None,
            rail=turn.rail,
            latency_s=turn.proposal_latency_s,
        )
    ]


def _ask(runtime: Runtime, state: CampaignState, moment: Then, who: Contender, draw: int) -> NewRaceItem:
    turn = moment.turn
    ask = Ask(
        iteration=turn.iteration,
        prompt=moment.prompt,
        menu=runtime.campaign.menu,
        direction=runtime.campaign.file.metric.direction,
        baseline=moment.baseline,
        baseline_metric=turn.baseline_metric,
        moves=moment.moves,
        neighbours=moment.neighbours,
        history=_Past(StoredHistory(runtime.store, state.id, before=turn.asked_as), runtime.campaign.menu),
        seed=runtime.draw_seed("race", turn.iteration, draw),
    )
    runtime.renew()  # a turn takes several draws of several contenders
    try:
        answer = who.proposer.propose(ask)
    except (ProposerError, CampaignError) as error:
        who.failed += 1
        who.failure = str(error)
        if isinstance(error, CampaignError):
            who.gone = True
        return _missing(moment, who)
    who.failed = 0
    judged = _judged(runtime, moment, answer.reply)
    return replace(
        judged,
        proposer_id=who.id,
        draw=draw,
        latency_s=answer.latency_s,
        probabilities=answer.probabilities or None,
    )


def _judged(runtime: Runtime, moment: Then, reply: str) -> NewRaceItem:
    """Return an answer with what the rails of that moment say, matched against what was tried."""
    turn = moment.turn
    verdict = check_reply(reply, menu=runtime.campaign.menu, baseline=moment.baseline, rails=moment.rails)
    knob = verdict.proposal.knob if verdict.proposal is not None else None
    text = None if verdict.value is None else value_text(verdict.value)
    on_menu = knob if knob in runtime.campaign.menu.by_name else None
    return NewRaceItem(
        attempt_id=turn.attempt_id,
        proposer_id=0,
        draw=0,
        source="asked",
        reply=reply,
        knob=on_menu,
        new_value=text,
        config=None if verdict.config is None else {**verdict.config, **moment.beside},
        valid=verdict.passed,
        rail=verdict.rail,
        knob_match=on_menu == turn.knob,
        exact_match=(on_menu, text) == (turn.knob, turn.new_value),
    )


def _drawn(
    runtime: Runtime, moment: Then, who: Contender, probabilities: Mapping[str, float], draw: int
) -> NewRaceItem:
    """Return a further draw from the probabilities of the first answer; it asks nobody and takes no time."""
    seed = runtime.draw_seed("race", moment.turn.iteration, draw)
    keys = list(probabilities)
    key = random.Random(seed).choices(keys, weights=[probabilities[each] for each in keys])[0]
    change = _change(key)
    judged = _judged(runtime, moment, reply_text(change.knob, change.value, "drawn from its probabilities"))
    return replace(judged, proposer_id=who.id, draw=draw, source="drawn", reply=None)


def _change(key: str) -> Change:
    """Read a `change_key`."""
    knob, _, value = key.partition("=")
    return Change(knob, json.loads(value))


def _missing(moment: Then, who: Contender) -> NewRaceItem:
    why = who.failure or "nothing could be proposed"
    if not moment.moves:
        why = "no change was open then"
    return NewRaceItem(attempt_id=moment.turn.attempt_id, proposer_id=who.id, draw=0, source="asked", failure=why)


def _summed_up(items: list[NewRaceItem], moment: Then, probabilities: Mapping[str, float]) -> list[NewRaceItem]:
    """Give the first answer what only all draws together show."""
    turn = moment.turn
    picks = [(item.knob, item.new_value) for item in items if item.source != "recorded" and item.failure is None]
    if not picks:
        return items
    tried = turn.knob, turn.new_value
    if probabilities:
        modal = _as_stored(max(probabilities, key=lambda key: probabilities[key]))
        agreement: float | None = math.fsum(chance * chance for chance in probabilities.values())
        chances = {_as_stored(key): chance for key, chance in probabilities.items()}
        likely: float | None = chances.get((str(turn.knob), str(turn.new_value)), 0.0)
    else:
        modal = Counter(picks).most_common(1)[0][0]
        pairs = [one == other for one, other in combinations(picks, 2)]
        agreement, likely = (sum(pairs) / len(pairs) if pairs else None), None
    summed = replace(items[0], modal_match=modal == tried, agreement=agreement, tried_probability=likely)
    return [summed, *items[1:]]


def _as_stored(key: str) -> tuple[str | None, str | None]:
    change = _change(key)
    return change.knob, value_text(change.value)


def _with_gains(runtime: Runtime, state: CampaignState, moment: Then, items: list[NewRaceItem]) -> list[NewRaceItem]:
    """Give each valid pick the gain that was measured of it against that baseline, at any time."""
    ids = {digest(item.config) for item in items if item.valid and item.config is not None}
    known = runtime.store.gains_on(state.id, moment.turn.baseline_config_id, sorted(ids))
    return [
        replace(item, expected_gain=known.get(digest(item.config))) if item.valid and item.config is not None else item
        for item in items
    ]
