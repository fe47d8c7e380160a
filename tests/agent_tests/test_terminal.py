"""What a model or a stranger wrote reaches the terminal as text: it moves no cursor and sets no clipboard."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner

from overnight.agent.cli import overnight as cli

from .test_cli import overnight, write

CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
HOSTILE = f"{CLIPBOARD}\x1b[2J\x9b31m\u202edesrever\r"


def has_control(text: str) -> bool:
    return any(unicodedata.category(char) in ("Cc", "Cf") and char not in "\n\t" for char in text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign whose model writes escape sequences into every field, shown as it ran."""
    folder = tmp_path_factory.mktemp("hostile")
    replies = [
        json.dumps({"knob": f"b{HOSTILE}", "new_value": 3, "reason": HOSTILE}),
        json.dumps({"knob": "b", "new_value": f"3{HOSTILE}", "reason": HOSTILE}),
        json.dumps({"knob": "b", "new_value": 3, "reason": HOSTILE}),
    ]
    write(
        folder / "mine",
        budget={"iterations": 1},
        proposers={"model": {"kind": "scripted", "replies": replies}, "random": {"kind": "random"}},
        router={"champion": "model"},
    )
    result = overnight("run", "mine", cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "run.txt").write_text(result.stdout + result.stderr)
    return folder


def test_a_run_prints_no_control_characters(folder: Path) -> None:
    text = (folder / "run.txt").read_text()
    assert "R2_menu" in text
    assert not has_control(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "c", "1"],
        ["sql", "select * from attempts"],
        ["sql", f"select 1 as '{HOSTILE}'"],
        ["status", "c"],
        ["sql", f"select {HOSTILE}"],
    ],
)
def test_no_command_prints_control_characters(folder: Path, arguments: list[str]) -> None:
    result = overnight(*arguments, "--db", "overnight.db", cwd=folder)
    assert len(result.stdout + result.stderr) > 50
    assert not has_control(result.stdout + result.stderr)


def test_check_tells_of_a_hostile_proposal_as_text(folder: Path) -> None:
    reply = json.dumps({"knob": HOSTILE, "new_value": 3, "reason": ""})
    output = CliRunner().invoke(cli, ["check", str(folder / "mine"), "-"], input=reply).output
    assert output.startswith("blocked by R2_menu: `\\x1b]52")
    assert not has_control(output)


def test_json_keeps_the_text_and_escapes_it(folder: Path) -> None:
    result = overnight("sql", "select reason from attempts where reason is not null", "--format", "json", cwd=folder)
    assert HOSTILE in [row["reason"] for row in json.loads(result.stdout)]
    assert "\x1b" not in result.stdout
