"""`overnight init` and `overnight check`: making a campaign, and trying a proposal on its rails."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overnight.agent.campaign import FILE_NAME, Campaign, bundled_campaigns, load_campaign, parse_campaign
from overnight.agent.cli.options import db_option, newest_name, say
from overnight.agent.cli.permission import allow_option, allow_own, permitted
from overnight.store.errors import InputError

if TYPE_CHECKING:
    from overnight.store.protocol import CampaignState
    from overnight.store.sql_store import SqlStore

_TEMPLATES = {"quickstart": "quickstart", "gpt354m": "gpt354m", "command": "command_example"}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--from", "template", type=click.Choice(list(_TEMPLATES)), default="quickstart", show_default=True)
@click.option(
    "--menu",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help='Knobs as JSON: {"lr": {"type": "float", "range": [1e-5, 1e-2], "default": 3e-4}, ...}.',
)
def init(folder: Path, template: str, menu: Path | None) -> None:
    """Make FOLDER, a commented campaign to start from."""
    import tomlkit

    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise InputError(f"`{folder}` exists and is not empty; give a new folder")
    source = bundled_campaigns()[_TEMPLATES[template]].parent
    document: Any = tomlkit.parse((source / FILE_NAME).read_text(encoding="utf-8"))
    document["campaign"]["name"] = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.absolute().name).strip("-.") or "campaign"
    if menu is not None:
        _replace_menu(document, menu)
    parse_campaign(document.unwrap(), folder / FILE_NAME)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    (folder / FILE_NAME).write_text(tomlkit.dumps(document), encoding="utf-8")
    allow_own(load_campaign(folder))
    todo = "make the two edits that it marks" if template == "command" else "read it"
    click.echo(f"made {folder / FILE_NAME}; {todo}, then `overnight run {folder}`", err=True)


def _replace_menu(document: Any, menu: Path) -> None:
    """Put the knobs of a JSON file in the template's place, and drop the constraints that spoke of others."""
    import tomlkit

    try:
        knobs = json.loads(menu.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{menu}: not JSON: {error}") from error
    if not isinstance(knobs, dict) or not all(isinstance(knob, dict) for knob in knobs.values()):
        raise InputError(f"{menu}: give one JSON object of knobs, each an object with `type` and `default`")
    document["knobs"] = tomlkit.item(
        {name: {k: v for k, v in knob.items() if v is not None} for name, knob in knobs.items()}
    )
    document.pop("constraints", None)


@click.command()
@click.argument("campaign")
@click.argument("file", type=click.File("r", encoding="utf-8", errors="replace"), default="-")
@db_option
@allow_option
def check(*, campaign: str, file: Any, db: str, allowing: bool) -> None:
    """Put one proposal (FILE, or - for standard input) through a campaign's rails.

    Exit code 0: it passed; 1: it is blocked, and the rail's id and reason are printed. `R7_capability` is left to the
    run, which knows the machine.
    """
    from overnight.agent.checking import check_proposal
    from overnight.store.database import is_missing
    from overnight.store.sql_store import SqlStore

    loaded = permitted(load_campaign(campaign), allowing=allowing, parts=("rails",))
    if is_missing(db):
        verdict = check_proposal(file.read(), loaded)
    else:
        with SqlStore.open(db) as store:
            verdict = check_proposal(file.read(), loaded, _known(store, loaded))
    if verdict.passed:
        assert verdict.diff is not None
        changes = ", ".join(f"{knob}: {old} -> {new}" for knob, (old, new) in verdict.diff.items())
        say(f"passed: {changes}")
        return
    say(f"blocked by {verdict.rail}: {verdict.reason}")
    sys.exit(1)


def _known(store: SqlStore, campaign: Campaign) -> tuple[SqlStore, CampaignState] | None:
    """Return the store and what it knows of the campaign, where it knows it."""
    state = store.campaign(newest_name(store, campaign.name, campaign.path))
    return None if state is None else (store, state)
