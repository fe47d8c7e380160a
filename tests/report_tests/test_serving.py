"""`overnight serve`: a real server on loopback, asked by a client and by a real browser."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from overnight.report.gate import is_loopback, names_of
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from ..store_tests.suite import Campaigner
from ..store_tests.test_reading import FOREVER, WRITES, snapshot
from ..store_tests.trajectories import as_bytes, attempt, every_stage, header
from .conftest import Browser
from .test_page import EVIL

pytest.importorskip("datasette", reason="datasette is not installed")
Serve = Callable[..., httpx.Client]


def filled(path: Path) -> Path:
    """Make a store that nobody has open, alone in its folder."""
    path.parent.mkdir()
    store = SqlStore.open(path, create=True)
    import_trajectory(store, as_bytes(every_stage()), name="old", origin="x")
    store.close()
    return path


@contextmanager
def serving(database: Path, *options: str) -> Iterator[httpx.Client]:
    """Run `overnight serve` and give a client of it."""
    overnight = str(Path(sys.executable).with_name("overnight"))
    command = [overnight, "serve", "--db", str(database), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=database.parent) as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"http://\S+:(\d+)/(?:\?token=(\S+))?", line)
        if found is None:
            server.kill()
            pytest.fail(f"the server did not start: {line}{server.stderr.read()}")
        token = {"x-token": found[2] or ""}
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=60, headers=token) as client:
            yield client
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=20)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return filled(tmp_path / "night" / "store.db")


@pytest.fixture
def serve(database: Path) -> Iterator[Serve]:
    """Starts `overnight serve` with some options."""
    with ExitStack() as running:
        yield lambda *options: running.enter_context(serving(database, *options))


@pytest.fixture(scope="module")
def resting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("resting") / "night" / "store.db")


@pytest.fixture(scope="module")
def page(resting: Path) -> Iterator[httpx.Client]:
    """A client of a server over a store that nobody writes."""
    with serving(resting, "--timeout", "1") as client:
        yield client


def test_no_statement_writes_through_the_page(page: httpx.Client, resting: Path) -> None:
    before = snapshot(resting.parent)
    answers = {sql: page.get("/overnight.json", params={"sql": sql}).status_code for sql in WRITES if sql}
    assert {sql: code for sql, code in answers.items() if code < 400} == {}
    assert snapshot(resting.parent) == before


def test_asking_makes_no_file(page: httpx.Client, resting: Path) -> None:
    for path in ("/-/live", "/-/live/data", "/overnight", "/overnight/iterations", "/overnight/kept?campaign=old"):
        assert page.get(path).status_code == 200
    assert [path.name for path in resting.parent.iterdir()] == ["store.db"]


def test_a_query_that_runs_on_is_cut_and_said_so(page: httpx.Client) -> None:
    begin = time.monotonic()
    answer = page.get("/overnight.json", params={"sql": FOREVER})
    assert (answer.status_code, "SQL Interrupted" in answer.text) == (400, True)
    assert time.monotonic() - begin < 30


def test_too_many_rows_are_cut_and_said_so(page: httpx.Client) -> None:
    answer = page.get("/overnight.json", params={"sql": FOREVER.replace("count(*)", "i")}).json()
    assert (len(answer["rows"]), answer["truncated"]) == (1000, True)


def test_what_a_campaign_commits_is_seen_at_once(serve: Serve, database: Path) -> None:
    client = serve()
    store = SqlStore.open(database)
    campaign = Campaigner(store, "running")
    open_try = campaign.propose(1)
    campaign.check(open_try, 0.2)
    seen = client.get("/-/live/data").json()
    assert (seen["campaign"]["name"], seen["campaign"]["current"][0]["new_value"]) == ("running", "0.2")
    campaign.finish(open_try, "kept", 0.1)
    seen = client.get("/-/live/data").json()
    store.close()
    assert (seen["campaign"]["current"], seen["campaign"]["turns"][0]["outcome"]) == ([], "kept")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""])
def test_another_host_header_is_refused(page: httpx.Client, host: str) -> None:
    answer = page.get("/-/live/data", headers={"host": host.format(port=page.base_url.port)})
    assert (answer.status_code, "campaigns" in answer.text) in {(421, False), (400, False)}


def test_a_name_that_was_allowed_is_let_in(serve: Serve) -> None:
    client = serve("--allow-host", "gpu.lan")
    headers = {"host": f"gpu.lan:{client.base_url.port}"}
    assert client.get("/-/live/data", headers=headers).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_only_reading_methods_are_let_in(page: httpx.Client, method: str) -> None:
    assert page.request(method, "/overnight").status_code == 405


def test_beyond_loopback_a_token_is_needed(serve: Serve) -> None:
    client = serve("--host", "0.0.0.0")
    token = client.headers.pop("x-token")
    assert len(token) >= 20
    refused = [client.get(path).status_code for path in ("/-/live/data", "/overnight", "/?token=wrong")]
    bearer = client.get("/-/live/data", headers={"authorization": f"Bearer {token}"}).status_code
    first = client.get("/-/live", params={"token": token})
    with_cookie = client.get("/-/live/data").status_code
    assert (refused, bearer, first.status_code, first.headers["location"], with_cookie) == (
        [401, 401, 401], 200, 303, "/-/live", 200,
    )  # fmt: skip


def test_on_loopback_no_token_is_asked(page: httpx.Client) -> None:
    assert page.get("/-/live/data").status_code == 200


def test_a_token_does_not_lead_elsewhere(serve: Serve) -> None:
    client = serve("--host", "0.0.0.0", "--token", "secret")
    answer = client.get(f"http://127.0.0.1:{client.base_url.port}//evil.example/", params={"token": "secret"})
    assert not answer.headers.get("location", "").startswith("//")


def test_the_live_page_shows_a_campaign_in_a_browser(page: httpx.Client, chromium: Browser) -> None:
    seen = chromium(str(page.base_url))
    assert 'data-shown="old"' in seen
    assert "CUDA out of memory" not in seen
    assert "d_model = 1536" in seen


def test_a_planted_script_does_not_run_on_any_page(serve: Serve, database: Path, chromium: Browser) -> None:
    proposal = {"reason": EVIL, "knob": EVIL, "new_value": EVIL}
    store = SqlStore.open(database)
    import_trajectory(store, as_bytes([header(), attempt(1, proposal=proposal)]), name="planted", origin="x")
    store.close()
    client = serve()
    for path in ("/-/live?campaign=planted", "/overnight/iterations", "/overnight/kept?campaign=planted"):
        seen = chromium(f"{client.base_url}{path}".replace("//-", "/-").replace("//o", "/o"))
        assert "document.title=" in seen  # it is there, as text
        assert "<title>planted" not in seen


def test_views_and_columns_are_explained_where_they_are_shown(page: httpx.Client) -> None:
    assert "share of its proposals that anyone had proposed before" in page.get("/overnight/proposer_stats").text


def test_the_database_itself_cannot_be_downloaded(page: httpx.Client) -> None:
    assert page.get("/overnight.db").status_code in {403, 404}


def test_a_port_in_use_is_an_error_with_a_remedy(page: httpx.Client, resting: Path) -> None:
    port = page.base_url.port
    command = [str(Path(sys.executable).with_name("overnight")), "serve", "--db", str(resting), "--port", str(port)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, "another `--port`" in run.stderr) == (3, True)


def test_loopback_is_told_from_everything_else() -> None:
    hosts = ("127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "localhost.evil.example")
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4


def test_a_bound_address_is_one_of_its_names() -> None:
    assert "10.0.0.7" in names_of("10.0.0.7")
    assert "evil.example" not in names_of("0.0.0.0")
