"""Campaigns whose trial is a function: from a file, from code, and what a stranger's file may not do with one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from overnight.agent.campaign import Campaign
from overnight.agent.graph import build_graph
from overnight.agent.trust import open_wants
from overnight.store.errors import CampaignError, NotAllowedError
from overnight.store.opening import open_store
from overnight.store.reading import query

CAMPAIGN = """
[campaign]
name = "f"
trainer = "function"
[metric]
name = "loss"
[budget]
iterations = 2
[trainer]
function = "objective:loss"
[knobs.x]
type = "int"
choices = [3, 2, 1]
default = 3
[proposers.random]
kind = "random"
"""
OBJECTIVE = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
def loss(config, seed):
    return config["x"] + seed / 1e4
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OVERNIGHT_DATA", str(tmp_path / "user"))
    (tmp_path / "campaign.toml").write_text(CAMPAIGN)
    (tmp_path / "objective.py").write_text(OBJECTIVE)
    return tmp_path


def overnight(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("overnight")), *arguments]
    return subprocess.run(
        command, cwd=folder, env=dict(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def test_a_file_names_a_function_and_run_asks_before_it_imports_it(folder: Path) -> None:
    refused = overnight("run", ".", folder=folder)
    assert refused.returncode == 2
    assert "`trainer.function`" in refused.stderr
    assert not (folder / "imported").exists()
    allowed = overnight("run", ".", "--allow", folder=folder)
    assert allowed.returncode == 0, allowed.stderr
    rows = query(folder / "overnight.db", "SELECT outcome FROM iterations").rows
    assert [row[0] for row in rows].count("kept") >= 1
    assert "Fresh seeds, 20" in allowed.stdout


def test_a_host_says_whether_it_trusts_a_file(folder: Path) -> None:
    stranger, trusted = Campaign.load(folder), Campaign.load(folder, allowed=True)
    assert [want.key for want in open_wants(stranger)] == ["trainer.function"]
    with open_store(folder / "mine.db", create=True) as store:
        with pytest.raises(NotAllowedError, match=r"`trainer\.function`"):
            build_graph(stranger, store=store)
        with build_graph(trusted, store=store) as graph:
            assert graph.compile().invoke({"campaign": "f"})["outcome"] in {"kept", "reverted"}


def test_a_stranger_s_file_may_be_run_with_the_hosts_own_function(folder: Path) -> None:
    with (
        open_store(folder / "mine.db", create=True) as store,
        build_graph(Campaign.load(folder), store=store, trainer=lambda config, seed: config["x"]) as graph,
    ):
        graph.compile().invoke({"campaign": "f"})
    assert not (folder / "imported").exists()


def test_a_campaign_in_code_says_what_is_wrong_with_it(folder: Path) -> None:
    tables = {"campaign": {"name": "c", "trainer": "function"}, "knobs": {"x": (1, 9)}, "proposers": {"r": {}}}
    with pytest.raises(CampaignError, match=r"<code>: `budget` is missing; add it"):
        Campaign.from_dict(tables)
    with pytest.raises(CampaignError, match=r"<code>: knob `x`: .*not bool"):
        Campaign.from_dict({**tables, "knobs": {"x": [True, False]}})
    with (
        open_store(folder / "mine.db", create=True) as store,
        pytest.raises(CampaignError, match=r"`trainer\.function`"),
    ):
        build_graph(Campaign.from_dict({**tables, "budget": {"iterations": 1}}), store=store)


EXITS = """
import overnight
campaign = overnight.Campaign.from_dict({
    "campaign": {"name": "c", "trainer": "function"}, "budget": {"iterations": 5},
    "knobs": {"x": [3, 2, 1]}, "proposers": {"random": {"kind": "random"}},
})
store = overnight.open_store("exits.db", create=True)
app = overnight.build_graph(campaign, store=store, trainer=lambda config, seed: config["x"]).compile()
app.invoke({"campaign": "c"})
"""


def test_a_host_that_never_closes_anything_ends_quietly(folder: Path) -> None:
    (folder / "host.py").write_text(EXITS)
    command = [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "host.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr
    assert "ResourceWarning" not in done.stderr
