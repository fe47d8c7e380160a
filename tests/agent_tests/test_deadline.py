"""`until` is the next time that the clocks show it, also over midnight and when they are put forward or back."""

from __future__ import annotations

import os
import time
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from overnight.agent.deadline import next_until

BERLIN = ZoneInfo("Europe/Berlin")

CASES = [
    ("later today", "2026-11-22T21:00+01:00", "23:30", "2026-11-22T23:30+01:00"),
    ("over midnight", "2026-11-22T21:00+01:00", "07:00", "2026-11-23T07:00+01:00"),
    ("over the year's end", "2026-12-31T23:59+01:00", "00:00", "2027-01-01T00:00+01:00"),
    ("exactly now is a day ahead", "2026-11-22T07:00+01:00", "07:00", "2026-11-23T07:00+01:00"),
    ("a second too late", "2026-11-22T07:00:01+01:00", "07:00", "2026-11-23T07:00+01:00"),
    ("after the clocks went forward", "2026-03-28T22:00+01:00", "07:00", "2026-03-29T07:00+02:00"),
    ("a time that the clocks jump over", "2026-03-28T22:00+01:00", "02:30", "2026-03-29T03:00+02:00"),
    ("the jump itself", "2026-03-28T22:00+01:00", "02:00", "2026-03-29T03:00+02:00"),
    ("after the clocks went back", "2026-10-24T22:00+02:00", "07:00", "2026-10-25T07:00+01:00"),
    ("a time that comes twice", "2026-10-24T22:00+02:00", "02:30", "2026-10-25T02:30+02:00"),
    ("its second coming", "2026-10-25T02:45+02:00", "02:30", "2026-10-25T02:30+01:00"),
    ("after its second coming", "2026-10-25T02:45+01:00", "02:30", "2026-10-26T02:30+01:00"),
]


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(("what", "now", "text", "expected"), CASES, ids=[case[0] for case in CASES])
def test_until_is_the_next_time_that_the_clocks_show(what: str, now: str, text: str, expected: str) -> None:
    assert next_until(text, seconds(now), BERLIN) == seconds(expected)


@pytest.mark.parametrize(("what", "now", "text", "expected"), CASES, ids=[case[0] for case in CASES])
def test_this_machines_own_zone_counts_alike(
    monkeypatch: pytest.MonkeyPatch, what: str, now: str, text: str, expected: str
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert next_until(text, seconds(now)) == seconds(expected)
    finally:
        monkeypatch.undo()
        os.environ.get("TZ")
        time.tzset()
