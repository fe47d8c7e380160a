"""The public API is what the snapshot says, costs nothing to import, and has types for whoever checks theirs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import overnight

from .public_api import described

SNAPSHOT = Path(__file__).with_name("public_api.txt")
REFRESH = "if this is meant, say it in CHANGELOG.md and run: .venv/bin/python -P tests/public_api.py > " + (
    "tests/public_api.txt"
)
IMPORT_LIMIT_S = 0.3


def test_names_and_signatures_are_those_that_were_promised() -> None:
    assert described() == SNAPSHOT.read_text(), REFRESH


def test_every_event_is_public() -> None:
    every = {event.__name__ for event in overnight.Event.__subclasses__()}
    assert every <= set(overnight.events.__all__), "add it to overnight/events.py"


def test_the_page_of_the_api_has_every_name() -> None:
    page = (SNAPSHOT.parents[1] / "docs" / "api.md").read_text()
    assert [name for name in overnight.__all__ if not re.search(rf"\b{name}\b", page)] == []


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(overnight))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.asname or alias.name: node.module for node in imports for alias in node.names}
    assert set(typed) == set(overnight.__all__)
    assert sorted(overnight.__all__) == overnight.__all__
    for name, module in typed.items():
        if name != "events":
            assert getattr(importlib.import_module(f"{module}"), name) is getattr(overnight, name)


def test_importing_it_is_quick_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import overnight; print(time.perf_counter() - t)\n"
        "print([m for m in ('torch', 'langgraph', 'sqlalchemy', 'pydantic', 'overnight.agent') if m in sys.modules])\n"
        "overnight.Campaign, overnight.query, overnight.events, overnight.Trainer, overnight.optimize\n"
        "print([m for m in ('torch', 'langgraph', 'optuna', 'transformers') if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert [run.stdout.splitlines()[1:] for run in runs] == [["[]", "[]"]] * 3
    assert min(float(run.stdout.splitlines()[0]) for run in runs) < IMPORT_LIMIT_S


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module `overnight` has no attribute `optimise`"):
        overnight.optimise  # type: ignore[attr-defined]  # noqa: B018
    assert set(overnight.__all__) <= set(dir(overnight))
    assert overnight.__version__


USER = """
from typing import Any, assert_type
import overnight
from overnight import Ask, Answer, Float, TurnState, TurnUpdate
from overnight.events import Decided

def train(config: dict[str, Any], seed: int) -> float:
    return float(config["lr"])

class Mine:
    name = "mine"
    def propose(self, ask: Ask) -> Answer:
        return Answer(reply=overnight.reply_text(ask.moves[0].knob, ask.moves[0].value, "why not"), latency_s=0.0)
    def describe(self) -> dict[str, Any]:
        return {"kind": "mine"}
    def close(self) -> None: ...

class Listener:
    def on_event(self, event: overnight.Event) -> None:
        if isinstance(event, Decided):
            assert_type(event.gain, float | None)

def critic(state: TurnState) -> TurnUpdate:
    return {"veto": "no"}

async def slow_critic(state: TurnState) -> TurnUpdate:
    return {}

result = overnight.optimize(
    train, {"lr": Float(0.1, 1.0), "act": ["a", "b"], "n": (1, 9)}, iterations=3, proposer=Mine(), hooks=[Listener()]
)
assert_type(result, overnight.Result)
with overnight.open_store("x.db", create=True) as store:
    campaign = overnight.Campaign.load("quickstart")
    nodes: dict[str, overnight.CustomNode] = {"after:propose": critic, "after:decide": slow_critic}
    with overnight.build_graph(campaign, store=store, trainer=train, nodes=nodes) as graph:
        graph.compile()
for row in overnight.query("x.db", "SELECT 1"):
    assert_type(row, dict[str, object])
"""


@pytest.mark.slow
def test_a_users_strict_type_check_passes(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_python_in_the_checkouts_own_folder_imports_the_whole_package() -> None:
    root = Path(__file__).parents[1]
    said = subprocess.run(
        [sys.executable, "-c", "import overnight; print(overnight.optimize.__module__, overnight.__file__)"],
        cwd=root, env={"PATH": ""}, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert said == ["overnight.agent.optimize", str(root / "overnight" / "__init__.py")]
