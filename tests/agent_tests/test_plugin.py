"""A third-party plugin, installed for real beside the package, adds a proposer, a trainer and a rail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit

PLUGIN = Path(__file__).parents[1] / "plugin"
CAMPAIGN = {
    "campaign": {"name": "p", "trainer": "paraboloid"},
    "budget": {"iterations": 3},
    "decision": {"min_gain": 0.0},
    "knobs": {"x": {"type": "float", "choices": [16.0, 8.0, 4.0, 1.0], "default": 16.0}},
    "proposers": {"halving": {"kind": "halving"}},
    "rails": {"extra": ["P1_small_steps"]},
    "router": {"warmup": False, "explore": 0.0},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the plugin into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(folder),
    ]
    subprocess.run([*command, str(PLUGIN)], check=True, capture_output=True)
    return folder


def overnight(*arguments: str, site: Path, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("overnight")), *arguments]
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "campaign.toml").write_text(tomlkit.dumps(CAMPAIGN))
    return tmp_path


def test_its_parts_run_a_campaign(site: Path, folder: Path) -> None:
    result = overnight("run", ".", "--allow", site=site, cwd=folder)
    assert result.returncode == 0, result.stderr
    output = overnight("sql", "select new_value, outcome from iterations", "--format", "json", site=site, cwd=folder)
    rows = json.loads(output.stdout)
    assert [(row["new_value"], row["outcome"]) for row in rows] == [("8.0", "kept"), ("4.0", "kept"), ("1.0", "kept")]


def test_its_rail_is_off_the_open_moves(site: Path, folder: Path) -> None:
    overnight("run", ".", "--allow", "--iterations", "1", site=site, cwd=folder)
    overnight("enqueue", "p", "x=1.0", site=site, cwd=folder)
    overnight("run", ".", "--allow", "--iterations", "2", site=site, cwd=folder)
    query = 'select rail, rail_reason from attempts where "try" = 1 and iteration = 2'
    (row,) = json.loads(overnight("sql", query, "--format", "json", site=site, cwd=folder).stdout)
    assert row["rail"] == "P1_small_steps"
    assert "too large a step" in row["rail_reason"]


def test_doctor_lists_it_and_where_it_is_from(site: Path, folder: Path) -> None:
    rows = json.loads(overnight("doctor", "--format", "json", site=site, cwd=folder).stdout)
    found = {row["what"]: row["found"] for row in rows}
    assert "paraboloid (overnight-example-plugin)" in found["trainers"]
    assert "halving (overnight-example-plugin 0.1)" in found["proposers"]
    assert "P1_small_steps (overnight-example-plugin)" in found["rails"]


def test_a_rail_that_is_not_installed_is_named(folder: Path, site: Path) -> None:
    text = (folder / "campaign.toml").read_text().replace("P1_small_steps", "P2_gone")
    (folder / "campaign.toml").write_text(text)
    result = overnight("run", ".", "--allow", site=site, cwd=folder)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "`rails.extra`: the rail `P2_gone` is not installed" in result.stderr
