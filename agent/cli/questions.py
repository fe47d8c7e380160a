"""Asking whoever sits at the terminal before a promotion (`[router] ask`); who does not answer holds up nothing."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import click

from overnight.store.hashing import JsonValue

PATIENCE_S = 300.0
"""So long a question waits on the terminal; then the campaign goes on, and `overnight promote` answers."""
_ANSWERS = {"y": "yes", "yes": "yes", "n": "no", "no": "no"}


def person(
    quiet: Callable[[], AbstractContextManager[None]], *, patience_s: float = PATIENCE_S
) -> Callable[[Mapping[str, JsonValue]], str]:
    """Return who answers the graph's questions: the person at the terminal, or nobody where there is none.

    Args:
        quiet: what keeps the live panel off the terminal while somebody types.
        patience_s: how long to wait.
    """

    def ask(question: Mapping[str, JsonValue]) -> str:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return "later"
        with quiet():
            click.echo(f"{question['challenger']} may take over from {question['champion']}: {question['reason']}")
            click.echo(f"Promote it? y, n, or nothing within {patience_s / 60:g} minutes to decide later: ", nl=False)
            ready, _, _ = select.select([sys.stdin], [], [], patience_s)
            answer = _ANSWERS.get(sys.stdin.readline().strip().lower(), "later") if ready else "later"
            click.echo("" if ready else "later")
        return answer

    return ask
