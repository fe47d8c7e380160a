"""A campaign file from a stranger gets nothing unasked: no command, no plugin, no outside path, no key."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from click.testing import CliRunner

from overnight.agent.campaign import load_campaign
from overnight.agent.cli import overnight as cli
from overnight.agent.graph import build_graph
from overnight.agent.permissions import is_remembered, remember
from overnight.agent.run import open_runtime
from overnight.agent.trust import allow, open_wants
from overnight.agent.wants import KNOWN, OURS, shown, wants_of
from overnight.store.errors import NotAllowedError
from overnight.store.sql_store import SqlStore

from .campaigns import data
from .servers import LoopbackServer, Wire

OVERNIGHT = str(Path(sys.executable).with_name("overnight"))
COMMAND = {"campaign": {"trainer": "command"}, "trainer": {"command": ["touch", "{a}{b}", "../pwned"], "optimum": None, "noise_sd": None, "seed_sd": None}}  # fmt: skip  # noqa: E501
STRANGER = "stranger.example"
SECRET = "AKIA-very-secret-0123456789"
FAKE_NAMES = f"""
import socket
_real = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    return _real("127.0.0.1" if host in ({STRANGER!r}, {STRANGER.encode()!r}) else host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has allowed nothing yet."""
    monkeypatch.setenv("OVERNIGHT_DATA", str(tmp_path / "user"))
    return tmp_path / "user"


def overnight(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OVERNIGHT, *arguments], cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def write(folder: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tables = data(**{"budget": {"iterations": 1}, **sections})
    (folder / "campaign.toml").write_text(tomlkit.dumps(tables))
    return folder


def refused(folder: Path, *commands: str) -> str:
    """Give a hostile campaign to the command line without anybody to ask; return what it is refused with."""
    error: BaseException | None = None
    for command in commands or ("run",):
        error = CliRunner().invoke(cli, [command, str(folder), "--db", str(folder.parent / "o.db")]).exception
        assert isinstance(error, NotAllowedError)
        assert "nobody has allowed this file to" in str(error)
    assert not list(folder.parent.glob("o.db*"))
    return str(error)


def test_a_run_that_nobody_watches_ends_with_one_line_and_code_two(tmp_path: Path) -> None:
    write(tmp_path / "theirs", **COMMAND)
    result = overnight("run", "theirs", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert "run a command (`trainer.command`: " in result.stderr
    assert "pass `--allow`" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_a_command_that_is_told_is_not_run(tmp_path: Path) -> None:
    line = refused(write(tmp_path / "theirs", notify={"command": ["touch", "../pwned"], "env": ["HOME_KEY"]}))
    assert '`notify.command`: ["touch", "../pwned"]' in line
    assert "which sees the variables HOME_KEY" in line
    assert not (tmp_path / "pwned").exists()


def test_a_python_function_is_not_imported(tmp_path: Path) -> None:
    none = dict.fromkeys(("optimum", "noise_sd", "seed_sd"))
    folder = write(tmp_path / "theirs", campaign={"trainer": "function"}, trainer={"function": "evil_fn:f", **none})
    (folder / "evil_fn.py").write_text("open('pwned', 'w')")
    assert f"run Python code (`trainer.function`: evil_fn:f, looked for in {folder}" in refused(folder)


def test_every_built_in_part_is_one_that_the_gate_knows() -> None:
    for group, known in KNOWN.items():
        assert {point.name for point in entry_points(group=group) if point.dist and point.dist.name == OURS} == known


GPT = {"steps": 1, "optimum": None, "noise_sd": None, "seed_sd": None}
LOCAL = "http://127.0.0.1:1/v1"
GPT_KNOBS = {"a": None, "b": None, "n_layer": {"type": "int", "choices": [1, 2], "default": 1}}


@pytest.mark.parametrize(
    ("key", "sections", "read"),
    [
        ("campaign.brief", {"campaign": {"brief": "../secret/key.txt"}}, "key.txt"),
        ("campaign.brief", {"campaign": {"brief": "linked.md"}}, "key.txt"),
        ("trainer.data", {"campaign": {"trainer": "gpt"}, "trainer": {**GPT, "data": "/etc/*"}}, "/etc/*"),
        ("trainer.data", {"campaign": {"trainer": "gpt"}, "trainer": {**GPT, "data": "*.md"}}, "key.txt"),
        ("trainer.data", {"campaign": {"trainer": "gpt"}, "trainer": {**GPT, "data": "hf:../secret"}}, "secret"),
        ("trainer.data_files", {**COMMAND, "trainer": {**COMMAND["trainer"], "data_files": ["*.md"]}}, "key.txt"),
        ("proposers.s.base_model", {"proposers": {"s": {"kind": "student", "base_model": "../secret"}}}, "secret"),
        ("proposers.s.base_model", {"proposers": {"s": {"kind": "student", "base_model": "m"}}}, "key.txt"),
        ("proposers.s.base_model", {"proposers": {"s": {"kind": "student", "base_model": "/x/y.gguf"}}}, "y.gguf"),
        (
            "proposers.s.adapter",
            {"proposers": {"s": {"kind": "student", "base_model": "smollm2-135m", "adapter": "../secret"}}},
            "secret",
        ),
        (
            "proposers.v.adapter_root",
            {"proposers": {"v": {"kind": "openai", "base_url": LOCAL, "adapter": "v1", "adapter_root": "/theirs"}}},
            f"/theirs, as the server at {LOCAL} sees it",
        ),
    ],
)
def test_a_path_outside_the_folder_is_not_read(tmp_path: Path, key: str, sections: dict[str, Any], read: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text(SECRET)
    knobs = {"knobs": GPT_KNOBS} if sections.get("campaign", {}).get("trainer") == "gpt" else {}
    folder = write(tmp_path / "theirs", **sections, **knobs, router={"champion": "random"})
    (folder / "linked.md").symlink_to("../secret/key.txt")
    (folder / "m").mkdir()
    (folder / "m" / "config.json").symlink_to("../../secret/key.txt")
    line = refused(folder)
    assert f"(`{key}`: " in line
    assert read in line


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("campaign.trainer", {"campaign": {"trainer": "evil"}}),
        ("proposers.e.kind", {"proposers": {"e": {"kind": "evil"}}, "router": {"champion": "random"}}),
        ("rails.extra", {"rails": {"extra": ["E1_evil"]}}),
    ],
)
def test_a_plugin_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, sections: dict[str, Any]
) -> None:
    site = tmp_path / "site"
    points = "".join(
        f"[overnight.{group}]\n{name} = evil:Evil\n"
        for group, name in (("trainers", "evil"), ("proposers", "evil"), ("rails", "E1_evil"))
    )
    (site / "evil-1.0.dist-info").mkdir(parents=True)
    (site / "evil-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (site / "evil-1.0.dist-info" / "entry_points.txt").write_text(points)
    (site / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w').close()\nclass Evil: pass\n")
    folder = write(tmp_path / "theirs", **sections)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    line = refused(folder, *(("run", "check") if key == "rails.extra" else ("run",)))
    assert f"use a plugin (`{key}`: " in line
    assert "from evil (evil:Evil)" in line
    assert not (tmp_path / "pwned").exists()
    CliRunner().invoke(cli, ["run", str(folder), "--allow", "--db", str(tmp_path / "o.db")])
    assert (tmp_path / "pwned").exists()  # so it would have been seen


async def proposes(wire: Wire) -> None:
    await wire.say('{"knob": "b", "new_value": 3, "reason": ""}')


def test_a_key_is_not_sent_to_a_strangers_host(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAKE_NAMES)
    environment = {"PYTHONPATH": str(tmp_path / "site"), "AWS_SECRET_ACCESS_KEY": SECRET}
    with LoopbackServer(proposes) as server:
        url = server.url.replace("127.0.0.1", STRANGER)
        theirs = {"kind": "openai", "base_url": url, "model": "m", "structured": "none", "api_key_env": "AWS_SECRET_ACCESS_KEY"}  # fmt: skip  # noqa: E501
        folder = write(tmp_path / "theirs", proposers={"p": theirs}, router={"champion": "p"})
        refusal = overnight("run", str(folder), cwd=tmp_path, **environment)
        line = refusal.stderr
        assert refusal.returncode == 2
        assert (
            f"send a key (`proposers.p`: the value of AWS_SECRET_ACCESS_KEY to http://{STRANGER}:{server.port})" in line
        )
        assert server.requests == []
        assert overnight("run", str(folder), "--allow", cwd=tmp_path, **environment).returncode == 0
        sent = {wire.headers["authorization"] for wire in server.requests}
    assert sent == {f"Bearer {SECRET}"}  # so it would have been seen


@pytest.mark.parametrize(
    ("host", "asks"),
    [
        ("localhost:8000", False), ("127.0.0.1", False), ("127.8.8.8:1", False), ("[::1]:8000", False),
        ("192.168.0.9", True), ("localhost.evil.com", True), ("evil.localhost", True), ("0.0.0.0", True),
        ("127.1", True), ("2130706433", True), ("[::ffff:127.0.0.1]", True), ("\u24dbocalhost", True),
    ],
)  # fmt: skip
def test_only_this_machine_gets_a_key_unasked(tmp_path: Path, host: str, asks: bool) -> None:
    table = {"kind": "openai", "base_url": f"http://{host}/v1", "api_key_env": "K"}
    folder = write(tmp_path / "c", proposers={"p": table}, router={"champion": "p"})
    assert [want.kind for want in wants_of(load_campaign(folder))] == (["key"] if asks else [])


def test_allow_says_yes_once_and_for_all_of_this_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", notify={"command": ["true"]})
    assert overnight("run", "theirs", "--allow", cwd=tmp_path).returncode == 0
    assert open_wants(load_campaign(folder)) == ()
    with (folder / "campaign.toml").open("a") as file:
        file.write("# one more line\n")
    assert open_wants(load_campaign(folder))
    for command in (["run"], ["distill"], ["race"], ["rollback"], ["promote", "random"]):
        words = [command[0], str(folder), *command[1:], "--db", str(tmp_path / "overnight.db")]
        assert isinstance(CliRunner().invoke(cli, words).exception, NotAllowedError), command


def test_a_permission_is_for_this_folder_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", notify={"command": ["./told"]})
    allow(load_campaign(folder), wants_of(load_campaign(folder)))
    assert open_wants(load_campaign(folder)) == ()
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_wants(load_campaign(tmp_path / "elsewhere"))


def test_a_new_link_is_asked_for_although_the_file_is_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", campaign={"brief": "brief.md"}, notify={"command": ["true"]})
    (folder / "brief.md").write_text("mine")
    allow(load_campaign(folder), wants_of(load_campaign(folder)))
    (folder / "brief.md").unlink()
    (folder / "brief.md").symlink_to("/etc/hostname")
    assert [want.what for want in open_wants(load_campaign(folder)) if want.kind == "path"] == ["/etc/hostname"]


def test_permissions_are_private_and_one_that_others_could_write_is_none(tmp_path: Path) -> None:
    campaign = load_campaign(write(tmp_path / "theirs", notify={"command": ["true"]}))
    wants = wants_of(campaign)
    path = remember(campaign.sha256, wants, where=campaign.path)
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    assert is_remembered(campaign.sha256, wants)
    assert json.loads(path.read_text())["allowed"][0]["key"] == "notify.command"
    path.chmod(0o666)
    assert not is_remembered(campaign.sha256, wants)


def test_bundled_campaigns_and_what_init_made_ask_nothing(tmp_path: Path) -> None:
    assert wants_of(load_campaign("command_example"))
    assert open_wants(load_campaign("command_example")) == ()
    assert overnight("init", "mine", "--from", "command", cwd=tmp_path).returncode == 0
    assert open_wants(load_campaign(tmp_path / "mine")) == ()


def test_a_bundled_file_in_a_strangers_folder_is_a_strangers(tmp_path: Path) -> None:
    bundled = load_campaign("command_example").path
    (tmp_path / "campaign.toml").symlink_to(bundled)
    (tmp_path / "train.py").write_text("open('pwned', 'w')")
    assert open_wants(load_campaign(tmp_path))
    edited = replace(load_campaign("command_example"), sha256="0" * 64)
    assert open_wants(edited)


def test_a_host_application_is_refused_too_until_it_says_so(tmp_path: Path) -> None:
    campaign = load_campaign(write(tmp_path / "theirs", **COMMAND))
    store = SqlStore.open(tmp_path / "s.db", create=True)
    with pytest.raises(NotAllowedError, match=r"`trainer\.command`"):
        build_graph(campaign, store=store)
    open_runtime(replace(campaign, allowed=True), store).close()
    store.close()


def at_a_terminal(answer: str, *arguments: str, cwd: Path) -> tuple[int, str]:
    """Run the command on a real pseudo-terminal, answer its question, return its exit code and the screen."""
    leader, follower = pty.openpty()
    process = subprocess.Popen([OVERNIGHT, *arguments], cwd=cwd, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    screen, ends, answered = "", time.monotonic() + 60, False
    while time.monotonic() < ends:
        if not select.select([leader], [], [], 0.1)[0]:
            continue
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # the other side was closed
            break
        screen += chunk.decode(errors="replace")
        if "[y/N]" in screen and not answered:
            os.write(leader, f"{answer}\n".encode())
            answered = True
        if not chunk:
            break
    os.close(leader)
    return process.wait(60), screen


def test_a_person_is_asked_once(tmp_path: Path) -> None:
    write(tmp_path / "theirs", notify={"command": ["sh", "-c", "\u001b[2J\u202egnp.exe"]})
    code, screen = at_a_terminal("n", "run", "theirs", cwd=tmp_path)
    assert (code, "Allow this" in screen, "run a command" in screen) == (2, True, True)
    assert "\u001b[2J" not in screen
    assert "\\u202egnp.exe" in screen
    assert at_a_terminal("y", "run", "theirs", cwd=tmp_path)[0] == 0
    assert open_wants(load_campaign(tmp_path / "theirs")) == ()


def test_what_is_shown_cannot_move_the_cursor_and_hides_no_length() -> None:
    assert shown("a\x1b[31m\n\u202e\u0430") == "a\\x1b[31m\\n\\u202e\\u0430"
    assert shown("x" * 3000, 100).endswith("(2900 more characters; read the file)")
