"""A disk that is full refuses a transaction whole, says that it may be repeated, and takes it once there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from overnight.store.errors import StorageFaultError
from overnight.store.sql_store import SqlStore

from ..disks import fill, make_room, small_disk
from .suite import Campaigner

BIG = {"text": "x" * 400_000}


def test_a_transaction_that_found_no_room_is_repeated_when_there_is_some(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=2048) as disk:
        store = SqlStore.open(disk / "overnight.db", create=True)
        campaign = Campaigner(store)
        fill(disk)
        for _ in range(2):
            with (
                pytest.raises(StorageFaultError, match="full; what was committed is there"),
                store.writing(campaign.lease) as writer,
            ):
                writer.event("big", BIG)
        assert store.last_event(campaign.state.id, "big") is None
        make_room(disk)
        with store.writing(campaign.lease) as writer:
            writer.event("big", BIG)
        assert store.last_event(campaign.state.id, "big") is not None
        store.close()
