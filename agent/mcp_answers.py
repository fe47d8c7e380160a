"""What the MCP server's tools answer: plain data from a store, small enough for an agent's context.

Whatever only looks opens the store so that it cannot write. Two ask something of a campaign, and write one row of
`events` each: `enqueue` and `pause`. Nothing here starts a trial, reads or writes a campaign file, or takes a path.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeVar

from overnight.agent.bounded_query import MAX_CHARS, shortened
from overnight.agent.checking import check_proposal, stored_campaign
from overnight.agent.cli.status import STATUS_COLUMNS, status_row
from overnight.rails.gate import Verdict
from overnight.report.analysis import analyse
from overnight.report.text import text_report
from overnight.store.errors import CampaignError, InputError
from overnight.store.lease import is_held
from overnight.store.protocol import CampaignState
from overnight.store.read_only import read_store
from overnight.store.records import KnobValue
from overnight.store.schema_help import schema_rows
from overnight.store.sql_store import SqlStore

T = TypeVar("T")
MAX_TEXTS = (8_000, 2_000, 500, 100)
"""How long a prompt, a reply or a trace may be: the first that makes the whole answer fit."""
MAX_CAMPAIGNS = 100
MAX_PENDING = 20
"""Proposals that may wait in one campaign's queue: an agent in a loop fills no night."""


def list_campaigns(db: str) -> dict[str, Any]:
    """Return where each campaign stands, oldest first."""

    def read(store: SqlStore) -> dict[str, Any]:
        names = store.campaigns()
        shown = names[-MAX_CAMPAIGNS:]
        cut = None if len(shown) == len(names) else f"the newest {len(shown)} of {len(names)}"
        return {"campaigns": [_status(store, name) for name in shown], "cut": cut}

    return read_store(db, read)


def status(db: str, campaign: str) -> dict[str, Any]:
    """Return where one campaign stands, and what it may change."""

    def read(store: SqlStore, state: CampaignState) -> dict[str, Any]:
        told = _status(store, state.name)
        told["pending_proposals"] = len(store.pending_requests(state.id))
        with suppress(CampaignError):  # an imported history has no menu of its own
            told["menu"] = {knob.name: knob.describe() for knob in stored_campaign(state).menu.knobs}
        if state.baseline_config_id is not None:
            told["baseline"] = store.config_of(state.baseline_config_id)
        return told

    return _of(db, campaign, read)


def _status(store: SqlStore, name: str) -> dict[str, Any]:
    row = dict(zip(STATUS_COLUMNS, status_row(store, name), strict=True))
    return {column: value for column, value in row.items() if value is not None}


def _of(db: str, campaign: str, read: Callable[[SqlStore, CampaignState], T]) -> T:
    return read_store(db, lambda store: read(store, _state(store, campaign)))


def _state(store: SqlStore, name: str) -> CampaignState:
    """Return a campaign by its name in the store, and by nothing else: a path is not looked at."""
    state = store.campaign(name)
    if state is None:
        known = ", ".join(f"`{each}`" for each in store.campaigns()[-MAX_CAMPAIGNS:]) or "none yet"
        raise InputError(f"no campaign `{shortened(name, 100)}` in this database; it has {known}")
    return state


def show_turn(db: str, campaign: str, turn: int) -> dict[str, Any]:
    """Return a turn's tries whole: prompt, reply, verdict, trials, decision."""

    def read(store: SqlStore, state: CampaignState) -> dict[str, Any]:
        attempts = store.attempts_of_turn(state.id, turn)
        if not attempts:
            raise InputError(f"campaign `{state.name}` has no turn {turn}")
        tries: list[dict[str, Any]] = []
        prompts: dict[str, int] = {}
        for attempt in attempts:
            told = _known(asdict(attempt))
            prompt_id = told.pop("prompt_id", None)
            if prompt_id in prompts:
                told["prompt"] = f"(as in try {prompts[prompt_id]})"
            elif prompt_id is not None:
                prompts[prompt_id] = attempt.try_no
                told["prompt"] = store.prompt_of(prompt_id)
            told["trial_log"] = [_known(asdict(trial)) for trial in store.trials_of_attempt(attempt.id)]
            tries.append(told)
        return {"tries": tries}

    answer = _of(db, campaign, read)
    for limit in MAX_TEXTS:
        fitted: dict[str, Any] = _cut(answer, limit)
        if len(json.dumps(fitted, ensure_ascii=False)) <= MAX_CHARS:
            return fitted
    raise InputError(f"turn {turn} is too long to show; ask for parts of it by SQL, from `attempts` and `trials`")


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _cut(value: Any, limit: int) -> Any:
    """Return plain data with every long text cut."""
    if isinstance(value, str):
        return shortened(value, limit)
    if isinstance(value, dict):
        return {key: _cut(part, limit) for key, part in value.items()}
    return [_cut(part, limit) for part in value] if isinstance(value, list) else value


def check(db: str, campaign: str, knob: str, new_value: KnobValue, reason: str) -> dict[str, Any]:
    """Return what the campaign's rails say about a proposal, now."""
    reply = _reply(knob, new_value, reason)
    verdict = _of(db, campaign, lambda store, state: _verdict(store, state, reply))
    if not verdict.passed:
        return {"passed": False, "rail": verdict.rail, "reason": verdict.reason}
    assert verdict.diff is not None
    return {"passed": True, "changes": {name: list(values) for name, values in verdict.diff.items()}}


def _verdict(store: SqlStore, state: CampaignState, reply: str) -> Verdict:
    return check_proposal(reply, stored_campaign(state), (store, state))


def _reply(knob: str, new_value: KnobValue, reason: str) -> str:
    return json.dumps({"knob": knob, "new_value": new_value, "reason": reason}, ensure_ascii=False)


def enqueue(db: str, campaign: str, knob: str, new_value: KnobValue, reason: str) -> dict[str, Any]:
    """Queue a proposal that the rails let through: one row of `events`, of kind `enqueued`.

    Raises:
        InputError: the rails block it, the campaign is finished, or too many proposals wait; nothing is written.
    """

    def read(store: SqlStore, state: CampaignState) -> CampaignState:
        if state.status == "finished":
            raise InputError(f"campaign `{state.name}` is finished ({state.stop_reason}); nothing can be queued")
        verdict = _verdict(store, state, _reply(knob, new_value, reason))
        if not verdict.passed:
            raise InputError(f"blocked by {verdict.rail}: {verdict.reason}")
        waiting = len(store.pending_requests(state.id))
        if waiting >= MAX_PENDING:
            raise InputError(
                f"{waiting} proposals wait for campaign `{state.name}` already; wait until some were tried"
            )
        return state

    state = _of(db, campaign, read)
    event = _request(db, state, "enqueued", {"knob": knob, "new_value": new_value, "reason": reason, "by": "mcp"})
    return {"queued": f"{knob} = {new_value}", "campaign": state.name, "event_id": event}


def pause(db: str, campaign: str) -> dict[str, Any]:
    """Ask a running campaign to pause after its current trial: one row of `events`, of kind `pause_requested`.

    Raises:
        InputError: it is not running; nothing is written.
    """

    def read(store: SqlStore, state: CampaignState) -> tuple[CampaignState, bool]:
        if not is_held(state):
            raise InputError(f"campaign `{state.name}` is not running ({state.status}); there is nothing to pause")
        return state, store.pause_requested(state.id)

    state, was_asked = _of(db, campaign, read)
    if not was_asked:
        _request(db, state, "pause_requested", {"by": "mcp"})
    return {"asked": "pauses after its current trial", "campaign": state.name}


def _request(db: str, state: CampaignState, kind: str, payload: dict[str, KnobValue]) -> int:
    store = SqlStore.open(db)
    try:
        return store.request(state.id, kind, payload)
    finally:
        store.close()


def schema() -> str:
    """Return every view, table and column with what it means, as text."""
    lines = []
    for kind, name, column, meaning in schema_rows():
        lines.append(f"  {column}: {meaning}" if column else f"\n{kind} {name}: {meaning}")
    return "\n".join(lines).strip() + "\n"


def report(db: str, campaign: str) -> str:
    """Return a campaign's report as Markdown."""
    return shortened(_of(db, campaign, lambda store, state: text_report(analyse(store, state.name))), MAX_CHARS)
