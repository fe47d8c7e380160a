"""The charts of contests: a race turn by turn, and the evidence over duels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from overnight.report.figures import Figure, escaped, figure
from overnight.report.races import COLORS, OUTCOMES, RaceItems

Row = Mapping[str, Any]
MOST_TURNS = 60
"""Held-out turns drawn at most: the newest."""
TRIED = "tried then"


def race_chart(race: RaceItems) -> Figure | None:
    """Each held-out turn: what was tried and what came of it, and what each proposer picked."""
    items = race.items[-MOST_TURNS:]
    if not items:
        return None
    turns = [f"{item.iteration}" for item in items]
    data = [
        _squares(
            [(turn, TRIED, f"{item.tried}: {item.outcome}") for turn, item in zip(turns, items, strict=True)
             if item.outcome == outcome],
            outcome, color, "circle",
        )
        for outcome, color in OUTCOMES.items()
    ]  # fmt: skip
    for match, color in COLORS.items():
        points = [
            (turn, name, f"{pick.change or pick.why} ({pick.match}; {pick.exact} of {pick.draws} draws exact)")
            for turn, item in zip(turns, items, strict=True)
            for name, pick in item.picks.items()
            if pick.match == match
        ]
        data.append(_squares(points, match, color, "square"))
    rows = [TRIED, *race.proposers]
    yaxis = {"automargin": True, "categoryorder": "array", "categoryarray": [escaped(name) for name in rows[::-1]]}
    xaxis = {"title": {"text": "held-out turn"}, "type": "category"}
    drawn = [trace for trace in data if trace["x"]]
    return figure(drawn, 150 + 42 * len(rows), xaxis=xaxis, yaxis={**yaxis, "type": "category"})


def _squares(points: Sequence[tuple[str, str, str]], name: str, color: str, symbol: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [turn for turn, _, _ in points],
        "y": [escaped(row) for _, row, _ in points],
        "text": [escaped(words) for _, _, words in points],
        "hovertemplate": "turn %{x}: %{text}<extra></extra>",
        "marker": {"color": color, "size": 15, "symbol": symbol, "line": {"width": 1, "color": "#8a94a6"}},
    }


def evidence_chart(weighed: Sequence[Row]) -> Figure | None:
    """The e-value of each challenger over turns, beside the threshold that it has to reach."""
    pairs = list(dict.fromkeys((row["challenger"], row["champion"]) for row in weighed if row["duels"]))
    if not pairs:
        return None
    data: list[Figure] = []
    for challenger, champion in pairs:
        own = [row for row in weighed if (row["challenger"], row["champion"]) == (challenger, champion)]
        name = escaped(f"{challenger} against {champion}")
        words = [f"{row['wins']} won, {row['losses']} lost of {row['duels']}" for row in own]
        hover = {"text": words, "hovertemplate": "turn %{x}: e-value %{y:.3g}<br>%{text}<extra></extra>"}
        turns = [row["iteration"] for row in own]
        line = {"type": "scatter", "mode": "lines+markers", "name": name, "x": turns}
        data.append({**line, "y": [row["e_value"] for row in own], **hover})
        limit = {"type": "scatter", "mode": "lines", "name": "its threshold", "x": [turns[0], turns[-1]]}
        data.append({**limit, "y": [own[-1]["threshold"]] * 2, "line": {"dash": "dot"}, "showlegend": False})
    axes = {"xaxis": {"title": {"text": "turn"}}, "yaxis": {"title": {"text": "e-value"}, "type": "log"}}
    return figure(data, 320, **axes)
