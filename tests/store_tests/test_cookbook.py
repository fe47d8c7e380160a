"""`docs/sql.md` is true: every question is asked of a database whose answers are known, on both engines."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overnight.store.reading import query
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from .suite import Campaigner
from .trajectories import as_bytes, attempt, header

COOKBOOK = (Path(__file__).parents[2] / "docs" / "sql.md").read_text()
QUESTIONS = dict(re.findall(r"^## ([^\n]+)\n\n(?:[^\n]+\n\n)?```sql\n(.+?)```", COOKBOOK, re.MULTILINE | re.DOTALL))
PYTHON = dict(re.findall(r"^## (\w+)\n\n(?:[^\n]+\n\n)?```python\n(.+?)```", COOKBOOK, re.MULTILINE | re.DOTALL))
FAILED = {"stage": "eval_failed", "error": "CUDA out of memory"}
HISTORY = [
    header(),
    attempt(1, "d_model", 768, 10.80, energy_wh=2.0),
    attempt(2, "d_model", 768, 10.89, energy_wh=2.0),
    attempt(3, "d_model", 2048, **FAILED),
    attempt(4, "lr", 0.0002, 10.70, energy_wh=2.0, proposer={"name": "student", "kind": "student"}),
    attempt(5, "d_model", 2048, **FAILED),
    attempt(6, "n_head", 7, stage="blocked", rail="R3_range", block_reason="7 is not a choice"),
    *(attempt(turn, "lr", 0.0004, 10.95, energy_wh=2.0) for turn in range(7, 12)),
]
ANSWERS: dict[str, list[tuple[object, ...]]] = {
    "What did the night find?": [(11, 2, 4, 10.7, 1.83, "imported")],
    "Which changes were kept, the best first?": [
        (4, "student", "lr", "0.0002", 10.7, pytest.approx(0.2 / 10.9), None, 1),
        (1, "nim", "d_model", "768", 10.8, pytest.approx(0.1 / 10.9), None, 1),
    ],
    "What do we know of each value of one knob?": [
        ("768", 2, 1, 1, pytest.approx(10.845), pytest.approx(0.09 / 2**0.5, rel=1e-4)),
        ("2048", 2, 0, 0, None, None),
    ],
    "Did the student help?": [
        ("student", 1, 1, 1, 1.0, 1, 0.0, pytest.approx(1.3)),
        ("nim", 10, 9, 1, pytest.approx(0.1), 4, pytest.approx(0.6), pytest.approx(1.3)),
    ],
    "What failed, and why?": [("oom", 2, 3, 5)],
    "What did the rails block?": [("R3_range", 1, "7 is not a choice")],
    "Does it go in circles? Repeats in windows of ten": [(1, 10, 5, 50), (11, 1, 1, 100)],
    "Was a known failure proposed again?": [(5, "d_model", "2048", 3, "oom")],
    "What was kept once and reverted another time?": [
        ("d_model", "768", 1, 1, pytest.approx(10.845), pytest.approx(0.09 / 2**0.5, rel=1e-4))
    ],
    "Joules and minutes for each kept change": [(2, round(11 * 74.2 / 60 / 2, 1), 28800)],
    "How did the best come about? Cumulative best": [(1, "d_model", "768", 10.8), (4, "lr", "0.0002", 10.7)],
    "What does the winner's configuration look like, beside where it started?": [("lr", "0.0003", "0.0002")],
    "Which knobs were never touched?": [("precision",), ("seed",)],
}


def fill(store: SqlStore) -> None:
    import_trajectory(store, as_bytes(HISTORY), name="night", origin="x")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cookbook") / "overnight.db"
    store = SqlStore.open(path, create=True)
    fill(store)
    store.close()
    return path


@pytest.fixture
def live(database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The database while a campaign holds it open for writing, seen from its folder."""
    store = SqlStore.open(database)
    campaign = Campaigner(store, "running")
    monkeypatch.chdir(database.parent)
    with store.writing(campaign.lease) as writer:
        writer.event("busy", {})
        yield database
    store.close()


def test_there_are_at_least_fifteen_questions() -> None:
    assert len(QUESTIONS) >= 15
    assert set(ANSWERS) <= set(QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered(database: Path, question: str) -> None:
    found = query(database, QUESTIONS[question])
    assert found.cut is None
    if question in ANSWERS:
        assert found.rows == ANSWERS[question]


def test_both_engines_answer_alike(database: Path, new_postgresql: Callable[[], str]) -> None:
    url = new_postgresql()
    store = SqlStore.open(url, create=True)
    fill(store)
    store.close()
    for question, statement in QUESTIONS.items():
        here, there = (query(where, statement) for where in (database, url))
        assert list(here.columns) == list(there.columns)
        if question in ANSWERS:
            assert there.rows == ANSWERS[question]


def test_the_numbers_of_the_knobs_are_those_of_the_file(database: Path) -> None:
    rows = {row[0]: row[1:4] for row in query(database, QUESTIONS["Which knob pays?"]).rows}
    assert rows == {"lr": (6, 1, 2), "d_model": (4, 1, 2), "n_head": (1, 0, 1)}


@pytest.mark.parametrize("name", ["pandas", "DuckDB"])
def test_python_reads_a_live_campaign(live: Path, name: str) -> None:
    pytest.importorskip(name.lower(), reason=f"{name} is not installed")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(PYTHON[name], {})
    assert "d_model" in printed.getvalue()
