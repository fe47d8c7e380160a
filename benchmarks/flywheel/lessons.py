"""What a student of the flywheel reads and learns: the project's own prompt, and rows from campaigns on other tasks.

    python -P benchmarks/flywheel/lessons.py OUT.jsonl --without python [--rows 6000] [--objective outcome]

Rows come from simulated campaigns on every task but those of one kind of text. Their policy mixes uniform draws with
knowing ones, so that states near the start and near the end of a campaign are both seen. Only what trials on those
other tasks measured reaches a row.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from numpy.typing import NDArray
from tasks import KINDS, TASKS
from world import SETTINGS, Campaign, Table, Turn, table

from overnight.distill.rows import Reply, TrainingRow, write_rows
from overnight.rails.menu import Change
from overnight.rails.reply import candidate_text, reply_text
from overnight.store.prompt import KnobFact, PromptFacts, render_prompt
from overnight.store.protocol import Attempt

RECENT = 5
"""Attempts that a prompt shows whole, as the product's default has it."""
SHARES = 16
"""Of a student's rows; each is drawn with a seed of its own."""
FIRST_CAMPAIGN = 10_000
"""Training campaigns have numbers from here on; measured ones have small numbers."""
AHEAD = 0.5
"""What the turn after counts beside this one: a change is also worth where it leads."""
CLEAR = 0.06
"""Gains that the decision rule misses: one of twice this is kept half the time."""
TEMPERATURE = 0.01
"""Of the targets. All three are in shares of what a middling configuration may gain."""


def prompt_of(campaign: Campaign) -> str:
    """Render the prompt of the campaign's next turn with the product's own renderer."""
    menu = campaign.table.menu
    recent = [_attempt(number, turn) for number, turn in enumerate(campaign.turns, 1) if turn.change][-RECENT:]
    return render_prompt(
        PromptFacts(
            metric="val_bpb",
            direction="min",
            gain="relative",
            min_gain=SETTINGS.min_gain,
            knobs=[KnobFact(knob.name, knob.describe(), knob.doc) for knob in menu.knobs],
            rules=[],
            brief=campaign.table.task.setting.about,
            config=campaign.baseline,
            baseline_metric=campaign.baseline_metric,
            turns=len(campaign.turns),
            totals=campaign.totals(),
            gain_sd=campaign.gain_sd,
            recent=recent[::-1],
            lineage=True,
        )
    )


def _attempt(number: int, turn: Turn) -> Attempt:
    assert turn.change is not None
    empty = dict.fromkeys(Attempt.__slots__)
    said = {
        "id": number,
        "iteration": number,
        "try_no": 1,
        "stage": "decided",
        "role": "champion",
        "audit": False,
        "proposer": "student",
        "knob": turn.change.knob,
        "new_value": json.dumps(turn.change.value),
        "outcome": turn.outcome,
        "gain": turn.gain,
        "metric": turn.metric,
        "trials": turn.trials,
    }
    return Attempt(**{**empty, **said})  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def worth(tab: Table) -> NDArray[np.float64]:
    """What is missing after each change of each configuration: now and, ever less important, in the turns after it.

    The action values (Watkins 1989) of a campaign that knows its table, discounted by `AHEAD` a turn: a change is kept
    if it clearly gains, and the best change follows. Greedy gains lead into configurations that no single change
    improves; these values lead past them.

    Returns:
        (configurations, changes), in the order of `Table.near`.
    """
    missing = (tab.truth - tab.best) / float(np.median(tab.truth) - tab.best)
    best, values = np.zeros(len(missing)), np.zeros(tab.near.shape)
    for row in np.argsort(missing):
        here, there = missing[row], missing[tab.near[row]]
        kept = np.where(there < here, 1 / (1 + np.exp(2 - (here - there) / CLEAR)), 0.0)
        gone = (1 - AHEAD) * there + AHEAD * best[tab.near[row]]
        stayed = (1 - AHEAD) * here
        again = (kept * gone + (1 - kept) * stayed) / (1 - (1 - kept) * AHEAD)  # proposed until it is kept
        best[row] = again.min()
        values[row] = kept * gone + (1 - kept) * (stayed + AHEAD * best[row])
    return values


def target(campaign: Campaign, moves: Sequence[Change]) -> list[float]:
    """The listwise target over the legal changes: exp(-worth / temperature), from the table's measured means."""
    tab = campaign.table
    row = tab.index_of(campaign.baseline)
    of = dict(zip(tab.near[row].tolist(), worth(tab)[row].tolist(), strict=True))
    found = [of[tab.index_of({**campaign.baseline, move.knob: move.value})] for move in moves]
    least = min(found)
    weights = [math.exp((least - value) / TEMPERATURE) for value in found]
    return [weight / sum(weights) for weight in weights]


def rows(without: str, count: int, objective: str, seed: int = 0) -> Iterator[TrainingRow]:
    """Yield training rows from campaigns on all tasks of other kinds of text.

    Args:
        without: the kind of text left out; "none": no kind is.
        count: rows.
        objective: `outcome`; `clone` imitates what the campaign's policy tried; `shuffled` is `outcome` with the
            outcomes of each task dealt out anew among its configurations.
        seed: of everything drawn; other seeds are other campaigns.
    """
    rng = random.Random(f"{seed}/{without}/{objective}")
    tasks = [task for task in TASKS if task.kind != without]
    made = 0
    number = FIRST_CAMPAIGN * (1 + seed)
    dealt = {task.name: _dealt(task.name) for task in tasks} if objective == "shuffled" else {}
    while made < count:
        number += 1
        tab = dealt.get(name := rng.choice(tasks).name) or table(name)
        campaign = Campaign(tab, number)
        knowing = rng.choice((0.0, 0.3, 0.6, 0.9))
        for turn in range(rng.choice((1, 4, 8, 16, 30))):
            moves = campaign.moves()
            if len(moves) < 2:
                break
            wanted = target(campaign, moves)
            chosen = rng.choices(moves, wanted)[0] if rng.random() < knowing else rng.choice(moves)
            if turn == 0 or rng.random() < 0.35:
                identity = f"{name}/{number}/{turn}"
                prompt, texts = prompt_of(campaign), tuple(candidate_text(move) for move in moves)
                if objective == "clone":
                    yield TrainingRow(
                        id=identity, prompt=prompt, replies=(Reply(reply_text(chosen.knob, chosen.value, "")),)
                    )
                else:
                    yield TrainingRow(id=identity, prompt=prompt, candidates=texts, choice=tuple(wanted))
                made += 1
                if made == count:
                    return
            campaign.play({**campaign.baseline, chosen.knob: chosen.value})


def taught(without: str, count: int, objective: str, processes: int) -> list[TrainingRow]:
    """Return about as many rows, made by several processes; how many makes no difference to them."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        shares = [(without, math.ceil(count / SHARES), objective, seed) for seed in range(SHARES)]
        return [row for share in pool.starmap(_share, shares) for row in share]


def _share(without: str, count: int, objective: str, seed: int) -> list[TrainingRow]:
    return list(rows(without, count, objective, seed))


def _dealt(name: str) -> Table:
    """A table whose outcomes belong to other configurations."""
    tab = Table(next(task for task in TASKS if task.name == name))
    order = np.random.default_rng(0).permutation(len(tab.truth))
    tab.truth, tab.field = tab.truth[order], tab.field[order]
    return tab


def main() -> None:
    """Write the rows of one student."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--without", choices=[*KINDS, "none"], required=True)
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--objective", choices=["outcome", "clone", "shuffled"], default="outcome")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    write_rows(taught(given.without, given.rows, given.objective, given.processes), given.out)


if __name__ == "__main__":
    main()
