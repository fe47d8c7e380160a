"""The HTML report, read by a real browser."""

from __future__ import annotations

import re
import time
from pathlib import Path

import plotly.graph_objects as go
import pytest
from click.testing import CliRunner

from overnight.agent.cli.reporting import report
from overnight.report.analysis import analyse
from overnight.report.charts import charts
from overnight.report.page import json_for_script, render_report
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from ..store_tests.trajectories import as_bytes, attempt, header, random_history
from .conftest import Browser

EVIL = "</script><script>document.title='planted'</script><img src=x onerror=\"document.title='planted'\">"


@pytest.fixture
def planted(store: SqlStore) -> SqlStore:
    """A campaign whose every text tries to run a script."""
    more = {"reason": EVIL, "knob": EVIL, "new_value": EVIL}
    broken = {"stage": "eval_failed", "error": EVIL}
    records = [
        header(),
        attempt(1, proposal=more, proposer={"name": EVIL, "kind": "openai"}),
        attempt(2, proposal=more, metric=10.7, proposer={"name": EVIL + "2", "kind": "openai"}),
        attempt(3, proposal=more, **broken),
    ]
    import_trajectory(store, as_bytes(records), name="old", origin="x")
    return store


def test_every_figure_is_one_that_plotly_knows(store: SqlStore) -> None:
    import_trajectory(store, as_bytes(random_history(50)), name="old", origin="x")
    figures = charts(analyse(store, "old"))
    assert {"progress", "knobs", "noise", "repeats", "cost"} <= set(figures)
    for figure in figures.values():
        go.Figure(figure)  # raises on a property that does not exist


def test_a_planted_script_does_not_run(planted: SqlStore, chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_report(analyse(planted, "old")))
    seen = chromium(page.as_uri())
    title = re.search("<title>(.*?)</title>", seen)
    assert title is not None
    assert (title[1], 'data-drawn="yes"' in seen) == ("old: overnight report", True)


def test_a_planted_script_is_text_in_the_page(planted: SqlStore) -> None:
    page = render_report(analyse(planted, "old"))
    assert EVIL not in page
    assert page.count("<img") == page.count("<img src=x onerror=\\")  # none outside Plotly's own script


@pytest.mark.parametrize("evil", ["</script>", "<!--", "\u2028", "&lt;"])
def test_json_inside_a_script_cannot_end_it(evil: str) -> None:
    text = json_for_script({evil: evil})
    assert not set("<>&\u2028") & set(text)


def test_the_charts_are_drawn_without_a_network(small: SqlStore, chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_report(analyse(small, "old")))
    seen = chromium(page.as_uri(), "--host-resolver-rules=MAP * ~NOTFOUND")
    assert seen.count('class="main-svg"') >= 4


def test_the_page_names_no_address_to_load(small: SqlStore) -> None:
    page = render_report(analyse(small, "old"))
    assert re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="?http|<link', page) == []


def test_a_long_campaign_is_fast_and_small(store: SqlStore, tmp_path: Path) -> None:
    import_trajectory(store, as_bytes(random_history(10_000)), name="long", origin="x")
    target, begin = tmp_path / "long.html", time.monotonic()
    run = CliRunner().invoke(report, ["long", "-o", str(target), "--db", str(tmp_path / "store.db")])
    taken = time.monotonic() - begin
    assert run.exit_code == 0
    assert (taken < 5, target.stat().st_size < 8_000_000) == (True, True)


def test_the_winner_is_shown_as_a_diff(small: SqlStore) -> None:
    page = render_report(analyse(small, "old"))
    assert re.search(r"<td>lr</td><td>0.0003</td><td class=\"kept\">0.0002</td>", page)
