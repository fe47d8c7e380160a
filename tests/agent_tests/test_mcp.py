"""`overnight mcp`, asked by the SDK's own client over a real pipe: what it answers, and that it cannot write."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import Client, MCPError, StdioServerParameters
from mcp_types import TextContent, TextResourceContents

from overnight.agent import mcp_answers
from overnight.agent.bounded_query import MAX_CHARS
from overnight.agent.run import run_campaign
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from ..store_tests.test_reading import WRITES, snapshot
from ..store_tests.trajectories import as_bytes, attempt, header
from .campaigns import campaign, runtime, scripted

READERS = {"list_campaigns", "status", "sql", "show_attempt", "check_proposal"}
INJECTIONS = (
    "c'; DELETE FROM campaigns; --",
    'c"; DROP TABLE attempts; --',
    "c' OR '1'='1",
    "../c",
    "/etc/passwd",
    "/tmp",
    ".",
    "",
    "c\x00",
    "C",
    "c ",
    "$(touch /tmp/pwned)",
    "`touch pwned`",
    "| touch pwned",
    "file:c?mode=rwc",
    "sqlite:///new.db",
    "--db=new.db",
    "%s%n",
    "c\n",
    "c😀",
)
BAD_CHANGES: tuple[dict[str, Any], ...] = (
    *({"campaign": name, "knob": "a", "new_value": 0.5} for name in INJECTIONS[:4]),
    *({"campaign": "c", "knob": name, "new_value": 0.5} for name in ("a'; DROP TABLE events; --", "", "seed", "A")),
    *({"campaign": "c", "knob": "a", "new_value": value} for value in (-1.0, 1e308, "0.5", True, 7, "'; DELETE", 0.75)),
    {"campaign": "c", "knob": "a", "new_value": [0.5]},
    {"campaign": "c", "knob": "a", "new_value": {"$ne": 1}},
    {"campaign": "c", "knob": "a", "new_value": None},
    {"campaign": "c", "knob": "a", "new_value": 0.5, "reason": "x" * 501},
    {"campaign": "c", "knob": "a"},
)
HOSTILE: dict[str, tuple[dict[str, Any], ...]] = {
    "list_campaigns": tuple({"db": name, "path": name} for name in INJECTIONS),
    "status": tuple({"campaign": name} for name in INJECTIONS),
    "sql": tuple({"statement": statement} for statement in WRITES),
    "show_attempt": tuple({"campaign": name, "turn": 1} for name in INJECTIONS),
    "check_proposal": BAD_CHANGES,
    "enqueue": BAD_CHANGES,
    "pause": tuple({"campaign": name} for name in ("c", *INJECTIONS)),
}
ADDRESSES = (
    *("overnight://campaigns/" + part + "/report" for part in ("..%2F..", "%2Fetc%2Fpasswd", "c%00", "no", "c%27%3B")),
    *("overnight://schema/../x", "overnight://c", "file:///etc/passwd", "overnight://campaigns/c/report/x", "http://c"),
)


class Agent:
    """An MCP client that waits for its answers."""

    def __init__(self, portal: BlockingPortal, client: Client) -> None:
        self._portal = portal
        self._client = client

    def tools(self) -> set[str]:
        return {tool.name for tool in self._portal.call(self._client.list_tools).tools}

    def call(self, tool: str, **arguments: Any) -> tuple[bool, str]:
        """Return whether the call failed, and what it said."""
        answer = self._portal.call(self._client.call_tool, tool, arguments)
        (content,) = answer.content
        assert isinstance(content, TextContent)
        return bool(answer.is_error), content.text

    def answer(self, tool: str, **arguments: Any) -> Any:
        failed, text = self.call(tool, **arguments)
        assert not failed, text
        return json.loads(text)

    def refusal(self, tool: str, **arguments: Any) -> str:
        failed, text = self.call(tool, **arguments)
        assert failed, text
        return text

    def read(self, address: str) -> str:
        (content,) = self._portal.call(self._client.read_resource, address).contents
        assert isinstance(content, TextResourceContents)
        return content.text


@contextmanager
def connected(db: Path, *options: str) -> Iterator[Agent]:
    command = str(Path(sys.executable).with_name("overnight"))
    server = StdioServerParameters(command=command, args=["mcp", "--db", str(db), *options], cwd=db.parent)
    client = Client(server, read_timeout_seconds=60)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
        yield Agent(portal, client)


def make_store(folder: Path) -> Path:
    """Return a store with a paused campaign `c`: a keep in turn 1, a block and a revert in turn 2."""
    path = folder / "store.db"
    store = SqlStore.open(path, create=True)
    replies = scripted(("a", 0.25), ("a", 7.0), ("b", 9))
    running = runtime(campaign(folder), store, proposers=replies)
    running.iterations = 2
    run_campaign(running)
    running.close()
    store.close()
    return path


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("mcp"))


@pytest.fixture(scope="module")
def agent(database: Path) -> Iterator[Agent]:
    with connected(database) as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[Path, Agent]]:
    """A store of the test's own, and an agent of it."""
    path = make_store(tmp_path)
    with connected(path) as found:
        yield path, found


def test_a_campaign_is_listed_with_where_it_stands(agent: Agent) -> None:
    (row,) = agent.answer("list_campaigns")["campaigns"]
    assert (row["campaign"], row["status"], row["turn"], row["kept"]) == ("c", "paused", 2, 1)


def test_status_shows_the_menu_and_the_baseline(agent: Agent) -> None:
    found = agent.answer("status", campaign="c")
    assert (found["baseline"], set(found["menu"]), found["pending_proposals"]) == ({"a": 0.25, "b": 1}, {"a", "b"}, 0)


def test_sql_answers_as_a_table(agent: Agent) -> None:
    found = agent.answer("sql", statement="SELECT iteration, knob, outcome FROM iterations ORDER BY iteration")
    assert found["columns"] == ["iteration", "knob", "outcome"]
    assert found["rows"] == [[1, "a", "kept"], [2, "b", "reverted"]]


def test_a_turn_is_shown_with_all_its_tries(agent: Agent) -> None:
    first, second = agent.answer("show_attempt", campaign="c", turn=2)["tries"]
    assert (first["rail"], second["outcome"]) == ("R3_range", "reverted")
    assert second["trial_log"][0]["purpose"] == "screening"
    assert "knob" in first["prompt"]


def test_a_proposal_is_checked_against_the_present_baseline(agent: Agent) -> None:
    assert agent.answer("check_proposal", campaign="c", knob="b", new_value=3)["changes"] == {"b": [1, 3]}
    blocked = agent.answer("check_proposal", campaign="c", knob="b", new_value=9)
    assert (blocked["passed"], blocked["rail"]) == (False, "R6_novelty")


def test_the_schema_explains_every_column_of_the_views(agent: Agent) -> None:
    text = agent.read("overnight://schema")
    assert "view iterations: " in text
    assert "  gain_lower: " in text


def test_the_report_is_readable_text(agent: Agent) -> None:
    text = agent.read("overnight://campaigns/c/report")
    assert text.startswith("# c\n\n2 turns, 1 kept. Best: a = 0.25 in turn 1")
    assert "| 1 | random | a = 0.25 |" in text


def test_the_tools_are_those_that_are_documented(agent: Agent, database: Path) -> None:
    assert agent.tools() == {*READERS, "enqueue", "pause"} == set(HOSTILE)
    with connected(database, "--read-only") as reader:
        assert reader.tools() == READERS


@pytest.mark.parametrize("tool", HOSTILE)
def test_no_call_writes(agent: Agent, database: Path, tool: str) -> None:
    assert len(HOSTILE[tool]) >= 20
    before = snapshot(database.parent)
    for arguments in HOSTILE[tool]:
        failed, text = agent.call(tool, **arguments)
        blocked = tool == "check_proposal" and '"passed":false' in text
        assert failed or blocked or tool == "list_campaigns", arguments
        assert len(text) < 2000
    assert snapshot(database.parent) == before


def test_no_resource_reads_anything_else(agent: Agent, database: Path) -> None:
    before = snapshot(database.parent)
    for address in ADDRESSES:
        with pytest.raises(MCPError):
            agent.read(address)
    assert snapshot(database.parent) == before


def test_looking_makes_no_file_and_changes_no_byte(agent: Agent, database: Path) -> None:
    before = snapshot(database.parent)
    agent.answer("list_campaigns")
    agent.answer("status", campaign="c")
    agent.answer("show_attempt", campaign="c", turn=1)
    agent.answer("sql", statement="SELECT 1")
    agent.read("overnight://campaigns/c/report")
    assert snapshot(database.parent) == before


def test_a_blocked_proposal_says_what_to_do(agent: Agent) -> None:
    refused = agent.refusal("enqueue", campaign="c", knob="a", new_value=7)
    assert "blocked by R3_range" in refused
    assert "0 to 1" in refused or "[0" in refused


def dump(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of every table."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    rows = {table: connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid').fetchall() for table in tables}
    connection.close()
    return rows


def test_enqueue_writes_one_event_and_nothing_else(own: tuple[Path, Agent]) -> None:
    path, agent = own
    before, files = dump(path), set(snapshot(path.parent))
    agent.answer("enqueue", campaign="c", knob="b", new_value=3, reason="because")
    after = dump(path)
    assert set(snapshot(path.parent)) == files
    (event,) = [row for row in after.pop("events") if row not in before["events"]]
    assert json.loads(event[-1]) == {"knob": "b", "new_value": 3, "reason": "because", "by": "mcp"}
    before.pop("events")
    before.pop("sqlite_sequence", None)
    after.pop("sqlite_sequence", None)
    assert after == before


def test_what_was_queued_is_the_next_turn(own: tuple[Path, Agent], tmp_path: Path) -> None:
    path, agent = own
    agent.answer("enqueue", campaign="c", knob="b", new_value=3, reason="because")
    store = SqlStore.open(path)
    running = runtime(campaign(tmp_path), store)
    running.iterations = 3
    run_campaign(running)
    running.close()
    store.close()
    (tried,) = agent.answer("show_attempt", campaign="c", turn=3)["tries"]
    assert (tried["knob"], tried["new_value"], tried["reason"]) == ("b", "3", "because")


def test_the_queue_does_not_grow_without_end(own: tuple[Path, Agent]) -> None:
    path, agent = own
    store = SqlStore.open(path)
    for _ in range(mcp_answers.MAX_PENDING):
        store.request(1, "enqueued", {"knob": "b", "new_value": 3, "reason": ""})
    store.close()
    before = snapshot(path.parent)
    assert "20 proposals wait" in agent.refusal("enqueue", campaign="c", knob="b", new_value=3)
    assert snapshot(path.parent) == before


def test_pause_asks_a_running_campaign_once(own: tuple[Path, Agent]) -> None:
    path, agent = own
    assert "is not running" in agent.refusal("pause", campaign="c")
    store = SqlStore.open(path)
    lease = store.acquire(1)
    before = dump(path)["events"]
    agent.answer("pause", campaign="c")
    agent.answer("pause", campaign="c")
    (event,) = [row for row in dump(path)["events"] if row not in before]
    assert "pause_requested" in event
    assert store.pause_requested(1)
    store.release(lease)
    store.close()


def test_a_large_result_is_cut_and_says_so(agent: Agent) -> None:
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)"
    failed, text = agent.call("sql", statement=f"{rows} SELECT i FROM n")
    assert (failed, json.loads(text)["cut"]) == (False, "100 rows; narrow the query, or raise `max_rows`")
    failed, text = agent.call("sql", statement=f"{rows} SELECT i, hex(zeroblob(900)) FROM n", max_rows=500)
    assert len(text) <= MAX_CHARS + 1000
    assert "40,000 characters" in json.loads(text)["cut"]
    failed, text = agent.call("sql", statement="SELECT hex(zeroblob(10000000))")
    assert "20,000,000 characters in all" in json.loads(text)["rows"][0][0]


@pytest.mark.slow
def test_a_query_that_cannot_be_interrupted_is_killed(agent: Agent) -> None:
    slow = "SELECT instr(hex(zeroblob(15000000)), hex(zeroblob(7000000)) || '1')"
    assert "ran over 10 s" in agent.refusal("sql", statement=slow)
    assert agent.answer("sql", statement="SELECT 1")["rows"] == [[1]]


def test_a_database_that_is_not_there_yet_is_a_clear_error_and_is_not_made(tmp_path: Path) -> None:
    with connected(tmp_path / "none.db") as agent:
        for tool, arguments in (("list_campaigns", {}), ("sql", {"statement": "SELECT 1"})):
            assert "no database at" in agent.refusal(tool, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_imported_history_has_a_status_too(tmp_path: Path) -> None:
    db = str(tmp_path / "overnight.db")
    store = SqlStore.open(db, create=True)
    import_trajectory(store, as_bytes([header(), attempt(1)]), name="old", origin="x")
    store.close()
    told = mcp_answers.status(db, "old")
    assert (told["campaign"], told["turn"], "menu" in told) == ("old", 1, False)
