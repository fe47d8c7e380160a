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

    from overnight.store.hashing import JsonValue

SHOWN = 20
"""Skipped lines that are reported one by one; the rest are counted."""


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="What to call the campaign; the file's name without its ending if left out.")
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

    if str(file) == "-" and name is None:
        raise InputError("standard input has no name; give `--name`")
    called = name or file.stem
    if not re.fullmatch(NAME_PATTERN, called):
        raise InputError(f"`{called}` cannot be a campaign's name: letters, digits, `_`, `.`, `-`; give `--name`")
    menu = None if folder is None else _menu(folder)
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


def _menu(folder: str) -> Mapping[str, JsonValue]:
    from overnight.agent.campaign import load_campaign

    knobs = load_campaign(folder).spec()["knobs"]
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
@click.option("--format", "form", type=click.Choice(["trajectory"]), default="trajectory", show_default=True)
@db_option
def export_command(campaign: str, output: Path | None, form: str, db: str) -> None:  # noqa: ARG001
    """Write CAMPAIGN as JSONL, which `overnight import` takes in again."""
    from overnight.store.trajectory_export import export_trajectory

    store = SqlStore.open(db)
    try:
        lines = export_trajectory(store, campaign_in(store, campaign).name)
        if output is None:
            for line in lines:
                sys.stdout.buffer.write(line.encode())
            sys.stdout.flush()
        else:
            _write(output, lines)
    finally:
        store.close()


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
