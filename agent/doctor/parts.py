"""Looks at a campaign's file and parts: permission, store and lease, students and their licences, who is told."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from overnight.agent.budget import is_over
from overnight.agent.campaign import Campaign
from overnight.agent.doctor.finding import Finding, amiss, note, ok
from overnight.agent.doctor.machine import store_folder
from overnight.agent.proposers.protocol import Proposer, ProposerContext
from overnight.agent.proposers.registry import build_proposer
from overnight.agent.run import cache_folder
from overnight.agent.runtime import Runtime
from overnight.agent.trust import WORDS, is_bundled, require
from overnight.agent.wants import Want, shown, wants_of
from overnight.distill.base import find_base
from overnight.distill.licence import licence_of
from overnight.store.errors import CampaignError
from overnight.store.lease import is_alive
from overnight.store.protocol import CampaignState

OPEN_LICENCES = ("apache-2.0", "mit", "bsd")


def described(campaign: Campaign) -> Finding:
    """Say what the file is."""
    menu = campaign.menu
    found = f"{campaign.name}: {len(menu.knobs)} knobs, trainer {campaign.file.campaign.trainer}"
    return ok("campaign", f"{found}, champion {campaign.champion}")


def allowed(campaign: Campaign) -> Finding:
    """Say what the file wants that was allowed."""
    if is_bundled(campaign):
        return ok("permission", "a bundled campaign, trusted as the program itself")
    wants = wants_of(campaign)
    return ok("permission", ", ".join(map(_in_words, wants)) if wants else "the file wants nothing that is asked for")


def _in_words(want: Want) -> str:
    return f"{WORDS[want.kind]} (`{want.key}`: {shown(want.what, 100)})"


def proposers(campaign: Campaign) -> Iterator[tuple[str, Proposer | Finding]]:
    """Build each proposer by itself, so that one that is amiss does not hide the others.

    Raises:
        NotAllowedError: nobody has allowed the file what they use.
    """
    require(campaign, "proposers")
    context = ProposerContext(campaign_dir=campaign.folder, cache_dir=cache_folder(), menu=campaign.menu)
    for name, table in campaign.file.proposers.items():
        try:
            yield name, build_proposer(name, table, context)
        except CampaignError as error:
            yield name, amiss(f"proposer {name}", error)


def position(runtime: Runtime, state: CampaignState) -> Finding:
    """Say where the campaign stands, and whether anything keeps it from going on."""
    if state.lease_owner is not None and is_alive(state.lease_owner, state.lease_seen_at):
        host, pid, _ = state.lease_owner.rsplit(":", 2)
        found = f"process {pid} on {host} runs it since {state.lease_since}"
        return amiss("position", found, f"`overnight pause {state.name}` stops it after its trial")
    if state.status == "finished" and is_over(runtime, state):
        return amiss("position", f"finished ({state.stop_reason})", "raise its budget, or start anew with `--fresh`")
    if state.baseline_config_id is None:
        return ok("position", "it has not begun")
    spent = runtime.store.spent(state.id)
    return ok("position", f"{spent.iterations} of {runtime.campaign.file.budget.iterations} turns are over")


def adapters(campaign: Campaign, db: str) -> Finding | None:
    """Look whether adapters can be written; None where nothing is distilled."""
    if campaign.file.router.challenger is None:
        return None
    folder = store_folder(db) / "adapters" / campaign.name
    there: Path = folder
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"overnight")
    except OSError as error:
        return amiss("adapters", f"`{there}` cannot be written: {error.strerror}", "make it writable")
    versions = len([*folder.glob("v*")]) if folder.is_dir() else 0
    return ok("adapters", f"{folder} can be written; {versions} versions are there")


def licences(campaign: Campaign, built: Mapping[str, Proposer]) -> Iterator[Finding]:
    """Say under which licence each student's base model is used: it binds the adapters too."""
    for name, table in campaign.file.proposers.items():
        if table.get("kind") != "student" or name not in built:
            continue
        try:
            licence = licence_of(find_base(str(table["base_model"]), campaign.folder))
        except (CampaignError, OSError, ValueError) as error:
            yield amiss(f"licence {name}", error)
            continue
        found = f"{table['base_model']}: {licence}"
        is_open = licence.lower().startswith(OPEN_LICENCES)
        hint = "read it before the model or its adapters leave this machine"
        yield ok(f"licence {name}", found) if is_open else note(f"licence {name}", found, hint)


def telling(campaign: Campaign) -> Finding | None:
    """Look whether the `[notify] command` is there; it is not run. None where nobody is told."""
    words, named = campaign.file.notify.command, campaign.file.notify.env
    if not words:
        return None
    program = str(campaign.folder / words[0]) if os.sep in words[0] else words[0]
    if shutil.which(program) is None:
        return amiss("notify", f"`{words[0]}` is not a program that can be run", "correct `notify.command`")
    unset = [name for name in named if name not in os.environ]
    if unset:
        return amiss("notify", f"the variable `{unset[0]}` is not set", f"`export {unset[0]}=...` before the run")
    return ok("notify", f"`{words[0]}` is there; it was not run")
