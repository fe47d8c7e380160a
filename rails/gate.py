"""The gate: a proposer's reply goes in as text, a verdict with its rail and reason comes out.

Rails run in the order of the design and stop at the first that blocks. A reason is written for whoever proposed, so
that another try can act on it. Nothing here raises on any reply; nothing here knows who proposed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from overnight.rails.menu import Change, Menu
from overnight.store.records import Config, KnobValue

MAX_REPLY_BYTES = 64 * 1024
MAX_REASON_CHARS = 500
KEYS = ("knob", "new_value", "reason")
SKIPPABLE = frozenset({"R6_novelty", "R7_capability"})
"""Rails that a campaign may skip, to replay old ones."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A well-formed reply: one knob, one value as JSON gave it, a reason."""

    knob: str
    new_value: object
    reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a rail sees. `config` is the resulting configuration, canonical from `R4_cross` on."""

    menu: Menu
    baseline: Config
    proposal: Proposal
    config: Config


class Rail(Protocol):
    """One check. It raises at campaign start, in its constructor, if it cannot enforce what it states."""

    id: str

    def check(self, candidate: Candidate) -> str | None:
        """Return why `candidate` is blocked, in words a model can act on, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says: passed when `rail` is None. What was understood before a block is kept."""

    rail: str | None = None
    reason: str = ""
    proposal: Proposal | None = None
    value: KnobValue | None = None
    """The proposed value in the knob's own type."""
    config: Config | None = None
    diff: Mapping[str, tuple[KnobValue, KnobValue]] | None = None
    """Changed knobs: (from, to)."""

    @property
    def passed(self) -> bool:
        """Whether every rail let the proposal through."""
        return self.rail is None


class _MalformedReply(ValueError):
    pass


def parse_reply(reply: str) -> Proposal:
    """Read a reply as exactly one JSON object with the three keys (rail `R1_schema`).

    Raises:
        ValueError: it is anything else; the message says what, for the proposer.
    """
    if len(reply) > MAX_REPLY_BYTES or len(reply.encode("utf-8", "surrogatepass")) > MAX_REPLY_BYTES:
        raise ValueError(f"the reply is over {MAX_REPLY_BYTES // 1024} KiB; answer with one short JSON object")
    try:
        value = json.loads(reply, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except _MalformedReply as error:
        raise ValueError(str(error)) from None
    except (ValueError, RecursionError):
        raise ValueError('answer with one JSON object {"knob": ..., "new_value": ..., "reason": ...} alone') from None
    if not isinstance(value, dict):
        raise ValueError("the reply is JSON but not an object; answer with one JSON object")
    if set(value) != set(KEYS):
        missing = [key for key in KEYS if key not in value]
        what = (
            f"`{missing[0]}` is missing"
            if missing
            else f"`{_clip(min(set(value) - set(KEYS)))}` is not a key of a proposal"
        )
        raise ValueError(f"{what}; use exactly the keys {', '.join(KEYS)}")
    knob, reason = value["knob"], value["reason"]
    if not isinstance(knob, str):
        raise ValueError("`knob` must be text: the name of one knob")
    if not isinstance(reason, str) or len(reason) > MAX_REASON_CHARS:
        raise ValueError(f"`reason` must be text of at most {MAX_REASON_CHARS} characters")
    new_value = value["new_value"]
    if not all(_is_text(text) for text in (knob, reason, new_value) if isinstance(text, str)):
        raise ValueError("`knob`, `new_value` and `reason` must be plain text without NUL or unpaired surrogates")
    return Proposal(knob, new_value, reason)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise _MalformedReply("a key appears twice; give each key once")
    return dict(pairs)


def _no_constant(name: str) -> object:
    raise _MalformedReply(f"{name} is not a value; give a finite number")


def _is_text(text: str) -> bool:
    try:
        text.encode()  # a loop over a reply's 64 Ki characters takes 10 ms, this 0.002
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _clip(text: str, limit: int = 60) -> str:
    """Return one line of a model's text, for a reason that goes into a prompt again."""
    flat = " ".join(text.split())
    shown = flat if len(flat) <= limit else flat[: limit - 1] + "…"
    return shown.encode("utf-8", "replace").decode()


def check_reply(reply: str, *, menu: Menu, baseline: Config, rails: Sequence[Rail]) -> Verdict:
    """Run one reply through `R1_schema` .. `R5_diff`, then through `rails` in their order."""
    try:
        proposal = parse_reply(reply)
    except ValueError as error:
        return Verdict("R1_schema", str(error))
    knob = menu.by_name.get(proposal.knob)
    if knob is None:
        known = ", ".join(menu.by_name)
        return Verdict("R2_menu", f"`{_clip(proposal.knob)}` is not on the menu; choose one of {known}", proposal)
    problem = knob.problem(proposal.new_value)
    if problem:
        return Verdict("R3_range", f"`{knob.name}`: {_clip(problem, 200)}; it takes {knob.describe()}", proposal)
    value = knob.coerce(proposal.new_value)
    config = menu.apply(baseline, Change(knob.name, value))
    broken = menu.broken_constraint(config)
    if broken:
        doc = f" ({broken.doc})" if broken.doc else ""
        reason = f"{knob.name} = {value} breaks `{broken.id}`: {broken.rule}{doc}"
        return Verdict("R4_cross", reason, proposal, value, config)
    diff = {name: (baseline[name], config[name]) for name in menu.by_name if baseline.get(name) != config[name]}
    if set(baseline) != set(config) or not set(diff) <= {knob.name}:
        reason = f"the result differs from the baseline in more than `{knob.name}`: {', '.join(sorted(diff))}"
        return Verdict("R5_diff", reason, proposal, value, config, diff)
    candidate = Candidate(menu, baseline, proposal, config)
    for rail in rails:
        blocked = rail.check(candidate)
        if blocked:
            return Verdict(rail.id, blocked, proposal, value, config, diff)
    return Verdict(None, "", proposal, value, config, diff)


class NoveltyRail:
    """`R6_novelty`: blocks a no-op, and a resulting configuration that the decision rule is done with."""

    id = "R6_novelty"

    def __init__(self, earlier: Callable[[Config], str | None]) -> None:
        """`earlier` says in words what became of a configuration that is done with, and None of any other."""
        self._earlier = earlier

    def check(self, candidate: Candidate) -> str | None:
        """Return the earlier result of this configuration, or None when it is new."""
        knob = candidate.proposal.knob
        if candidate.config == candidate.baseline:
            return f"`{knob}` is {candidate.baseline[knob]} already; choose another value or another knob"
        earlier = self._earlier(candidate.config)
        return f"{knob} = {candidate.config[knob]} was tried: {earlier}; choose an untried change" if earlier else None
