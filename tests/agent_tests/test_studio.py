"""`langgraph dev` on this repository: LangGraph Studio's server loads the graph, draws it, and runs turns of it.

Opt-in (`-m server`), because the server is large: `pip install 'langgraph-cli[inmem]'` into an environment that sees
this one, and set OVERNIGHT_TEST_LANGGRAPH to its `langgraph` command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from overnight.agent.graph import NODES

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0
CAMPAIGN = """
[campaign]
name = "studio"
trainer = "scripted"
[metric]
name = "loss"
[budget]
iterations = 2
[trainer]
optimum = { a = 3 }
[knobs.a]
type = "int"
choices = [1, 2, 3]
default = 1
[proposers.random]
kind = "random"
"""


class Server:
    def __init__(self, url: str, process: psutil.Process) -> None:
        self.url = url
        self.process = process

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = os.environ.get("OVERNIGHT_TEST_LANGGRAPH")
    if not command:
        pytest.skip(
            "set OVERNIGHT_TEST_LANGGRAPH to the `langgraph` command of an environment with langgraph-cli[inmem]"
        )
    clone = tmp_path_factory.mktemp("clone")
    for folder in ("agent", "overnight"):  # as in a clone: a bare folder `overnight` lies in the current directory
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "langgraph.json", clone)
    (clone / "mine").mkdir()
    (clone / "mine" / "campaign.toml").write_text(CAMPAIGN)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OVERNIGHT_CAMPAIGN": "mine", "OVERNIGHT_DB": "mine.db"}
    with (clone / "log").open("w") as log:
        arguments = ["dev", "--no-browser", "--no-reload", "--port", str(port)]
        process = subprocess.Popen([command, *arguments], cwd=clone, env=environment, stdout=log, stderr=log)
    try:
        found = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        wait_for(found, process, clone / "log")
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(DEADLINE_S)


def wait_for(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + DEADLINE_S
    while True:
        try:
            server.ask("/ok")
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > ends or process.poll() is not None:
                pytest.fail(f"`langgraph dev` did not start; its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)  # nothing to wait on but the port itself


@pytest.fixture(scope="module")
def assistant(server: Server) -> str:
    (assistant,) = server.ask("/assistants/search", {})
    assert assistant["graph_id"] == "overnight"
    return str(assistant["assistant_id"])


@pytest.mark.server
def test_the_graph_is_drawn_whole(server: Server, assistant: str) -> None:
    drawn = server.ask(f"/assistants/{assistant}/graph")
    assert {node["id"] for node in drawn["nodes"]} == {"__start__", *NODES, "__end__"}
    assert {"source": "validate", "target": "decide"} in drawn["edges"]


@pytest.mark.server
def test_its_input_form_asks_for_the_campaign_alone(server: Server, assistant: str) -> None:
    schemas = server.ask(f"/assistants/{assistant}/schemas")
    assert list(schemas["input_schema"]["properties"]) == ["campaign"]
    assert list(schemas["output_schema"]["properties"]) == ["attempt_id", "outcome", "best", "stop_reason"]


@pytest.mark.server
def test_turns_run_on_one_warm_worker_until_the_campaign_ends(server: Server, assistant: str) -> None:
    run = {"assistant_id": assistant, "input": {"campaign": "studio"}}
    turns, workers = [], []
    for _ in range(3):
        turns.append(server.ask("/runs/wait", run))
        below = server.process.children(recursive=True)
        workers.append({child.pid for child in below if "worker_main" in " ".join(child.cmdline())})
    assert [turn["stop_reason"] for turn in turns] == [None, "iterations", "iterations"]
    assert [turn["outcome"] is None for turn in turns] == [False, False, True]
    assert workers[0] == workers[1] != set()
