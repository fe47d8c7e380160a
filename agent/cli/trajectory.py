"""`overnight import` and `overnight export`: a trajectory as JSONL, in and out."""

from __future__ import annotations

import re
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from overnight.agent.cli.options import campaign_in, db_option
from overnight.store.errors import InputError, StoreError
from overnight.store.sql_store import SqlStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from overnight.agent.campaign import Campaign
    from overnight.store.hashing import JsonValue

SHOWN = 20
"""Skipped lines that are reported one by one; the rest are counted."""


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="What to call the campaign; if left out, as `--campaign` does, or as the file.")
@click.option(
    "--campaign", "folder", metavar="DIR", help="Its campaign file: the menu, without which coverage is NULL."
)
@click.option("--seed", "new", metavar="DIR", help="Seed this new campaign's prompts with FILE's history instead.")
@db_option
def import_command(*, file: Path, name: str | None, folder: str | None, new: str | None, db: str) -> None:
    """Take a trajectory (JSONL) from FILE, or `-`, into the store. Importing it again adds what is new."""
    if new is not None:
        _seed(file, new, name, db)
        return
    from overnight.agent.campaign_file import NAME_PATTERN
    from overnight.store.trajectory import import_trajectory

    of = None if folder is None else _loaded(folder)
    if str(file) == "-" and name is None and of is None:
        raise InputError("standard input has no name; give `--name`")
    called = name or (file.stem if of is None else of.name)
    if not re.fullmatch(NAME_PATTERN, called):
        raise InputError(f"`{called}` cannot be a campaign's name: letters, digits, `_`, `.`, `-`; give `--name`")
    menu = None if of is None else _menu(of)
    with _opened(file) as lines:
        store = SqlStore.open(db, create=True)
        try:
            done = import_trajectory(store, lines, name=called, origin=str(file), menu=menu)
        finally:
            store.close()
    for skipped in done.skipped[:SHOWN]:
        click.echo(f"overnight: {file}: line {skipped.line} skipped: {skipped.why}", err=True)
    if len(done.skipped) > SHOWN:
        click.echo(f"overnight: {file}: {len(done.skipped) - SHOWN} more lines skipped", err=True)
    known = f", {done.known} were there already" if done.known else ""
    click.echo(f"imported {done.added} attempts into campaign `{done.campaign}`{known}", err=True)


def _seed(file: Path, folder: str, name: str | None, db: str) -> None:
    from overnight.agent.campaign import load_campaign
    from overnight.store.seeding import seed_campaign

    campaign = load_campaign(folder)
    if name is not None and name != campaign.name:
        raise InputError(f"`--name`: `--seed` names the campaign by its file, `{campaign.name}`; leave one out")
    with _opened(file) as lines:
        store = SqlStore.open(db, create=True)
        try:
            taken, _ = seed_campaign(
                store,
                lines,
                name=campaign.name,
                path=str(campaign.path),
                spec=campaign.spec(),
                frozen_hash=campaign.frozen_hash(),
                origin=str(file),
            )
        finally:
            store.close()
    click.echo(f"campaign `{campaign.name}` begins with what {taken} attempts of {file} found", err=True)


def _loaded(folder: str) -> Campaign:
    from overnight.agent.campaign import load_campaign

    return load_campaign(folder)


def _menu(campaign: Campaign) -> Mapping[str, JsonValue]:
    knobs = campaign.spec()["knobs"]
    assert isinstance(knobs, dict)
    return knobs


def _opened(file: Path) -> AbstractContextManager[BinaryIO]:
    """Open the file, or standard input, before a database is made."""
    if str(file) == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(f"`{file}`: cannot be read ({error.strerror}); give a trajectory as JSONL") from error


@click.command("export")
@click.argument("campaign")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A file; standard output if left out.")
@click.option("--format", "form", type=click.Choice(["trajectory", "chat"]), default="trajectory", show_default=True)
@db_option
def export_command(campaign: str, output: Path | None, form: str, db: str) -> None:
    """Write CAMPAIGN as JSONL: a trajectory, which `overnight import` takes in again, or its corpus as conversations.

    `chat` is what TRL and axolotl train on; it reads the campaign's file, for `[distill]` says what is held out.
    """
    from overnight.store.trajectory_export import export_trajectory

    store = SqlStore.open(db)
    try:
        state = campaign_in(store, campaign)
        lines = export_trajectory(store, state.name) if form == "trajectory" else _conversations(store, campaign)
        if output is None:
            for line in lines:
                sys.stdout.buffer.write(line.encode())
            sys.stdout.flush()
        else:
            _write(output, lines)
    finally:
        store.close()


def _conversations(store: SqlStore, campaign: str) -> Iterator[str]:
    from overnight.agent.cli.learning import stored_file
    from overnight.agent.distilling import stored_corpus
    from overnight.distill.chat_export import chat_lines

    file = stored_file(store, campaign)
    return chat_lines(stored_corpus(store, file), campaign=file.name)


def _write(output: Path, lines: Iterator[str]) -> None:
    """Write beside the target and rename: the file is whole or as it was."""
    partial = output.with_name(output.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(line.encode() for line in lines)
        partial.replace(output)
    except OSError as error:
        raise StoreError(f"cannot write `{output}`: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
