"""The documentation is true: every command and code block of it is run, and the site that it makes is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from overnight.agent.campaign import parse_campaign
from overnight.agent.cli import overnight
from overnight.store.reading import query
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from .agent_tests.campaigns import data
from .doc_blocks import Block, blocks_of, replaced
from .store_tests.test_cookbook import HISTORY
from .store_tests.trajectories import as_bytes

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("skills/*/SKILL.md"), ROOT / "README.md"])
PAGES = {str(path.relative_to(ROOT)): path for path in FILES}
BLOCKS = {page: blocks_of(path, page) for page, path in PAGES.items()}
UNRUN = [block for blocks in BLOCKS.values() for block in blocks if not block.is_run]
LIMIT_S = 120


@dataclass
class Reader:
    """Somebody who follows a page, in a folder and with a home of their own."""

    folder: Path
    home: Path
    seen: str = ""
    """What the last commands printed."""

    def environment(self) -> dict[str, str]:
        ours = Path(sys.executable).parent
        plugins = self.home / "plugins"
        kept = {name: os.environ[name] for name in ("LANG", "TERM", "PYTHONPATH") if name in os.environ}
        return {
            **kept,
            "PATH": f"{ours}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "NO_COLOR": "1",
            # `pip install .` installs the page's plugin, without touching the environment of these tests.
            "PIP_TARGET": str(plugins),
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONPATH": os.pathsep.join([str(plugins), *filter(None, [kept.get("PYTHONPATH")])]),
        }

    def run(self, command: list[str], block: Block) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        allowed = re.findall(r"\d+", block.notes.get("exits", "0"))
        if str(done.returncode) not in allowed:
            pytest.fail(f"{block.where} ended with {done.returncode}:\n{block.text}\n{done.stdout}\n{done.stderr}")
        self.seen = f"{done.stdout}\n{done.stderr}"


def in_a_store(name: str, campaign: str) -> Callable[[Reader], None]:
    def make(reader: Reader) -> None:
        store = SqlStore.open(reader.folder / name, create=True)
        import_trajectory(store, as_bytes(HISTORY), name=campaign, origin="x")
        store.close()

    return make


def a_script(reader: Reader) -> None:
    shutil.copy(ROOT / "examples" / "command_script" / "train.py", reader.folder)


def a_clone(reader: Reader) -> None:
    for name in ("skills", "campaigns", "examples", "docs"):
        shutil.copytree(ROOT / name, reader.folder / name)


SCENES: dict[str, Callable[[Reader], None]] = {
    "a script": a_script,
    "a clone": a_clone,
    "after a night": in_a_store("overnight.db", "night"),
    "after the quickstart": in_a_store("quickstart.db", "quickstart"),
}


def new_reader(folder: Path) -> Reader:
    for name in ("here", "home"):
        (folder / name).mkdir()
    return Reader(folder / "here", folder / "home")


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return new_reader(tmp_path)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("night")
    in_a_store("overnight.db", "night")(Reader(folder, folder))
    return folder / "overnight.db"


def follow(block: Block, reader: Reader, night: Path) -> None:
    """Do what a reader of the block does."""
    if "file" in block.notes:
        (reader.folder / block.notes["file"]).write_text(block.text)
    elif "appends" in block.notes:
        with (reader.folder / block.notes["appends"]).open("a") as file:
            file.write(f"\n\n{block.text}")
    elif "replaces" in block.notes:
        mark, _, name = block.notes["replaces"].partition(" in ")
        path = reader.folder / name
        path.write_text(replaced(path.read_text(), mark, block.text))
    elif "printed" in block.notes:
        seen = {shape(line) for line in reader.seen.splitlines()}
        assert [line for line in block.text.splitlines() if line != "..." and shape(line) not in seen] == [], (
            reader.seen
        )
    elif block.language == "sh":
        reader.run(["bash", "-euo", "pipefail", "-c", block.text], block)
    elif block.language == "python":
        path = reader.folder / f"block_{block.line}.py"
        path.write_text(block.text)
        reader.run(["python", str(path)], block)
    elif block.language == "toml":
        parse_campaign(whole(tomllib.loads(block.text)), reader.folder / "campaign.toml")
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "sql":
        assert query(night, block.text).columns
    else:
        assert block.language == "text", f"{block.where}: `{block.language}` is not a language that can be run"


def shape(line: str) -> str:
    """Return a line of output without its numbers, which differ between machines."""
    return re.sub(r"\d+(\.\d+)?", "#", " ".join(line.split()))


def whole(fragment: dict[str, Any]) -> dict[str, Any]:
    """Return a campaign file that has these tables, as a reader's has them."""
    if "campaign" in fragment:
        return fragment
    router = {"router": {"champion": "random", **fragment.pop("router", {})}}
    return data(**{**fragment, **router})


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed(page: str, reader: Reader, night: Path) -> None:
    if page == "docs/sql.md":
        SCENES["after a night"](reader)
    for block in BLOCKS[page]:
        if "scene" in block.notes:
            SCENES[block.notes["scene"]](reader)
        if block.is_run:
            follow(block, reader, night)


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_in_passing_exist(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`(overnight [a-z][^`]*)`", prose)
    for said in re.findall(r"\bovernight ([a-z][^|]*)", "|".join(spans)):
        words = said.split()
        command = overnight.get_command(click.Context(overnight), words[0])
        assert command is not None, said
        if isinstance(command, click.Group) and len(words) > 1:
            command = command.commands[words[1]]
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        asked = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert asked <= known | {"--help"}, said


@pytest.mark.parametrize("block", UNRUN, ids=[block.where for block in UNRUN])
def test_what_is_not_run_says_why(block: Block) -> None:
    assert len(block.notes["not run"].split()) >= 3, block.where
    pytest.skip(f"{block.where}: {block.notes['not run']}")


def test_most_of_it_is_run() -> None:
    commands = [block for blocks in BLOCKS.values() for block in blocks if block.language in ("sh", "python")]
    unrun = [block for block in commands if not block.is_run]
    assert len(unrun) <= len(commands) / 3, [block.where for block in unrun]


def test_a_page_that_says_something_false_is_found(reader: Reader, night: Path) -> None:
    for language, text in (
        ("sh", "overnight status no-such-campaign"),
        ("python", "import no_such_module"),
        ("toml", "[router]\nno_such_key = 1"),
        ("sql", "SELECT no_such_column FROM iterations"),
        ("json", "{"),
        ("console", "$ overnight"),
    ):
        with pytest.raises((Exception, pytest.fail.Exception)):
            follow(Block("page", 1, language, text, {}), reader, night)


def test_the_skill_begins_as_agents_read_it() -> None:
    for path in ROOT.glob("skills/*/SKILL.md"):
        _, front, body = path.read_text().split("---\n", 2)
        told = dict(line.split(": ", 1) for line in front.splitlines())
        assert set(told) == {"name", "description"}
        assert told["name"] == path.parent.name
        assert 100 < len(told["description"]) <= 1024
        assert len(body.splitlines()) < 200


def built(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def links_to_the_network(site: Path) -> Iterator[str]:
    for page in site.glob("*.html"):
        yield from re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())


def test_the_site_is_built_strictly_and_needs_no_network(tmp_path: Path) -> None:
    done = built(ROOT / "docs", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {page.stem for page in tmp_path.glob("*.html")} >= {path.stem for path in ROOT.glob("docs/*.md")}
    assert list(links_to_the_network(tmp_path)) == []


def test_broken_links_stop_the_build(tmp_path: Path) -> None:
    links = ["[a](gone-1.md)", "[a](index.md#gone-2)", "[a](../gone-3.md)", "![a](gone-4.svg)"]
    source = tmp_path / "docs"
    (source / "static").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "conf.py", source)
    (source / "static" / "site.css").touch()
    (source / "index.md").write_text("# Title\n\n" + "\n\n".join(links))
    done = built(source, tmp_path / "site")
    assert done.returncode != 0
    assert set(re.findall(r"gone-\d", done.stderr)) == {"gone-1", "gone-2", "gone-3", "gone-4"}
