"""A campaign's story as Markdown: the report for a terminal, a chat, or an agent's context.

It has the words and tables of the HTML report without its charts, and is bounded however long the campaign was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from overnight.report.analysis import Analysis
from overnight.report.story import best_kept, findings, gain_said, headline

MOST_KEPT = 20
MOST_KNOBS = 40
MAX_CELL = 120


def text_report(found: Analysis) -> str:
    """Return the report; a text that a model or a script wrote is cut and kept to one cell."""
    parts = [f"# {found.name}\n", f"{headline(found)}\n", *(f"- {sentence}" for sentence in findings(found))]
    kept = best_kept(found)
    best = kept[:MOST_KEPT]
    metric = found.stats["metric_name"]
    parts += _section(
        f"Kept changes, the best first ({len(best)} of {len(kept)})",
        ("turn", "proposer", "change", metric, "gain", "trials"),
        [
            (t.iteration, t.proposer, f"{t.knob} = {t.new_value}", t.metric, gain_said(found, t.gain), t.trials)
            for t in best
        ],
    )
    parts += _section("What the winner changed", ("knob", "at the start", "winner"), found.winner_diff[:MOST_KNOBS])
    parts += _section(
        "Knobs",
        ("knob", "proposed", "kept", "values tried", "best gain"),
        [
            (row["knob"], row["proposed"], row["kept"], row["distinct_values"], gain_said(found, row["best_gain"]))
            for row in found.knobs[:MOST_KNOBS]
        ],
    )
    parts += _section(
        "Proposers",
        ("proposer", "proposals", "valid", "kept", "repeat rate", "seconds each"),
        [
            tuple(row[key] for key in ("proposer", "proposals", "valid", "kept", "repeat_rate", "mean_latency_s"))
            for row in found.proposers[:MOST_KNOBS]
        ],
    )
    parts += _section(
        "What failed or was blocked",
        ("what", "kind", "times", "last turn", "an example"),
        [
            tuple(row[key] for key in ("what", "kind", "times", "last_turn", "example"))
            for row in found.failures[:MOST_KNOBS]
        ],
    )
    return "\n".join(parts) + "\n"


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a titled table, or nothing where it has no rows."""
    lines = [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    if not lines:
        return []
    return [f"\n## {title}\n", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns), *lines]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
