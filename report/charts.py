"""The report's charts as Plotly figures in plain data; Plotly's own script draws them in the reader's browser.

A long campaign is thinned: every kept attempt is drawn, reverted ones are a fair sample, and the figure says so.
Names and values of knobs come from models, so every text is escaped before Plotly reads its own markup in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from overnight.report.analysis import Analysis, Replicated, Turn, spread_evenly
from overnight.report.contest_charts import evidence_chart, race_chart
from overnight.report.figures import Figure, escaped, figure
from overnight.report.story import gain_said

MOST_POINTS = 1_500
"""Reverted or failed attempts drawn at most; kept ones are always drawn, up to MOST_KEPT."""
MOST_KEPT = 1_000
MOST_VALUES = 30
"""Values of one knob drawn at most: the most proposed."""
MOST_REPLICATED = 16
MOST_WINDOWS = 100
KEPT, REVERTED, FAILED, LINE = "#2a9d5c", "#8a94a6", "#d1495b", "#3b6fd4"
PALETTE = ("#3b6fd4", "#e0a030", "#7a5cc0", "#2a9d5c", "#d1495b", "#4aa8b8", "#8a94a6")


def charts(found: Analysis) -> dict[str, Figure]:
    """Return the figures that this campaign has data for, by the id of their place in the page."""
    makers: dict[str, Callable[[Analysis], Figure | None]] = {
        "progress": progress,
        "knobs": by_knob,
        "noise": noise,
        "repeats": repeats,
        "proposers": proposers,
        "race": lambda of: None if of.race is None else race_chart(of.race),
        "evidence": lambda of: evidence_chart(of.weighed),
        "cost": cost,
    }
    made = {name: make(found) for name, make in makers.items()}
    return {name: drawn for name, drawn in made.items() if drawn is not None}


def _label(turn: Turn, found: Analysis) -> str:
    gain = "" if turn.gain is None else f", gain {gain_said(found, turn.gain)}"
    what = f"{escaped(turn.knob)} = {escaped(turn.new_value)}" if turn.knob else "no proposal"
    return f"turn {turn.iteration}: {what}<br>{turn.outcome}{gain}, {turn.trials} runs, by {escaped(turn.proposer)}"


def progress(found: Analysis) -> Figure | None:
    """Every measured attempt over turns, the kept ones with error bars, and the best so far."""
    measured = [turn for turn in found.turns if turn.metric is not None]
    if not measured:
        return None
    kept = spread_evenly([turn for turn in measured if turn.outcome == "kept"], MOST_KEPT)
    others = [turn for turn in measured if turn.outcome != "kept"]
    drawn = spread_evenly(others, MOST_POINTS)
    thinned = f" ({len(drawn):,} of {len(others):,} drawn)" if len(drawn) < len(others) else ""
    data = [_points(f"reverted{thinned}", drawn, found, REVERTED, 6), _points("kept", kept, found, KEPT, 10)]
    steps = [(found.turns[0].iteration, found.baseline_metric), *found.best_so_far]
    steps.append((found.turns[-1].iteration, steps[-1][1]))
    line = {"color": LINE, "width": 2, "shape": "hv"}
    x, y = zip(*steps, strict=True)
    data.append({"type": "scatter", "mode": "lines", "name": "best kept so far", "x": x, "y": y, "line": line})
    low, high = _fair_range([turn.metric for turn in measured if turn.metric is not None], kept, found.baseline_metric)
    outside = sum(not low <= turn.metric <= high for turn in measured if turn.metric is not None)
    title = f"{escaped(found.stats['metric_name'])} ({'lower' if found.lower_is_better else 'higher'} is better)"
    words = [_note(0.01, "left", f"{outside} outside the range shown")] if outside else []
    axes = {"xaxis": {"title": {"text": "turn"}}, "yaxis": {"title": {"text": title}, "range": [low, high]}}
    return figure(data, 430, annotations=words, **axes)


def _note(x: float, anchor: str, words: str, xref: str = "paper") -> Figure:
    return {
        "x": x, "xref": xref, "xanchor": anchor, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False,
        "text": words,
    }  # fmt: skip


def _points(name: str, turns: Sequence[Turn], found: Analysis, color: str, size: int) -> Figure:
    spread = found.campaign["noise_sd"]
    points: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [turn.iteration for turn in turns],
        "y": [turn.metric for turn in turns],
        "text": [_label(turn, found) for turn in turns],
        "hovertemplate": "%{y:.6g}<br>%{text}<extra></extra>",
        "marker": {"color": color, "size": size, "opacity": 0.8},
    }
    if name == "kept":
        errors = [turn.metric_se if turn.metric_se is not None else spread for turn in turns]
        points["error_y"] = {"type": "data", "array": errors, "visible": True, "color": color, "thickness": 1}
    return points


def _fair_range(metrics: Sequence[float], kept: Sequence[Turn], baseline: float | None) -> tuple[float, float]:
    """Return a range that shows the bulk and everything kept; one diverged run would flatten the rest."""
    ordered = sorted(metrics)
    cut = len(ordered) // 40 if len(ordered) > 40 else int(len(ordered) > 10)
    shown = ordered[cut : len(ordered) - cut]
    shown += [turn.metric for turn in kept if turn.metric is not None] + ([] if baseline is None else [baseline])
    low, high = min(shown), max(shown)
    room = 0.12 * (high - low) or abs(high) * 0.01 or 1.0
    return low - room, high + room


def by_knob(found: Analysis) -> Figure | None:
    """Each knob's values: how often each was proposed (size) and what it gained (colour)."""
    if not found.pairs:
        return None
    gains = _mean_gains(found)
    knobs = [row["knob"] for row in found.knobs]
    x, y, sizes, colors, texts = [], [], [], [], []
    for knob in knobs:
        pairs = [row for row in found.pairs if row["knob"] == knob][:MOST_VALUES]
        for rank, row in enumerate(sorted(pairs, key=lambda pair: _by_value(pair["new_value"]))):
            gain = gains.get((knob, row["new_value"]))
            x.append(rank)
            y.append(escaped(knob))
            sizes.append(9 + 5 * row["proposed"] ** 0.5)
            colors.append(gain)
            words = "not measured" if gain is None else f"mean gain {gain_said(found, gain)}"
            value = f"{escaped(knob)} = {escaped(row['new_value'])}"
            texts.append(f"{value}<br>proposed {row['proposed']}x, kept {row['kept']}x, {words}")
    known = sorted(abs(gain) for gain in colors if gain is not None)
    limit = known[int(0.9 * (len(known) - 1))] if known else 1.0
    scale = [[0.0, FAILED], [0.5, "#c9ced8"], [1.0, KEPT]]
    bar = {"title": {"text": "mean gain"}, "tickformat": ".1%" if found.is_relative else ".3g", "thickness": 12}
    marker = {"size": sizes, "color": colors, "colorscale": scale, "cmin": -limit, "cmax": limit, "colorbar": bar}
    data = {"type": "scatter", "mode": "markers", "x": x, "y": y, "text": texts, "marker": marker}
    height = 120 + 34 * len(knobs)
    axis = {"title": {"text": "its values, smallest first"}, "showticklabels": False}
    more = {"yaxis": {"automargin": True, "autorange": "reversed", "type": "category"}, "showlegend": False}
    return figure([{**data, "hovertemplate": "%{text}<extra></extra>"}], height, xaxis=axis, **more)


def _mean_gains(found: Analysis) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], list[float]] = {}
    for turn in found.turns:
        if turn.gain is not None and turn.knob is not None and turn.new_value is not None:
            sums.setdefault((turn.knob, turn.new_value), []).append(turn.gain)
    return {pair: sum(gains) / len(gains) for pair, gains in sums.items()}


def _by_value(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return 0.0, value


def noise(found: Analysis) -> Figure | None:
    """Every run of the configurations that were measured more than once, beside what it takes to be kept."""
    shown = found.replicated[:MOST_REPLICATED][::-1]
    if not shown:
        return None
    names = [f"{escaped(each.label)} ({len(each.metrics)})" for each in shown]
    data = [_runs(names, shown)]
    data.append(
        {
            "type": "scatter", "mode": "markers", "name": "mean", "y": names, "x": [each.mean for each in shown],
            "marker": {"symbol": "line-ns-open", "size": 18, "color": LINE, "line": {"width": 3, "color": LINE}},
        }
    )  # fmt: skip
    lines = []
    if found.baseline_metric is not None:
        lines.append((found.baseline_metric, "dash", "first baseline"))
        if found.noise is not None:
            kept_at = found.noise.threshold * (-1 if found.lower_is_better else 1)
            lines.append((found.baseline_metric + kept_at, "dot", "kept beyond"))
    shapes = [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": at, "x1": at, "line": {"dash": dash, "color": LINE}}
        for at, dash, _ in lines
    ]
    left = found.lower_is_better
    anchors = ("left" if left else "right", "right" if left else "left")
    words = [_note(at, anchor, name, "x") for (at, _, name), anchor in zip(lines, anchors, strict=False)]
    low, high = _fair_range([metric for each in shown for metric in each.metrics], [], found.baseline_metric)
    axis = {"title": {"text": escaped(found.stats["metric_name"])}, "range": [low, high]}
    rows = {"automargin": True, "type": "category"}
    margin = {"l": 60, "r": 16, "t": 32, "b": 48}
    return figure(data, 150 + 30 * len(shown), xaxis=axis, yaxis=rows, shapes=shapes, annotations=words, margin=margin)


def _runs(names: Sequence[str], shown: Sequence[Replicated]) -> Figure:
    points = [(metric, name) for name, each in zip(names, shown, strict=True) for metric in each.metrics[:200]]
    x, y = zip(*points, strict=True)
    marker = {"color": REVERTED, "size": 8, "opacity": 0.7}
    return {"type": "scatter", "mode": "markers", "name": "one run", "x": x, "y": y, "marker": marker}


def repeats(found: Analysis) -> Figure | None:
    """The share of proposals that had been proposed before, in windows of turns."""
    windows = spread_evenly([window for window in found.windows if window.proposals], MOST_WINDOWS)
    if not windows:
        return None
    names = [f"{window.first}-{window.last}" for window in windows]
    texts = [f"{window.repeats} of {window.proposals} repeated, {window.kept} kept" for window in windows]
    bars: dict[str, Any] = {"type": "bar", "x": names, "y": [window.repeat_rate for window in windows], "text": texts}
    bars |= {
        "marker": {"color": "#e0a030"},
        "hovertemplate": "turns %{x}: %{text}<extra></extra>",
        "textposition": "none",
    }
    axis = {"title": {"text": "repeated"}, "tickformat": ".0%", "range": [0, 1]}
    return figure([bars], 300, xaxis={"title": {"text": "turns"}, "type": "category"}, yaxis=axis)


def proposers(found: Analysis) -> Figure | None:
    """Who proposed, over turns, with promotions and rollbacks."""
    names = [row["proposer"] for row in found.proposers]
    if len(names) < 2 and not found.promotions:
        return None
    width = max(10, -(-len(found.turns) // MOST_WINDOWS))
    counts = Counter(((turn.iteration - 1) // width, turn.proposer) for turn in found.turns)
    windows = sorted({window for window, _ in counts})
    data = [
        {
            "type": "bar", "name": escaped(name), "marker": {"color": PALETTE[i % len(PALETTE)]},
            "x": [window * width + width / 2 for window in windows], "width": width * 0.92,
            "y": [counts[window, name] for window in windows],
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    lines = [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": row["iteration"], "x1": row["iteration"],
         "line": {"color": LINE, "dash": "dash"}}
        for row in found.promotions
    ]  # fmt: skip
    axes = {"xaxis": {"title": {"text": "turn"}}, "yaxis": {"title": {"text": f"turns in {width}"}}}
    return figure(data, 320, barmode="stack", shapes=lines, **axes)


def cost(found: Analysis) -> Figure | None:
    """Minutes in trials by what they were for."""
    purposes = ("calibration", "screening", "confirmation", "audit", "baseline", "duel", "race", "holdout")
    minutes = {purpose: (found.stats[f"{purpose}_s"] or 0.0) / 60 for purpose in purposes}
    spent = {purpose: value for purpose, value in minutes.items() if value}
    if not spent:
        return None
    bars = {"type": "bar", "orientation": "h", "y": list(spent), "x": list(spent.values()), "marker": {"color": LINE}}
    hover = {"hovertemplate": "%{y}: %{x:.1f} minutes<extra></extra>"}
    rows = {"automargin": True, "autorange": "reversed"}
    return figure([{**bars, **hover}], 110 + 32 * len(spent), xaxis={"title": {"text": "minutes"}}, yaxis=rows)
