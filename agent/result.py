"""What `optimize` gives back: the best configuration, its gain with an interval, and ways to look closer.

Everything is read from the store, so that a result says what the report and SQL say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overnight.store.hashing import digest
from overnight.store.reading import QueryResult, query
from overnight.store.records import GainKind, KnobValue, gain_text

if TYPE_CHECKING:
    import pandas

    from overnight.agent.campaign import Campaign
    from overnight.store.sql_store import SqlStore


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a campaign ended, or where it paused."""

    campaign: str
    db: str
    """The database with all of its history; a temporary one is deleted with this result."""
    finished: bool
    """False: it was interrupted; the same call with this `db` goes on."""
    stop_reason: str
    """`iterations`, `menu_exhausted`, another budget, or `paused`."""
    iterations: int
    """Turns that are over."""
    kept: int
    best_config: Mapping[str, KnobValue]
    """The winner, or the baseline where nothing beat it."""
    best_value: float | None
    """Its mean over the trials behind the decision to keep it."""
    baseline_config: Mapping[str, KnobValue]
    baseline_value: float | None
    gain: float | None
    """Of the winner over the baseline, measured at the end on seeds that no decision used; None where nothing was kept,
    or before the end."""
    gain_interval: tuple[float, float] | None
    """Its 95% interval."""
    gain_kind: GainKind

    def __repr__(self) -> str:
        """Say the result in a few lines."""
        state = self.stop_reason if self.finished else "paused; call again with the same `db` to go on"
        lines = [f"{self.campaign}: {self.iterations} turns, {self.kept} kept ({state})"]
        if self.kept == 0:
            lines += ["no change beat the baseline beyond its noise", f"baseline: {_config(self.baseline_config)}"]
        else:
            changed = {k: v for k, v in self.best_config.items() if v != self.baseline_config[k]}
            lines.append(f"best: {_config(changed)}, {_number(self.best_value)} after {_number(self.baseline_value)}")
        if self.gain is not None and self.gain_interval is not None:
            low, high = (gain_text(end, self.gain_kind) for end in self.gain_interval)
            lines.append(f"gain: {gain_text(self.gain, self.gain_kind)} (95% interval {low} to {high}, fresh seeds)")
        return "\n".join(lines)

    def query(self, statement: str) -> QueryResult:
        """Ask the history one read-only SQL question; see `overnight.query`."""
        return query(self.db, statement)

    def to_frame(self) -> pandas.DataFrame:
        """Return one row a turn, as the view `iterations` has it, with the tried configuration as `config_<knob>`.

        Raises:
            InputError: pandas is not installed.
        """
        frame = self.query(f"SELECT * FROM iterations WHERE campaign = '{self.campaign}' ORDER BY iteration").to_frame()
        values: dict[tuple[str, str], KnobValue] = {
            (str(row["config_id"]), str(row["knob"])): _typed(row, self.baseline_config)
            for row in self.query(
                "SELECT config_id, knob, value, value_num FROM config_knobs WHERE config_id IN "
                f"(SELECT config_id FROM iterations WHERE campaign = '{self.campaign}')"
            )
        }
        for knob in self.baseline_config:
            frame[f"config_{knob}"] = [values.get((config_id, knob)) for config_id in frame["config_id"]]
        return frame

    def report(self, path: str | Path) -> Path:
        """Write the campaign's story as one HTML file that needs no network; return its path.

        Raises:
            StoreError: the file cannot be written.
        """
        from overnight.report.analysis import analyse
        from overnight.report.page import render_report, write_page
        from overnight.store.sql_store import SqlStore

        store = SqlStore.open(self.db)
        try:
            found = analyse(store, self.campaign)
        finally:
            store.close()
        return write_page(render_report(found), Path(path))


def read_result(store: SqlStore, campaign: Campaign, db: str) -> Result:
    """Read how the campaign stands."""
    state = store.campaign(campaign.name)
    assert state is not None
    best = None if state.best_attempt_id is None else store.attempt(state.best_attempt_id)
    baseline = campaign.menu.default
    stored = baseline if best is None or best.config_id is None else store.config_of(best.config_id)
    looked = store.last_event(state.id, "holdout_measured")
    gain, interval = None, None
    if looked is not None and best is not None and looked[1]["winner_attempt_id"] == best.id:
        gain, low, high = (float(str(looked[1][key])) for key in ("gain", "gain_low", "gain_high"))
        interval = (low, high)
    (value,) = query(
        db,
        "SELECT avg(metric) AS metric FROM trial_log WHERE split = 'val' AND "
        f"campaign = '{campaign.name}' AND config_id = '{digest(baseline)}'",
    ).rows[0]
    return Result(
        campaign=campaign.name,
        db=db,
        finished=state.status == "finished",
        stop_reason=state.stop_reason or "paused" if state.status == "finished" else "paused",
        iterations=store.spent(state.id).iterations,
        kept=sum(total.kept for total in store.knob_totals(state.id)),
        best_config={knob: stored[knob] for knob in baseline},
        best_value=None if best is None else best.metric,
        baseline_config=baseline,
        baseline_value=None if value is None else float(str(value)),
        gain=gain,
        gain_interval=interval,
        gain_kind=campaign.file.metric.gain,
    )


def _typed(row: Mapping[str, object], like: Mapping[str, KnobValue]) -> KnobValue:
    """Return a configuration's value in the knob's own type: the view has text, and a number where it is one."""
    model, number = like[str(row["knob"])], row["value_num"]
    if isinstance(model, str) or not isinstance(number, int | float):
        return str(row["value"])
    return int(number) if isinstance(model, int) else float(number)


def _config(config: Mapping[str, KnobValue]) -> str:
    return ", ".join(f"{knob} = {_number(value)}" for knob, value in config.items())


def _number(value: KnobValue | None) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "not measured" if value is None else str(value)
