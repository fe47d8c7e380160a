"""A history of 1,000,000 attempts: what the views and one more attempt cost, beside Optuna's own storage.

    python benchmarks/history.py --folder /some/disk            # all of it: about 10 minutes and 3 GB
    python benchmarks/history.py --attempts 20000 --print       # a quick look

Both databases are SQLite files with the same history: campaigns (studies) of 10,000 attempts (trials), two always at
work at once, so that a campaign's rows do not lie together. Rows are inserted in bulk; the one more attempt that is
timed goes through the stores' own doors, commits included. An attempt's prompt is left out of the bulk (no view reads
it). Writes `benchmarks/history.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overnight.store.hashing import JsonValue
from overnight.store.protocol import Measurement, NewAttempt, NewDecision, NewTrial, NewVerdict
from overnight.store.reading import query
from overnight.store.records import TrialResult
from overnight.store.sql_store import SqlStore
from overnight.store.tables import AttemptRow, ConfigRow, TrialRow, utc_now

KNOBS = {f"knob_{i:02}": [round(0.1 * (j + 1), 1) for j in range(9)] for i in range(13)}
BASE = {knob: values[4] for knob, values in KNOBS.items()}
PER_CAMPAIGN = 10_000
SPEC: dict[str, JsonValue] = {
    "campaign": {"seed": 0, "name": "c"},
    "metric": {"name": "val_bpb", "direction": "min", "gain": "relative"},
    "budget": {"iterations": PER_CAMPAIGN},
}
REASON = "a smaller value may leave more steps for what matters here"
REPEATS = 15


def attempts_of(campaigns: int, per_campaign: int) -> Iterator[tuple[int, int, str, float, float]]:
    """Yield (campaign, iteration, knob, value, gain); two campaigns are always at work at once."""
    rng = random.Random(0)
    knobs = list(KNOBS)
    for pair in range(0, campaigns, 2):
        for iteration in range(1, per_campaign + 1):
            for campaign in range(pair, min(pair + 2, campaigns)):
                knob = rng.choice(knobs)
                yield campaign, iteration, knob, rng.choice(KNOBS[knob]), rng.gauss(-0.002, 0.004)


def build_overnight(path: Path, campaigns: int, per_campaign: int) -> None:
    """Fill a store in bulk."""
    store = SqlStore.open(path, create=True)
    for number in range(campaigns):
        state = store.open_campaign(name=f"c{number:03}", path="/c", spec=SPEC, frozen_hash="f", knobs_on_menu=13)
        with store.writing(store.acquire(state.id)) as writer:
            writer.baseline(writer.config(BASE))
            for name in ("nim", "student", "random"):
                writer.proposer(name, "random", {"name": name})
    store.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    tables = [(AttemptRow, ATTEMPT_COLUMNS), (TrialRow, TRIAL_COLUMNS), (ConfigRow, ("id", "body"))]
    inserts = [_insert(row.__tablename__, columns) for row, columns in tables]
    batch: list[list[tuple[object, ...]]] = [[], [], []]
    for number, attempt in enumerate(attempts_of(campaigns, per_campaign), 1):
        for rows, new in zip(batch, _rows(number, attempt), strict=True):
            rows.extend(new)
        if number % 20_000 == 0:
            _flush(connection, inserts, batch)
    _flush(connection, inserts, batch)
    connection.executescript(TOTALS)
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


ATTEMPT_COLUMNS = (
    "id", "campaign_id", "iteration", "try", "stage", "role", "proposer_id", "reply", "settings", "knob", "new_value",
    "new_value_num", "reason", "baseline_config_id", "config_id", "diff", "outcome", "metric", "baseline_metric",
    "gain", "trials", "decision", "is_best", "proposal_latency_s", "wall_s", "energy_wh", "started_at", "decided_at",
)  # fmt: skip
TRIAL_COLUMNS = (
    "campaign_id", "attempt_id", "purpose", "config_id", "trainer_hash", "environment_hash", "split", "seed",
    "replicate", "mode", "metric", "metrics", "steps", "wall_s", "ended_at",
)  # fmt: skip
TOTALS = """
INSERT INTO pair_totals (campaign_id, knob, new_value, proposed, kept, reverted, blocked, failed, trials, mean_gain)
SELECT campaign_id, knob, new_value, count(*), sum(outcome = 'kept'), sum(outcome = 'reverted'), 0, 0, sum(trials),
    avg(gain) FROM attempts GROUP BY 1, 2, 3;
INSERT INTO knob_totals (campaign_id, knob, proposed, kept, blocked, distinct_values)
SELECT campaign_id, knob, sum(proposed), sum(kept), 0, count(*) FROM pair_totals GROUP BY 1, 2;
UPDATE campaigns SET best_attempt_id = (SELECT id FROM attempts WHERE campaign_id = campaigns.id AND outcome = 'kept'
    ORDER BY iteration DESC LIMIT 1), noise_sd = 0.004;
ANALYZE;
"""


def _insert(table: str, columns: tuple[str, ...]) -> str:
    names = ", ".join(f'"{column}"' for column in columns)
    return f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({', '.join('?' * len(columns))})"


def _flush(connection: sqlite3.Connection, inserts: list[str], batch: list[list[tuple[object, ...]]]) -> None:
    for statement, rows in zip(inserts, batch, strict=True):
        connection.executemany(statement, rows)
        rows.clear()
    connection.commit()


def _rows(
    number: int, attempt_of: tuple[int, int, str, float, float]
) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]], list[tuple[object, ...]]]:
    campaign, iteration, knob, value, gain = attempt_of
    body = json.dumps({**BASE, knob: value, "knob_00": iteration // 300})  # the baseline rolls on
    config_id, at = hashlib.sha256(body.encode()).hexdigest(), f"2026-01-01T{number % 24:02}:00:00.000+00:00"
    outcome, trials = ("kept" if gain > 0.006 else "reverted"), 1 + (gain > 0)
    reply = json.dumps({"knob": knob, "new_value": value, "reason": REASON})
    attempt = (
        number, campaign + 1, iteration, 1, "decided", "champion", campaign * 3 + 1 + number % 3, reply, "{}", knob,
        str(value), value, REASON, config_id, config_id, json.dumps({knob: [0.5, value]}), outcome, 1 - gain, 1.0,
        gain, trials, "one trial, gain below the smallest that is kept", outcome == "kept", 1.3, 88.0 * trials, 1.4,
        at, at,
    )  # fmt: skip
    runs: list[tuple[object, ...]] = [
        (
            campaign + 1, number, ("screening", "confirmation")[i], config_id, "t" * 64, "e" * 64, "val",
            number * 4 + i, 0, "eager", 1 - gain, '{"mean_step_ms": 1200.0, "params_m": 354.6}', 60, 88.0, at,
        )
        for i in range(trials)
    ]  # fmt: skip
    return [attempt], runs, [(config_id, body)]


def build_optuna(path: Path, campaigns: int, per_campaign: int) -> None:
    """Fill Optuna's own storage in bulk: a study a campaign; a trial holds the knob and value that it changes."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    for number in range(campaigns):
        optuna.create_study(study_name=f"c{number:03}", storage=storage)
    knobs = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": list(KNOBS)}})
    number_like = json.dumps(
        {"name": "FloatDistribution", "attributes": {"step": None, "low": 0.0, "high": 1.0, "log": False}}
    )
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    index = {knob: i for i, knob in enumerate(KNOBS)}
    at = "2026-01-01 00:00:00.000000"
    batch: list[list[tuple[object, ...]]] = [[], [], []]
    inserts = [
        "INSERT INTO trials (trial_id, number, study_id, state, datetime_start, datetime_complete) "
        f"VALUES (?, ?, ?, 'COMPLETE', '{at}', '{at}')",
        "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES (?, ?, ?, ?)",
        "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (?, 0, ?, 'FINITE')",
    ]
    for trial, (campaign, iteration, knob, value, gain) in enumerate(attempts_of(campaigns, per_campaign), 1):
        batch[0].append((trial, iteration - 1, campaign + 1))
        batch[1] += [(trial, "knob", index[knob], knobs), (trial, "new_value", value, number_like)]
        batch[2].append((trial, 1 - gain))
        if trial % 20_000 == 0:
            _flush(connection, inserts, batch)
    _flush(connection, inserts, batch)
    connection.execute("ANALYZE")
    connection.commit()
    connection.close()


def timed(work: Callable[[], object], repeats: int = REPEATS) -> tuple[float, float]:
    """Return the median and the worst of some runs in milliseconds, after one that warms the page cache."""
    work()
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        taken.append((time.perf_counter() - begin) * 1000)
    return statistics.median(taken), max(taken)


def measure_views(path: Path, campaign: str) -> dict[str, tuple[float, float]]:
    """Time each view for one campaign, the opening of the database included."""
    views = ("campaign_stats", "knob_stats", "proposer_stats", "pair_stats", "iterations")
    asked = {view: f"SELECT * FROM {view} WHERE campaign = '{campaign}'" for view in views}
    asked["iterations, best ten"] = asked["iterations"] + " ORDER BY gain DESC LIMIT 10"
    return {name: timed(lambda text=text: query(path, text)) for name, text in asked.items()}  # type: ignore[misc]


def one_more(store: SqlStore, campaign: str) -> tuple[Callable[[], int], Callable[[], None]]:
    """Return two functions: one writes a new attempt's row and prompt, one takes an attempt through all its stages.

    The second makes the five transactions that the loop makes, each of them on the disk before the next begins.
    """
    state = store.campaign(campaign)
    assert state is not None
    lease = store.acquire(state.id)
    last = store.last_attempt(state.id)
    assert last is not None
    at = [last.iteration]
    with store.writing(lease) as writer:
        base_id, proposer_id = writer.config(BASE), writer.proposer("nim", "random", {"name": "nim"})

    def propose() -> int:
        at[0] += 1
        with store.writing(lease) as writer:
            return writer.attempt(
                NewAttempt(
                    iteration=at[0], try_no=1, role="champion", proposer_id=proposer_id, baseline_config_id=base_id,
                    prompt=f"turn {at[0]} " + "x" * 6000, reply="{}", started_at=utc_now(),
                )
            )  # fmt: skip

    def record() -> None:
        attempt_id = propose()
        config = {**BASE, "knob_00": at[0]}
        with store.writing(lease) as writer:
            verdict = NewVerdict(
                attempt_id=attempt_id, rail=None, rail_reason="", knob="knob_00", new_value=at[0], reason=REASON,
                config=config, diff={"knob_00": (0.5, at[0])},
            )  # fmt: skip
            writer.verdict(verdict)
        with store.writing(lease) as writer:
            result = TrialResult(0.99, wall_s=88.0)
            writer.trial(
                NewTrial(
                    attempt_id=attempt_id, purpose="screening", config_id=writer.config(config), trainer_hash="t" * 64,
                    environment_hash="e" * 64, split="val", seed=1, replicate=0, result=result,
                )
            )  # fmt: skip
            writer.trained(attempt_id)
        with store.writing(lease) as writer:
            writer.measurement(
                Measurement(
                    attempt_id=attempt_id, metric=0.99, metric_se=None, baseline_metric=1.0, gain=0.01, gain_se=None,
                    gain_lower=None, trials=1, failure=None, trace="", notes="", wall_s=88.0, energy_wh=None,
                )
            )  # fmt: skip
        with store.writing(lease) as writer:
            writer.decision(
                NewDecision(
                    attempt_id=attempt_id, outcome="reverted", explanation="x", is_best=False,
                    new_baseline_config_id=None,
                )
            )  # fmt: skip

    return propose, record


def measure_overnight(path: Path, campaign: str) -> dict[str, tuple[float, float]]:
    """Time the views and one more attempt."""
    found = measure_views(path, campaign)
    store = SqlStore.open(path)
    propose, record = one_more(store, campaign)
    found["one more attempt, proposed to decided: five commits"] = timed(record, 100)
    found["one more attempt's row and prompt: one commit"] = timed(propose, 100)
    state = store.campaign(campaign)
    assert state is not None
    found["where to go on (`next_stage`)"] = timed(lambda: store.next_stage(state.id), 100)
    store.close()
    found["(this disk: 4 KiB written and synced, which a commit waits for)"] = timed(synced_write(path.parent), 100)
    return found


def synced_write(folder: Path) -> Callable[[], None]:
    """Return a function that writes 4 KiB to a new file and waits for the disk."""
    descriptor = os.open(folder / "history-sync", os.O_CREAT | os.O_WRONLY)

    def write() -> None:
        os.write(descriptor, bytes(4096))
        os.fdatasync(descriptor)

    return write


def measure_optuna(path: Path, campaign: str) -> dict[str, tuple[float, float]]:
    """Time the nearest equivalents: statistics are computed from all trials of the study, which is what it offers."""
    import optuna

    def load() -> list[Any]:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        return list(optuna.load_study(study_name=campaign, storage=storage).get_trials(deepcopy=False))

    def by_knob() -> dict[str, float]:
        gains: dict[str, list[float]] = {}
        for trial in load():
            gains.setdefault(trial.params["knob"], []).append(1 - trial.value)
        return {knob: statistics.fmean(values) for knob, values in gains.items()}

    found = {"all trials of a study, then a mean by knob": timed(by_knob, 3)}
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    study = optuna.load_study(study_name=campaign, storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))

    def record() -> None:
        trial = study.ask()
        trial.suggest_categorical("knob", list(KNOBS))
        trial.suggest_float("new_value", 0.0, 1.0)
        study.tell(trial, 0.99)

    found["one more trial (ask, two parameters, tell)"] = timed(record, 30)
    return found


def built(path: Path, build: Callable[[Path, int, int], None], campaigns: int, per_campaign: int) -> str:
    """Build a database anew and say how long it took and how large it is."""
    for file in path.parent.glob(path.name + "*"):
        file.unlink()
    begin = time.perf_counter()
    build(path, campaigns, per_campaign)
    return f"{sized(path)}, built in {time.perf_counter() - begin:.0f} s"


def sized(path: Path) -> str:
    """Say how large a database is."""
    return f"{path.stat().st_size / 2**20:,.0f} MiB"


def report(sections: dict[str, tuple[str, dict[str, tuple[float, float]]]], attempts: int, campaigns: int) -> str:
    """Return the results as Markdown."""
    lines = [
        "# A long history",
        "",
        f"`python benchmarks/history.py`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores of "
        f"{platform.machine()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}. "
        f"{attempts:,} attempts in {campaigns} campaigns; one campaign of {attempts // campaigns:,} is asked for. "
        "Milliseconds: median and worst.",
    ]
    for name, (size, figures) in sections.items():
        lines += ["", f"## {name}: {size}", "", "| what | median | worst |", "| --- | ---: | ---: |"]
        lines += [f"| {what} | {median:.1f} | {worst:.1f} |" for what, (median, worst) in figures.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the databases lie; they are left there")
    parser.add_argument("--reuse", action="store_true", help="measure the databases that an earlier run left there")
    parser.add_argument("--print", action="store_true", help="print instead of writing benchmarks/history.md")
    options = parser.parse_args()
    per_campaign = min(PER_CAMPAIGN, options.attempts)
    campaigns = max(1, options.attempts // per_campaign)
    asked = f"c{campaigns // 2:03}"
    sections = {}
    path = options.folder / "history-overnight.db"
    size = sized(path) if options.reuse else built(path, build_overnight, campaigns, per_campaign)
    sections["overnight"] = size, measure_overnight(path, asked)
    path = options.folder / "history-optuna.db"
    size = sized(path) if options.reuse else built(path, build_optuna, campaigns, per_campaign)
    sections["Optuna's RDBStorage"] = size, measure_optuna(path, asked)
    text = report(sections, campaigns * per_campaign, campaigns)
    print(text)
    if not options.print:
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
