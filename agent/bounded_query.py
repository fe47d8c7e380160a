"""One read-only query in a process of its own, its answer cut to what an agent's context bears.

The process is what makes the time limit hold: one call of `instr` in a huge text never looks at the clock, so it is
killed; and what a query took of memory goes back with it. The statement is judged by the authorizer of `overnight sql`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from overnight.store.errors import OvernightError, QueryError
from overnight.store.reading import limit_memory, query

MAX_CHARS = 40_000
"""Of an answer: about 10,000 tokens, above which coding agents warn or cut by themselves."""
MAX_CELL = 2_000
MAX_STATEMENT = 100_000
TIMEOUT_S = 10.0
START_S = 10.0
"""For the process to start and to end by itself, on a machine that is busy with a trial."""


def ask(db: str, statement: str, max_rows: int) -> dict[str, Any]:
    """Return `columns`, `rows` and `cut` (what was left out, or None) of one SELECT.

    Raises:
        QueryError: the statement is wrong, writes, is more than one, or ran too long.
    """
    if len(statement) > MAX_STATEMENT:
        raise QueryError(f"a statement of {len(statement):,} characters is too long; write a shorter one")
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "overnight.agent.bounded_query"],
            input=json.dumps({"db": db, "statement": statement, "max_rows": max_rows}).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S + START_S,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise QueryError(f"the query ran over {TIMEOUT_S:g} s and was ended; narrow it") from error
    except subprocess.CalledProcessError as error:
        raise QueryError(f"the process that asks ended with code {error.returncode}; narrow the query") from error
    answer: dict[str, Any] = json.loads(process.stdout)
    if "error" in answer:
        raise QueryError(answer["error"])
    return answer


def fit(columns: Sequence[str], rows: Sequence[Sequence[object]], cut: str | None) -> dict[str, Any]:
    """Return a table within the limits: long texts are cut where they stand, rows that do not fit are left out."""
    shown: list[list[object]] = []
    size = len(json.dumps(list(columns)))
    for row in rows:
        cells = [_cell(value) for value in row]
        size += len(json.dumps(cells, ensure_ascii=False, default=str))
        if size > MAX_CHARS:
            cut = f"{len(shown)} rows ({MAX_CHARS:,} characters); select fewer columns or rows"
            break
        shown.append(cells)
    return {"columns": list(columns), "rows": shown, "cut": cut}


def _cell(value: object) -> object:
    if isinstance(value, bytes):
        return f"(a blob of {len(value):,} bytes)"
    if isinstance(value, str):
        return shortened(value, MAX_CELL)
    return value


def shortened(text: str, limit: int) -> str:
    """Return a text, or its beginning and how long it is."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters in all)"


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    limit_memory()
    try:
        found = query(asked["db"], asked["statement"], timeout_s=TIMEOUT_S, max_rows=asked["max_rows"])
    except OvernightError as error:
        return {"error": str(error)}
    return fit(found.columns, found.rows, found.cut and f"{found.cut}; narrow the query, or raise `max_rows`")


if __name__ == "__main__":
    os.write(1, json.dumps(_answer(json.load(sys.stdin)), ensure_ascii=False, default=str).encode())
