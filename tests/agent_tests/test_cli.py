"""The command line as people use it: real processes, exit codes, one clear line for what is wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomlkit

from overnight.store.sql_store import SqlStore

from .campaigns import data

DEADLINE_S = 60.0


def overnight(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a folder."""
    command = [str(Path(sys.executable).with_name("overnight")), *arguments]
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("overnight")), *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def write(folder: Path, **sections: Any) -> Path:
    """Write the small campaign as a file."""
    folder.mkdir(exist_ok=True)
    (folder / "campaign.toml").write_text(tomlkit.dumps(data(**sections)))
    return folder


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def trials(folder: Path) -> int:
    """Count what is committed, from outside."""
    try:
        connection = sqlite3.connect(f"file:{folder / 'overnight.db'}?mode=ro", uri=True)
        try:
            return int(connection.execute("SELECT count(*) FROM trials").fetchone()[0])
        finally:
            connection.close()
    except sqlite3.OperationalError:
        return 0


def trajectory(folder: Path) -> list[tuple[object, ...]]:
    """Return what was decided, turn by turn, and what was measured."""
    connection = sqlite3.connect(folder / "overnight.db")
    try:
        attempts = connection.execute(
            'SELECT iteration, "try", knob, new_value, outcome, gain, trials FROM attempts ORDER BY iteration, "try"'
        ).fetchall()
        measured = connection.execute(
            "SELECT config_id, split, seed, replicate, metric FROM trials ORDER BY 1, 2, 3, 4"
        ).fetchall()
        return [*attempts, *measured]
    finally:
        connection.close()


def test_a_campaign_runs_to_its_end_and_says_what_it_found(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 6})
    result = overnight("run", "mine", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"Best: . = .* gain \+", result.stdout)
    assert re.search(r"Locked holdout, 20..-..-..: winner against first baseline \+", result.stdout)


def test_the_sql_that_a_run_prints_works(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 3})
    printed = overnight("run", "mine", cwd=tmp_path).stdout
    match = re.search(r'See more: overnight sql "(.*)"', printed)
    assert match is not None
    result = overnight("sql", match[1], "--format", "json", cwd=tmp_path)
    assert len(json.loads(result.stdout)) == 3


def test_sql_answers_in_under_a_second_and_without_the_heavy_parts(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 1})
    overnight("run", "mine", cwd=tmp_path)
    code = (
        "import sys; from overnight.agent.cli import overnight\n"
        "overnight.main(['sql', 'select 1 as one'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'langgraph', 'transformers', 'optuna', 'openai') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        overnight("sql", "select outcome, count(*) from iterations group by outcome", cwd=tmp_path)
        times.append(time.perf_counter() - begin)
    assert min(times) < 1.0


@pytest.mark.parametrize("form", ["json", "csv"])
def test_data_goes_alone_to_standard_output(tmp_path: Path, form: str) -> None:
    write(tmp_path / "mine", budget={"iterations": 2})
    overnight("run", "mine", cwd=tmp_path)
    output = overnight("sql", "select iteration, knob from iterations", "--format", form, cwd=tmp_path).stdout
    rows = json.loads(output) if form == "json" else list(csv.DictReader(io.StringIO(output)))
    assert [str(row["iteration"]) for row in rows] == ["1", "2"]


def test_rows_too_wide_for_a_table_are_printed_a_value_a_line(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 2})
    overnight("run", "mine", cwd=tmp_path)
    narrow = overnight("sql", "select iteration, knob from iterations", cwd=tmp_path).stdout
    assert re.search(r"^ *iteration +knob", narrow, re.MULTILINE)
    joined = "select * from iterations a join iterations b on a.iteration = b.iteration where a.iteration = 1"
    assert len(re.findall("^iteration +1 *$", overnight("sql", joined, cwd=tmp_path).stdout, re.MULTILINE)) == 2
    wide = overnight("sql", "select * from iterations", cwd=tmp_path).stdout
    (row,) = json.loads(
        overnight("sql", "select * from iterations where iteration = 2", "--format", "json", cwd=tmp_path).stdout
    )
    _, first, second = wide.split("row ")
    assert first.startswith("1 of 2")
    assert [line.split()[0] for line in second.splitlines()[1:] if line.strip()] == list(row)
    assert re.search(f"^config_id +{row['config_id']} *$", second, re.MULTILINE)


def test_no_rows_are_said_to_be_none(tmp_path: Path) -> None:
    SqlStore.open(tmp_path / "overnight.db", create=True).close()
    assert overnight("sql", "select * from iterations where 1 = 0", cwd=tmp_path).stdout == "no rows\n"


BAD_INPUT: list[tuple[str, dict[str, Any] | str, str]] = [
    ("a missing key", {"campaign": {"name": None}}, r"campaign\.toml: `campaign\.name` is missing; add it"),
    ("an unknown key", {"budget": {"iteration": 2}}, r"campaign\.toml: `budget\.iteration` is not a key; did you mean"),
    ("a default outside its range", {"knobs": {"a": {"type": "float", "range": [0.0, 1.0], "default": 4.0}}}, "`a`"),
    ("a constraint that cannot parse", "[[constraints]]\nid = 'k'\nrule = 'a <'\n", "constraint `k`.*does not parse"),
    ("a knob with one value", {"knobs": {"b": {"type": "int", "choices": [1], "default": 1}}}, "knob `b`.*remove"),
    ("a trainer that is not there", {"campaign": {"trainer": "gtp"}}, r"campaign\.toml: .*\"gtp\".*choose one of"),
    ("a trainer setting that is not there", {"trainer": {"nois_sd": 1}}, "nois_sd"),
    ("a proposer kind that is not there", {"proposers": {"random": {"kind": "radnom"}}}, "`radnom`"),
    ("an int range with one value", {"knobs": {"b": {"type": "int", "range": [1.0, 1.5], "default": 1}}}, "knob `b`"),
    ("a limit without end", {"budget": {"trial_timeout_s": float("inf")}}, "`budget.trial_timeout_s` is not"),
    ("a rail that is not there", {"rails": {"extra": ["nosuch"]}}, r"`rails\.extra`: the rail `nosuch`"),
    ("text that is not TOML", "[[[", "not valid TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change", "message"), BAD_INPUT, ids=[case[0] for case in BAD_INPUT])
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, what: str, change: dict[str, Any] | str, message: str
) -> None:
    folder = write(tmp_path / "mine", **(change if isinstance(change, dict) else {}))
    if isinstance(change, str):
        with (folder / "campaign.toml").open("a") as file:
            file.write(change)
    result = overnight("run", "mine", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert re.search(message, result.stderr)
    assert not list(tmp_path.glob("overnight.db*"))


def test_a_glob_that_matches_nothing_names_its_key(tmp_path: Path) -> None:
    quickstart = overnight("init", "mine", cwd=tmp_path)
    assert quickstart.returncode == 0, quickstart.stderr
    file = tmp_path / "mine" / "campaign.toml"
    file.write_text(file.read_text().replace('data = "stdlib"', 'data = "nowhere/*.txt"'))
    result = overnight("run", "mine", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert re.search(r"campaign\.toml: `trainer\.data`.*nowhere.*give a glob", result.stderr)
    assert not list(tmp_path.glob("overnight.db*"))


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("my notes")
    write(tmp_path / "mine")
    for arguments in (["run", "mine"], ["sql", "select 1"], ["status"], ["db", "upgrade"]):
        result = overnight(*arguments, "--db", "notes.txt", cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert "notes.txt" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "my notes"


def test_check_names_the_rail_and_exits_with_one(tmp_path: Path) -> None:
    write(tmp_path / "mine")
    passed = overnight("check", "mine", "-", cwd=tmp_path, stdin='{"knob": "b", "new_value": 3, "reason": ""}')
    blocked = overnight("check", "mine", "-", cwd=tmp_path, stdin='{"knob": "b", "new_value": 7, "reason": ""}')
    assert (passed.returncode, passed.stdout) == (0, "passed: b: 1 -> 3\n")
    assert (blocked.returncode, blocked.stdout.split(":")[0]) == (1, "blocked by R3_range")


def test_show_prints_a_turn_whole(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 1})
    overnight("run", "mine", cwd=tmp_path)
    shown = overnight("show", "c", "1", cwd=tmp_path).stdout
    assert all(part in shown for part in ("# Task", '"new_value"', "passed the rails", "screening", "Decision"))
    (row,) = json.loads(overnight("show", "c", "1", "--format", "json", cwd=tmp_path).stdout)
    assert row["prompt"].startswith("# Task")
    assert overnight("show", "c", "9", cwd=tmp_path).returncode == 1


def test_status_says_where_a_campaign_stands(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 4})
    overnight("run", "mine", "--iterations", "2", cwd=tmp_path)
    (row,) = json.loads(overnight("status", "--format", "json", cwd=tmp_path).stdout)
    assert (row["campaign"], row["status"], row["turn"], row["turns"], row["stage"]) == ("c", "paused", 2, 4, "propose")


def test_fresh_starts_another_campaign_and_deletes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 1})
    overnight("run", "mine", cwd=tmp_path)
    overnight("run", "mine", "--fresh", cwd=tmp_path)
    rows = json.loads(overnight("status", "--format", "json", cwd=tmp_path).stdout)
    assert [row["campaign"] for row in rows] == ["c", "c-2"]


def test_a_folder_named_like_a_fresh_campaign_is_its_own(tmp_path: Path) -> None:
    for name, seed in (("q", 1), ("q-2", 2)):
        write(tmp_path / name, campaign={"name": name, "seed": seed}, budget={"iterations": 2})
        overnight("run", name, "--iterations", "1", cwd=tmp_path)
    assert overnight("run", "q", cwd=tmp_path).returncode == 0
    rows = json.loads(overnight("status", "--format", "json", cwd=tmp_path).stdout)
    assert [(row["campaign"], row["turn"]) for row in rows] == [("q", 2), ("q-2", 1)]


def test_a_folder_stands_for_its_newest_campaign(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 1})
    overnight("run", "mine", cwd=tmp_path)
    overnight("run", "mine", "--fresh", cwd=tmp_path)
    (row,) = json.loads(overnight("status", "mine", "--format", "json", cwd=tmp_path).stdout)
    assert row["campaign"] == "c-2"


def test_a_finished_campaign_goes_on_when_its_budget_is_raised(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 50, "patience": 1})
    overnight("run", "mine", cwd=tmp_path)
    before = json.loads(overnight("status", "--format", "json", cwd=tmp_path).stdout)[0]
    assert "is finished (patience)" in overnight("run", "mine", cwd=tmp_path).stderr
    write(tmp_path / "mine", budget={"iterations": 50, "patience": 3})
    overnight("run", "mine", cwd=tmp_path)
    after = json.loads(overnight("status", "--format", "json", cwd=tmp_path).stdout)[0]
    assert after["turn"] > before["turn"]


LEFT = """
import os, sqlite3
connection = sqlite3.connect("overnight.db.c.checkpoints")
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("CREATE TABLE left_behind (x)")
connection.commit()
open("overnight.db.c.live.json", "w").write("{}")
os._exit(0)
"""


def test_what_a_run_left_that_was_killed_after_its_last_write_is_cleared_away(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 1})
    overnight("run", "mine", cwd=tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    subprocess.run([sys.executable, "-c", LEFT], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir()} > before
    overnight("run", "mine", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_request_that_nobody_would_serve_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 1})
    overnight("run", "mine", cwd=tmp_path)
    for change, word in (("b=3", "finished"), ("zz=3", "finished")):
        result = overnight("enqueue", "c", change, cwd=tmp_path)
        assert (result.returncode, word in result.stderr) == (2, True)


@pytest.mark.parametrize("value", ["NaN", "1e999", "-Infinity"])
def test_a_request_that_is_no_number_is_refused(tmp_path: Path, value: str) -> None:
    write(tmp_path / "mine", budget={"iterations": 4})
    overnight("run", "mine", "--iterations", "1", cwd=tmp_path)
    result = overnight("enqueue", "c", f"a={value}", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("template", ["quickstart", "gpt354m", "command"])
def test_init_makes_a_campaign_that_checks(tmp_path: Path, template: str) -> None:
    assert overnight("init", "new", "--from", template, cwd=tmp_path).returncode == 0
    text = (tmp_path / "new" / "campaign.toml").read_text()
    assert 'name = "new"' in text
    assert text.count("#") > 3
    assert overnight("check", "new", "-", cwd=tmp_path, stdin="{}").returncode == 1


def test_init_takes_a_menu_as_json(tmp_path: Path) -> None:
    (tmp_path / "menu.json").write_text('{"lr": {"type": "float", "range": [0.001, 0.1], "default": 0.01}}')
    assert overnight("init", "new", "--menu", "menu.json", cwd=tmp_path).returncode == 0
    reply = '{"knob": "lr", "new_value": 0.02, "reason": ""}'
    assert overnight("check", "new", "-", cwd=tmp_path, stdin=reply).stdout == "passed: lr: 0.01 -> 0.02\n"


def test_init_leaves_a_folder_that_is_not_empty_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = overnight("init", ".", cwd=tmp_path)
    assert (result.returncode, [path.name for path in tmp_path.iterdir()]) == (2, ["notes.txt"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_pauses_after_the_current_trial(tmp_path: Path, number: signal.Signals) -> None:
    write(tmp_path / "mine", budget={"iterations": 500}, trainer={"sleep_s": 0.05})
    process = started("run", "mine", cwd=tmp_path)
    wait_until(lambda: trials(tmp_path) > 8)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    (row,) = json.loads(overnight("status", "--format", "json", cwd=tmp_path).stdout)
    assert (row["status"], row["stop_reason"], row["running_as"]) == ("paused", number.name, None)


def test_pause_from_another_terminal(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 500}, trainer={"sleep_s": 0.02})
    process = started("run", "mine", cwd=tmp_path)
    wait_until(lambda: trials(tmp_path) > 8)
    assert overnight("pause", "c", cwd=tmp_path).returncode == 0
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, "paused: asked by `overnight pause`" in output) == (0, True)


def test_a_killed_run_is_shown_as_stopped(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 500}, trainer={"sleep_s": 0.02})
    process = started("run", "mine", cwd=tmp_path)
    wait_until(lambda: trials(tmp_path) > 0)
    process.kill()
    process.communicate()
    (row,) = json.loads(overnight("status", "--format", "json", cwd=tmp_path).stdout)
    assert (row["status"], row["running_as"]) == ("stopped (run it again to go on)", None)
    assert overnight("pause", "c", cwd=tmp_path).returncode == 1


def test_a_second_run_says_who_holds_the_campaign(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 500}, trainer={"sleep_s": 0.02})
    process = started("run", "mine", cwd=tmp_path)
    wait_until(lambda: trials(tmp_path) > 0)
    second = overnight("run", "mine", cwd=tmp_path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_S)
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"process {process.pid}" in second.stderr


def reached(folder: Path, count: int, process: subprocess.Popen[str]) -> bool:
    return trials(folder) >= count or process.poll() is not None


def test_a_campaign_killed_at_any_moment_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    options = {"budget": {"iterations": 12}, "trainer": {"sleep_s": 0.03}, "decision": {"audit": 0.2},
               "router": {"warmup": True, "explore": 0.2}}  # fmt: skip
    for folder in ("calm", "killed"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "mine", **options)
    assert overnight("run", "mine", cwd=tmp_path / "calm").returncode == 0
    for kill_at in (2, 6, 9, 14, 17, 23):
        process = started("run", "mine", cwd=tmp_path / "killed")
        wait_until(partial(reached, tmp_path / "killed", kill_at, process))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        psutil.wait_procs(children, timeout=DEADLINE_S)
        assert not any(child.is_running() for child in children)
    assert overnight("run", "mine", cwd=tmp_path / "killed").returncode == 0
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "calm")


def test_doctor_says_what_works_here(tmp_path: Path) -> None:
    write(tmp_path / "mine")
    result = overnight("doctor", "mine", "--format", "json", cwd=tmp_path)
    rows = {row["what"]: row for row in json.loads(result.stdout)}
    assert {"python", "torch", "disk", "database", "trainers", "proposers", "campaign"} <= set(rows)
    assert "scripted (overnight)" in rows["trainers"]["found"]


def test_the_help_lists_every_command(tmp_path: Path) -> None:
    text = overnight("--help", cwd=tmp_path).stdout
    for command in ("init", "run", "pause", "status", "enqueue", "check", "sql", "show", "db", "doctor"):
        assert re.search(rf"^  {command} +\S", text, re.MULTILINE), command
