"""Learning in words: one line for an event of distilling, a bar while it goes on, and where a campaign stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from overnight.agent import events
from overnight.store.protocol import CampaignState, TrajectoryStore

if TYPE_CHECKING:
    from rich.console import RenderableType


def describe_learning(event: events.Event) -> str | None:
    """Return one line for an event of learning, or None for any other."""
    match event:
        case events.DistillWaiting():
            return f"distilling waits: {event.rows} rows teach, {event.min_rows} are needed (`distill.min_rows`)"
        case events.DistillStarted():
            return f"distilling {event.contestant} on {event.rows} rows"
        case events.Distilled():
            ends = [*event.losses[:1], *event.losses[1:][-1:]]
            loss = f"loss {' -> '.join(f'{each:.3f}' for each in ends)}" if ends else "no loss"
            return f"distilled {event.contestant} in {event.wall_s:.0f} s: {loss}{_held_out(event)}{_too_long(event)}"
        case events.DistillFailed():
            return f"distilling {event.proposer} failed, the champion stays: {event.reason}"
    return None


def _held_out(event: events.Distilled) -> str:
    if event.held_out_before is None or event.held_out_after is None:
        return ""
    return f", held out {event.held_out_before:.3f} -> {event.held_out_after:.3f}"


def _too_long(event: events.Distilled) -> str:
    return f", {event.too_long} rows over `max_length` left out" if event.too_long else ""


def time_left(seconds: float) -> str:
    """Return a duration as people read it: 1:05."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02}"


def distill_bar(news: events.DistillStepped) -> RenderableType:
    """Return a bar with the loss and the time that is left."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    row.add_row(ProgressBar(total=news.steps, completed=news.step), Text(_numbers(news)))
    return row


def distill_line(news: events.DistillStepped) -> str:
    """Return the same as plain text, for logs."""
    return f"distilling: step {news.step}/{news.steps} {_numbers(news)}"


def _numbers(news: events.DistillStepped) -> str:
    left = time_left(news.seconds_left)
    return f"epoch {news.epoch}/{news.epochs}  loss {news.loss:.3f}  {left} left"


def learning_state(store: TrajectoryStore, state: CampaignState) -> str | None:
    """Return in words how far a campaign's student is, or None where nobody learns."""
    distill, router = state.spec.get("distill"), state.spec.get("router")
    made = store.distillations(state.id)
    if not isinstance(distill, Mapping) or not isinstance(router, Mapping) or router.get("challenger") is None:
        distill = {}
    if not distill and not made:
        return None
    rows, needed = store.teaching_count(state.id), distill.get("min_rows")
    parts = []
    if made:
        last = made[0]
        what = "failed" if last.version is None else f"{last.proposer}@v{last.version}"
        parts.append(f"{what} after turn {last.iteration}")
    if isinstance(needed, int) and rows < needed:
        parts.append(f"waits for rows: {rows} of {needed}")
    every = distill.get("every")
    if isinstance(every, int) and state.status != "finished":
        done = store.next_stage(state.id).iteration - 1
        parts.append(f"next look after turn {(done // every + 1) * every}")
    return "; ".join(parts) or None
