"""Whether a campaign file may use what it wants: the gate before every command, plugin, outside path and key.

What runs a campaign's parts asks `require` here first, whoever calls it, and gets a `NotAllowedError` until somebody
has said yes: a person at a terminal, a script with `--allow`, or a host application with `allowed=True` on its
`Campaign`. Bundled campaigns are as trusted as the program itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from overnight.agent.campaign import FILE_NAME, Campaign, bundled_campaigns
from overnight.agent.permissions import is_remembered, remember
from overnight.agent.wants import Kind, Part, Want, shown, wants_of
from overnight.store.errors import NotAllowedError
from overnight.store.hashing import digest

WORDS: dict[Kind, str] = {
    "command": "run a command",
    "code": "run Python code",
    "plugin": "use a plugin",
    "path": "read outside its folder",
    "key": "send a key",
}


def open_wants(campaign: Campaign) -> tuple[Want, ...]:
    """Return what the file wants and has not been allowed; empty when it may be used whole."""
    if campaign.allowed or is_bundled(campaign):
        return ()
    wants = wants_of(campaign)
    return () if not wants or is_remembered(campaign.sha256, wants) else wants


def require(campaign: Campaign, *parts: Part) -> None:
    """Let a part of the campaign through only when what it uses is allowed.

    Raises:
        NotAllowedError: it is not; the message names what the whole file wants, and the remedy.
    """
    wants = open_wants(campaign)
    if any(want.part in parts for want in wants):
        raise not_allowed(campaign, wants)


def not_allowed(campaign: Campaign, wants: Sequence[Want]) -> NotAllowedError:
    """Return the error that names all that a file wants, in one line."""
    listed = ", ".join(f"{WORDS[want.kind]} (`{want.key}`: {shown(want.what, 200)})" for want in wants)
    return NotAllowedError(
        f"{campaign.path}: nobody has allowed this file to {listed}; read it, then run it at a terminal, which asks "
        "once, or pass `--allow`"
    )


def allow(campaign: Campaign, wants: Sequence[Want]) -> Campaign:
    """Return the campaign as allowed, and remember it for this user, by the file's bytes and by its content.

    Raises:
        OSError: the user's data folder cannot be written.
    """
    for sha256 in {campaign.sha256, digest(campaign.spec())}:
        remember(sha256, wants, where=campaign.path)
    return replace(campaign, allowed=True)


def is_bundled(campaign: Campaign) -> bool:
    """Say whether this is a campaign of the package: in the package's own folder, byte for byte."""
    for path in bundled_campaigns().values():
        folders = {path.parent.resolve(), path.resolve().parent}  # a strict editable install links each file
        if campaign.folder.resolve() in folders and campaign.path.name == FILE_NAME:
            return campaign.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return False
