"""What the graph's nodes hand on: where the turn stands and what a host application wants to know; never history."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict  # pydantic makes no forms for Studio out of `typing`'s before Python 3.12

from overnight.store.records import Outcome

ASKED = "asked"
"""What was asked of this run (`--iterations`, `--until`) is done, though the campaign's budget is not: it pauses and
keeps its holdout."""
StageName = Literal[
    "calibrate", "propose", "check_rails", "train", "validate", "decide", "distill", "race", "route", "finish", "done"
]


class BudgetSpent(Exception):
    """A budget ends before what comes next would be over."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TurnInput(TypedDict):
    """What the graph is invoked with."""

    campaign: str


class TurnOutput(TypedDict, total=False):
    """What one invocation, one turn, gives back."""

    attempt_id: int | None
    outcome: Outcome | None
    best: float | None
    stop_reason: str | None


class TurnUpdate(TurnOutput, total=False):
    """What a node hands on; never history."""

    stage: StageName
    veto: str | None
    """Why a node of the host's own, after `propose`, is against the proposal; the try is then blocked, told why."""


class TurnState(TurnInput, TurnUpdate):
    """The graph's state."""
