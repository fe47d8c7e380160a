"""The report as one HTML file that needs no network: Jinja2 escapes every text, Plotly's script travels inside.

A content policy in the page allows its own scripts by their hashes and nothing else, so that a script that a model
planted would not run even where escaping failed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from overnight.report.analysis import Analysis
from overnight.report.charts import charts
from overnight.report.contest_charts import race_chart
from overnight.report.figures import Figure
from overnight.report.races import RaceItems, Table
from overnight.report.story import best_kept, duration, findings, gain_said, headline
from overnight.store.errors import StoreError

LAST_TURNS = 30
MOST_KEPT = 60
MAX_TEXT = 600


def render_report(found: Analysis) -> str:
    """Return the whole page."""
    return _rendered(
        "report.html",
        charts(found),
        lambda gain: gain_said(found, gain),
        found=found,
        headline=headline(found),
        findings=findings(found),
        kept=best_kept(found)[:MOST_KEPT],
        last=list(reversed(found.turns[-LAST_TURNS:])),
        seconds=duration,
        clock_time=clock_time,
    )


def render_race(campaign: str, stats: Table, items: RaceItems) -> str:
    """Return one race as a page of its own."""
    drawn = race_chart(items)
    figures = {} if drawn is None else {"race": drawn}
    return _rendered("race.html", figures, number, campaign=campaign, stats=stats, items=items)


def _rendered(template: str, figures: Mapping[str, Figure], gain: Callable[[Any], str], **values: object) -> str:
    from jinja2 import Environment, StrictUndefined, select_autoescape

    folder = resources.files("overnight.report") / "templates"
    environment = Environment(
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "short": short, "share": share, "gain": gain}
    script = (folder / "report.js").read_text(encoding="utf-8")
    plotly = plotly_script()
    return environment.from_string((folder / template).read_text(encoding="utf-8")).render(
        figures=figures,
        data=json_for_script(figures),
        style=(folder / "report.css").read_text(encoding="utf-8"),
        plotly=plotly,
        script=script,
        policy=_policy([plotly, script]),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        **values,
    )


def write_page(page: str, target: Path) -> Path:
    """Write beside the target and rename: the file is whole or as it was.

    Raises:
        StoreError: it cannot be written.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        partial.replace(target)
    except OSError as error:
        raise StoreError(f"cannot write `{target}`: {error.strerror or error}; give another path") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


@cache
def plotly_script() -> str:
    """Return Plotly's own script, as its Python package carries it."""
    package = resources.files("plotly") / "package_data" / "plotly.min.js"
    return package.read_text(encoding="utf-8").replace("</script", "<\\/script")


def json_for_script(value: object) -> str:
    """Return JSON that can stand inside a script element, whatever it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(scripts: Sequence[str]) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def number(value: object) -> str:
    """Return a number as people read it; nothing for NULL."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def share(value: float | None) -> str:
    """Return a share in percent; nothing for NULL."""
    return "" if value is None else f"{value:.0%}"


def short(value: Any) -> str:
    """Return a text cut to what a table bears."""
    text = "" if value is None else str(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def clock_time(seconds: float) -> str:
    """Return a length of time as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
