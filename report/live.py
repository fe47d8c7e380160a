"""This project's Datasette plugin: the live page, what the tables and views mean, and ready questions.

The page asks for JSON every few seconds and shows it as text; nothing of it is ever read as markup. Connections carry
the authorizer of `overnight sql`, with the few PRAGMAs that Datasette reads schemas by.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import datasette
from datasette import Response

from overnight.report.page import plotly_script
from overnight.store.reading import authorize
from overnight.store.schema_help import schema_rows

Hook = TypeVar("Hook", bound=Callable[..., object])
DATABASE = "overnight"
LAST = 12
MOST_POINTS = 600
_PRAGMAS = frozenset({"schema_version", "page_size", "page_count", "database_list"})
_TABLE_PRAGMAS = frozenset({"table_info", "table_xinfo", "foreign_key_list", "index_list", "index_info", "index_xinfo"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data: "
    "blob:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_FILES = {"live.js": "application/javascript", "report.css": "text/css"}


def hook(function: Hook) -> Hook:
    """Mark a function as this plugin's answer to one of Datasette's hooks."""
    marked: Hook = datasette.hookimpl(function)
    return marked


def authorize_datasette(action: int, name: str | None, detail: str | None, database: str | None, by: str | None) -> int:
    """Allow reading, and the PRAGMAs that only read a schema."""
    if action == sqlite3.SQLITE_PRAGMA and (name in _TABLE_PRAGMAS or (name in _PRAGMAS and detail is None)):
        return sqlite3.SQLITE_OK
    return authorize(action, name, detail, database, by)


@hook
def prepare_connection(conn: sqlite3.Connection, database: str) -> None:
    """Let a connection read and do nothing else."""
    if database == DATABASE:
        conn.set_authorizer(authorize_datasette)


@hook
def get_metadata() -> dict[str, Any]:
    """Say what each view, table and column means, where Datasette shows it."""
    tables: dict[str, dict[str, Any]] = {}
    for _, name, column, meaning in schema_rows():
        entry = tables.setdefault(name, {"columns": {}})
        if column:
            entry["columns"][column] = meaning
        else:
            entry["description"] = meaning
    tables["alembic_version"] = {"hidden": True}
    database = {"description": "The trajectory store. Views are made for reading.", "tables": tables}
    return {"title": "overnight", "databases": {DATABASE: database}}


@hook
def canned_queries(database: str) -> dict[str, dict[str, str]]:
    """Return ready questions; each asks for a campaign's name."""
    return QUERIES if database == DATABASE else {}


QUERIES = {
    "kept": {
        "title": "What was kept, the best first",
        "sql": """SELECT iteration, proposer, knob, new_value, metric, gain, gain_lower, trials, reason
FROM iterations WHERE campaign = :campaign AND outcome = 'kept' ORDER BY gain DESC""",
    },
    "knobs": {
        "title": "Which knob pays",
        "sql": "SELECT * FROM knob_stats WHERE campaign = :campaign ORDER BY mean_gain DESC",
    },
    "failures": {
        "title": "What failed or was blocked",
        "sql": """SELECT outcome, COALESCE(failure, rail) AS what, count(*) AS times, max(iteration) AS last
FROM iterations WHERE campaign = :campaign AND outcome IN ('failed', 'blocked') GROUP BY 1, 2 ORDER BY times DESC""",
    },
    "repeats": {
        "title": "Repeats in windows of ten turns",
        "sql": """SELECT (iteration - 1) / 10 * 10 + 1 AS from_turn, count(knob) AS proposals, sum(is_repeat) AS repeats
FROM iterations WHERE campaign = :campaign GROUP BY 1 ORDER BY 1""",
    },
    "contradicted": {
        "title": "What was kept once and reverted another time",
        "sql": "SELECT * FROM pair_stats WHERE campaign = :campaign AND kept > 0 AND reverted > 0",
    },
    "proposers": {
        "title": "How each proposer fares",
        "sql": "SELECT * FROM proposer_stats WHERE campaign = :campaign ORDER BY proposals DESC",
    },
}


@hook
def register_routes() -> list[tuple[str, Any]]:
    """Return the live page and what it asks for."""
    return [
        (r"^/$", home),
        (r"^/-/live$", live_page),
        (r"^/-/live/data$", live_data),
        (r"^/-/live/plotly\.js$", plotly_file),
        (r"^/-/live/file/(?P<name>[a-z.]+)$", own_file),
    ]


async def home() -> Response:
    """Send people to the live page."""
    return Response.redirect("/-/live")


async def live_page() -> Response:
    """Return the page; what it shows comes from `live_data`."""
    return Response.html(_template("live.html"), headers={"content-security-policy": POLICY})


async def own_file(request: Any) -> Response:
    """Return one of the page's own files."""
    name = request.url_vars["name"]
    if name not in _FILES:
        return Response.text("no such file", status=404)
    return Response(_template(name), content_type=_FILES[name])


async def plotly_file() -> Response:
    """Return the charting library from its package."""
    return Response(
        plotly_script(), content_type="application/javascript", headers={"cache-control": "private, max-age=86400"}
    )


def _template(name: str) -> str:
    return (resources.files("overnight.report") / "templates" / name).read_text(encoding="utf-8")


_CAMPAIGNS = """
SELECT c.name, c.status, c.stop_reason, c.metric_name, c.direction, c.spec, c.lease_seen_at, c.trial_s, c.trial_wh,
    (SELECT max(iteration) FROM attempts AS a WHERE a.campaign_id = c.id) AS turn,
    (SELECT count(*) FROM attempts AS a WHERE a.campaign_id = c.id AND a.outcome = 'kept') AS kept,
    (SELECT metric FROM attempts AS a WHERE a.id = c.best_attempt_id) AS best_metric,
    (SELECT gain FROM attempts AS a WHERE a.id = c.best_attempt_id) AS best_gain,
    (SELECT to_proposer FROM promotion_log AS p WHERE p.campaign = c.name ORDER BY p.iteration DESC LIMIT 1) AS champion
FROM campaigns AS c ORDER BY c.lease_seen_at IS NULL, c.lease_seen_at DESC, c.id DESC LIMIT 200"""
_TURNS = f"""
SELECT iteration, proposer, knob, new_value, outcome, failure, rail, metric, gain, trials, reason FROM iterations
WHERE campaign = :campaign AND outcome IS NOT NULL ORDER BY iteration DESC LIMIT {LAST}"""
_CURRENT = """
SELECT a.iteration, a.stage, a.knob, a.new_value, a.role, p.name AS proposer,
    (SELECT count(*) FROM trials AS t WHERE t.attempt_id = a.id) AS trials
FROM attempts AS a JOIN campaigns AS c ON c.id = a.campaign_id JOIN proposers AS p ON p.id = a.proposer_id
WHERE c.name = :campaign AND a.stage <> 'decided' ORDER BY a.iteration DESC, a."try" DESC LIMIT 1"""
_POINTS = f"""
SELECT iteration, outcome, metric FROM iterations WHERE campaign = :campaign AND metric IS NOT NULL
ORDER BY iteration DESC LIMIT {MOST_POINTS}"""


async def live_data(datasette: Any, request: Any) -> Response:
    """Return what the page shows: all campaigns, and one of them closer."""
    database = datasette.get_database(DATABASE)
    campaigns = [_campaign(dict(row)) for row in await database.execute(_CAMPAIGNS)]
    asked = unquote(request.args.get("campaign") or "") or (campaigns[0]["name"] if campaigns else "")
    closer: dict[str, Any] = {"name": asked, "sql": f"/{DATABASE}/iterations?campaign={quote(asked)}"}
    for key, statement in (("turns", _TURNS), ("current", _CURRENT), ("points", _POINTS)):
        closer[key] = [dict(row) for row in await database.execute(statement, {"campaign": asked})]
    body = json.dumps({"campaigns": campaigns, "campaign": closer}, allow_nan=False)
    return Response(body, content_type="application/json", headers={"cache-control": "no-store"})


def _campaign(row: dict[str, Any]) -> dict[str, Any]:
    spec = json.loads(row.pop("spec"))
    proposers = spec.get("proposers") or {}
    first = (spec.get("router") or {}).get("champion") or next(iter(proposers), None)
    budget = (spec.get("budget") or {}).get("iterations")
    return {
        **row,
        "champion": row["champion"] or first,
        "budget": budget,
        "relative": spec["metric"]["gain"] == "relative",
    }
