"""A person at a terminal is asked before a promotion, for a while; where nobody is, the campaign goes on."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import click
import pytest

from overnight.agent.cli import questions
from overnight.agent.cli.questions import person

QUESTION = {"challenger": "student@v2", "champion": "nim", "reason": "e-value 40 reaches 33"}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A terminal for standard input and output; gives the end that the person types at."""
    typed, ours = pty.openpty()
    with os.fdopen(ours, "r+b", buffering=0) as raw, open(os.dup(ours), closefd=True) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert raw.isatty()
        yield typed
    os.close(typed)


@pytest.mark.parametrize(("typed", "answer"), [("y", "yes"), ("no", "no"), ("hm", "later"), ("", "later")])
def test_what_is_typed_is_the_answer(terminal: int, typed: str, answer: str) -> None:
    os.write(terminal, f"{typed}\n".encode())
    assert person(nullcontext, patience_s=5.0)(QUESTION) == answer


def test_who_says_nothing_decides_later(terminal: int) -> None:
    assert person(nullcontext, patience_s=0.05)(QUESTION) == "later"


def test_the_lease_is_kept_while_a_person_thinks(terminal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[None] = []

    def beat() -> None:
        beats.append(None)
        if len(beats) == 3:
            os.write(terminal, b"y\n")

    monkeypatch.setattr(questions, "SLICE_S", 0.01)
    assert person(nullcontext, patience_s=30.0, idle=beat)(QUESTION) == "yes"
    assert len(beats) >= 3


def test_without_a_terminal_nobody_is_asked() -> None:
    assert person(nullcontext)(QUESTION) == "later"


def test_the_question_says_who_and_why(terminal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(click, "echo", lambda text="", **_: said.append(text))
    os.write(terminal, b"n\n")
    person(nullcontext, patience_s=5.0)(QUESTION)
    assert said[0] == "student@v2 may take over from nim: e-value 40 reaches 33"
