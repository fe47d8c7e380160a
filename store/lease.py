"""One writer a campaign: a lease with an epoch, checked inside every writing transaction.

A holder on this machine is alive while its process is; one on another machine while it was seen in the last two
minutes. Taking a lease raises the epoch, so that a stale writer's next transaction fails instead of doubling a result.
"""

from __future__ import annotations

import os
import socket
from datetime import datetime, timedelta

import psutil
from sqlalchemy import Connection, select, update

from overnight.store import clock
from overnight.store.errors import LeaseHeldError, LeaseLostError
from overnight.store.protocol import CampaignState, Lease
from overnight.store.tables import CampaignRow, utc_now

REMOTE_SILENCE = timedelta(minutes=2)
"""A holder on another machine that was not seen for so long is taken for dead."""


def this_process() -> str:
    """Return what identifies this process: host, process id, and the time it started (ids are reused)."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def acquire(connection: Connection, campaign_id: int) -> Lease:
    """Take the lease inside a writing transaction.

    Raises:
        LeaseHeldError: its holder is alive; the message says who it is, and since when.
    """
    columns = (
        CampaignRow.name,
        CampaignRow.lease_epoch,
        CampaignRow.lease_owner,
        CampaignRow.lease_since,
        CampaignRow.lease_seen_at,
    )
    row = connection.execute(select(*columns).where(CampaignRow.id == campaign_id).with_for_update()).one()
    owner = this_process()
    if row.lease_owner not in (None, owner) and is_alive(row.lease_owner, row.lease_seen_at):
        raise _held(row.name, row.lease_owner, row.lease_since)
    now = utc_now()
    values = {"lease_epoch": row.lease_epoch + 1, "lease_owner": owner, "lease_since": now, "lease_seen_at": now}
    connection.execute(update(CampaignRow).where(CampaignRow.id == campaign_id).values(values))
    return Lease(campaign_id, row.lease_epoch + 1, owner)


def refuse_held(state: CampaignState) -> None:
    """Refuse a campaign that a process runs now; `acquire` alone says who may write.

    Raises:
        LeaseHeldError: its holder is alive.
    """
    if state.lease_owner is not None and is_held(state):
        raise _held(state.name, state.lease_owner, state.lease_since)


def _held(name: str, owner: str, since: str | None) -> LeaseHeldError:
    host, pid, _ = owner.rsplit(":", 2)
    return LeaseHeldError(
        f"campaign `{name}` is being run by process {pid} on {host} since {since}; "
        f"`overnight pause {name}` stops it after its current trial"
    )


def check(connection: Connection, lease: Lease) -> None:
    """Raise unless the lease is still the campaign's.

    Raises:
        LeaseLostError: another process took it.
    """
    columns = CampaignRow.name, CampaignRow.lease_epoch, CampaignRow.lease_owner
    # FOR SHARE on PostgreSQL: nobody takes the lease between this look and the commit. SQLite's one writer needs none.
    query = select(*columns).where(CampaignRow.id == lease.campaign_id).with_for_update(read=True)
    row = connection.execute(query).one()
    if row.lease_epoch != lease.epoch or row.lease_owner != lease.owner:
        holder = row.lease_owner or "nobody"
        raise LeaseLostError(f"campaign `{row.name}` was taken over by {holder}; nothing more is written from here")


def renew(connection: Connection, lease: Lease) -> None:
    """Record that the holder is alive.

    Raises:
        LeaseLostError: another process took the lease.
    """
    check(connection, lease)
    connection.execute(update(CampaignRow).where(CampaignRow.id == lease.campaign_id).values(lease_seen_at=utc_now()))


def release(connection: Connection, lease: Lease) -> None:
    """Give the lease back, if it is still held."""
    connection.execute(
        update(CampaignRow)
        .where(CampaignRow.id == lease.campaign_id, CampaignRow.lease_epoch == lease.epoch)
        .values(lease_owner=None, lease_since=None, lease_seen_at=None)
    )


def is_held(state: CampaignState) -> bool:
    """Say whether a live process runs the campaign, as far as this machine can tell."""
    return state.lease_owner is not None and is_alive(state.lease_owner, state.lease_seen_at)


def is_alive(owner: str, seen_at: str | None) -> bool:
    """Say whether the process behind a lease still runs, as far as this machine can tell."""
    host, pid, started = owner.rsplit(":", 2)
    if host != socket.gethostname():
        return seen_at is not None and clock.now() - datetime.fromisoformat(seen_at) < REMOTE_SILENCE
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(started)) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
