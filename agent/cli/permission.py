"""Asking a person whether a campaign file may use what it wants: once, for the file as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar, get_args

import click

from overnight.agent.campaign import Campaign
from overnight.agent.trust import WORDS, allow, not_allowed, open_wants
from overnight.agent.wants import Part, Want, shown

F = TypeVar("F", bound=Callable[..., Any])


def allow_option(function: F) -> F:
    """Add `--allow`."""
    return click.option(
        "--allow",
        "allowing",
        is_flag=True,
        help="Allow what this campaign file wants (commands, plugins, outside paths, keys) without asking.",
    )(function)


def permitted(campaign: Campaign, *, allowing: bool, parts: Sequence[Part] = get_args(Part)) -> Campaign:
    """Return the campaign once all that its file wants is allowed; at a terminal, ask.

    A command that uses only some `parts` of a campaign asks only when one of these wants something.

    Raises:
        NotAllowedError: nobody is there to ask, or the answer was no.
    """
    wants = open_wants(campaign)
    if not any(want.part in parts for want in wants):
        return campaign
    if not allowing and not _asked(campaign, wants):
        raise not_allowed(campaign, wants)
    try:
        return allow(campaign, wants)
    except OSError as error:
        click.echo(f"overnight: this permission cannot be remembered: {error}", err=True)
        return replace(campaign, allowed=True)


def allow_own(campaign: Campaign) -> None:
    """Remember a permission for a file that this program has just written for this user."""
    wants = open_wants(campaign)
    if wants:
        with suppress(OSError):  # then it is asked for at the first run
            allow(campaign, wants)


def _asked(campaign: Campaign, wants: tuple[Want, ...]) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    click.echo(f"{shown(str(campaign.path))} wants more than a file from somebody else should get unasked:\n", err=True)
    for want in wants:
        click.echo(f"  {click.style(WORDS[want.kind], bold=True)}  [{shown(want.key)}]", err=True)
        click.echo(f"      {shown(want.what)}", err=True)
    click.echo(err=True)
    return click.confirm("Allow this, for the file as it is now?", default=False, err=True)
