"""Files of one JSON line a campaign, to which a run adds what is missing: a run that was stopped goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")


def stored(file: Path) -> list[dict[str, Any]]:
    """Return the campaigns of a file; none where there is no file yet."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file: Path, pool: Pool, measure: Callable[[Job], dict[str, Any]], jobs: Sequence[Job]) -> None:
    """Measure some campaigns and append them, each as soon as it is over, with progress to standard error."""
    started = time.monotonic()
    with file.open("a") as stream:
        for number, result in enumerate(pool.imap_unordered(measure, jobs), 1):
            stream.write(json.dumps(result, separators=(",", ":")) + "\n")
            stream.flush()
            left = (time.monotonic() - started) / number * (len(jobs) - number)
            said = f"\r{file.stem}: {number} of {len(jobs)} campaigns, {left:.0f} s left "
            print(said, end="", file=sys.stderr, flush=True)
    if jobs:
        print(file=sys.stderr)
