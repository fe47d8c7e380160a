"""Asking whoever sits at the terminal before a promotion (`[router] ask`); who does not answer holds up nothing."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import click

from overnight.store.hashing import JsonValue

PATIENCE_S = 300.0
"""So long a question waits on the terminal; then the campaign goes on, and `overnight promote` answers."""
SLICE_S = 1.0
"""How often `idle` is called meanwhile."""
_ANSWERS = {"y": "yes", "yes": "yes", "n": "no", "no": "no"}


def person(
    quiet: Callable[[], AbstractContextManager[None]],
    *,
    patience_s: float = PATIENCE_S,
    idle: Callable[[], None] = lambda: None,
) -> Callable[[Mapping[str, JsonValue]], str]:
    """Return who answers the graph's questions: the person at the terminal, or nobody where there is none.

    Args:
        quiet: what keeps the live panel off the terminal while somebody types.
        patience_s: how long to wait.
        idle: called about every second meanwhile: the campaign's lease must not lapse; what it raises is passed on.
    """

    def ask(question: Mapping[str, JsonValue]) -> str:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return "later"
        with quiet():
            click.echo(f"{question['challenger']} may take over from {question['champion']}: {question['reason']}")
            click.echo(f"Promote it? y, n, or nothing within {patience_s / 60:g} minutes to decide later: ", nl=False)
            ready = _typed(patience_s, idle)
            answer = _ANSWERS.get(sys.stdin.readline().strip().lower(), "later") if ready else "later"
            click.echo("" if ready else "later")
        return answer

    return ask


def _typed(patience_s: float, idle: Callable[[], None]) -> bool:
    """Say whether a line was typed in time."""
    ends = time.monotonic() + patience_s
    while (left := ends - time.monotonic()) > 0:
        ready, _, _ = select.select([sys.stdin], [], [], min(left, SLICE_S))
        if ready:
            return True
        idle()
    return False
