"""When `until` comes: the next local time HH:MM, over midnight and over the two odd nights of the year.

A time that the clocks jump over comes when they jump; one that comes twice comes at its next coming. A run that was
cut off, by a crash or by SIGTERM, keeps the deadline that it began with: a machine that was down at 07:00 does not run
until 07:00 of the next day.
"""

from __future__ import annotations

from datetime import datetime, timedelta, tzinfo

from overnight.agent.campaign import Campaign
from overnight.store.protocol import TrajectoryStore

MINUTE = timedelta(minutes=1)


def next_until(text: str, now: float, zone: tzinfo | None = None) -> float:
    """Return when the clocks next show `HH:MM`, in seconds since the epoch; exactly now counts as a day ahead.

    Args:
        text: local time.
        now: seconds since the epoch.
        zone: None: this machine's.
    """
    hour, minute = map(int, text.split(":"))
    today = datetime.fromtimestamp(now, zone)
    for days in range(3):
        day = (today.replace(tzinfo=None) + timedelta(days=days)).date()
        for fold in (0, 1):
            wanted = datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone, fold=fold)
            at = _shown(wanted, zone)
            if at > now:
                return at
    raise AssertionError(f"no {text} in the three days after {today}")


def _shown(wanted: datetime, zone: tzinfo | None) -> float:
    """Return when the clocks show `wanted`, or, where they jump over it, when they jump."""
    at = wanted.timestamp()
    shown = datetime.fromtimestamp(at, zone)
    if shown.replace(tzinfo=None) == wanted.replace(tzinfo=None):
        return at
    # `fold=1` reads a skipped time by the clock after the jump, which lies before it: walk up to the jump.
    before = wanted.replace(fold=1).timestamp()
    walked = datetime.fromtimestamp(before, zone)
    while walked.replace(tzinfo=None) < wanted.replace(tzinfo=None):
        before += MINUTE.total_seconds()
        walked = datetime.fromtimestamp(before, zone)
    return before


def deadline_of(campaign: Campaign, store: TrajectoryStore, now: float) -> float | None:
    """Return when the campaign's budget of clock time ends, in seconds since the epoch; None without one."""
    text = campaign.file.budget.until
    if text is None:
        return None
    state = store.campaign(campaign.name)
    if state is not None and (state.status == "running" or state.stop_reason == "SIGTERM"):
        started = store.last_event(state.id, "run_started")
        said = started[1] if started else {}
        if said.get("until") == text and isinstance(said.get("deadline"), str):
            return datetime.fromisoformat(str(said["deadline"])).timestamp()
    return next_until(text, now)
