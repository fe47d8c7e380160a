"""What every figure of a report shares: its frame, and texts made harmless for labels."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

Figure = Mapping[str, Any]
MAX_TEXT = 60


def escaped(value: object) -> str:
    """Return untrusted text for a label: cut, one line, with Plotly's markup made harmless."""
    flat = " ".join(str(value).split())
    return html.escape(flat if len(flat) <= MAX_TEXT else flat[: MAX_TEXT - 1] + "…", quote=True)


def figure(data: Sequence[Figure], height: int = 380, **layout: Any) -> Figure:
    """Return a figure as plain data for Plotly."""
    legend = {"orientation": "h", "y": -0.2}
    margin = {"l": 60, "r": 16, "t": 16, "b": 48}
    return {"data": list(data), "layout": {"height": height, "margin": margin, "legend": legend, **layout}}
