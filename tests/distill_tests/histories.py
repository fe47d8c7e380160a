"""Histories written turn by turn, for tests: what a campaign stores, without running one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overnight.agent.campaign import Campaign
from overnight.agent.turns import prompt_frame
from overnight.distill.histories import Frame
from overnight.rails.menu import Change
from overnight.store.protocol import Measurement, NewAttempt, NewDecision, NewVerdict, StoreWriter
from overnight.store.records import Config, FailureClass, KnobValue, Outcome
from overnight.store.sql_store import SqlStore
from overnight.store.tables import utc_now

from ..agent_tests.campaigns import campaign

KNOBS: dict[str, Any] = {
    "a": {"type": "float", "range": [0.0, 1.0], "default": 0.5, "levels": 9},
    "b": {"type": "int", "choices": [1, 2, 3, 4, 9], "default": 1},
    "c": {"type": "str", "choices": ["x", "y", "z"], "default": "x"},
}


def small_campaign(folder: Path, **sections: Any) -> Campaign:
    """Return a campaign of three knobs; its sections may be changed."""
    return campaign(folder, knobs=KNOBS, trainer={"optimum": {"a": 0.25, "b": 3}}, **sections)


class Chronicle:
    """Writes decided turns of a rolling campaign."""

    def __init__(self, store: SqlStore, of: Campaign) -> None:
        self.store, self.of = store, of
        self.frame: Frame = prompt_frame(of)
        store.open_campaign(
            name=of.name,
            path=str(of.path),
            spec=of.spec(),
            frozen_hash=of.frozen_hash(),
            knobs_on_menu=len(of.menu.knobs),
        )
        state = store.campaign(of.name)
        assert state is not None
        self.id = state.id
        self.lease = store.acquire(state.id)
        self.baseline: Config = of.menu.default
        self.turns = 0
        self._writer: StoreWriter | None = None

    @contextmanager
    def together(self) -> Iterator[StoreWriter]:
        """Write what is in the block in one transaction: a disk is slow."""
        if self._writer is not None:
            yield self._writer
            return
        with self.store.writing(self.lease) as self._writer:
            yield self._writer
        self._writer = None

    @property
    def state(self) -> Any:
        return self.store.campaign(self.of.name)

    def turn(
        self,
        knob: str,
        value: KnobValue,
        gain: float | None = 0.0,
        *,
        outcome: Outcome = "reverted",
        failure: FailureClass | None = None,
        prompt: str | None = None,
        gain_se: float | None = 0.01,
        trials: int = 1,
        proposer: str = "random",
    ) -> int:
        """Write one turn; return its attempt's id."""
        self.turns += 1
        change = Change(knob, value)
        config = {**self.baseline, knob: value}
        with self.together() as writer:
            attempt_id = writer.attempt(
                NewAttempt(
                    iteration=self.turns,
                    try_no=1,
                    role="champion",
                    proposer_id=writer.proposer(proposer, proposer, {"kind": proposer}),
                    baseline_config_id=writer.config(self.baseline),
                    prompt=f"prompt of turn {self.turns}" if prompt is None else prompt,
                    reply="{}",
                    started_at=utc_now(),
                )
            )
            writer.verdict(
                NewVerdict(
                    attempt_id=attempt_id,
                    rail=None,
                    rail_reason="",
                    knob=change.knob,
                    new_value=change.value,
                    reason=f"why {knob} {value}",
                    config=config,
                    diff={knob: (self.baseline[knob], value)},
                )
            )
            writer.trained(attempt_id)
            writer.measurement(
                Measurement(
                    attempt_id=attempt_id,
                    metric=None if gain is None else 1.0 - gain,
                    metric_se=None,
                    baseline_metric=None if gain is None else 1.0,
                    gain=gain,
                    gain_se=None if gain is None else gain_se,
                    gain_lower=None,
                    trials=0 if gain is None else trials,
                    failure=failure,
                    trace="",
                    notes="",
                    wall_s=1.0,
                    energy_wh=None,
                )
            )
            decided: Outcome = "failed" if failure else outcome
            writer.decision(
                NewDecision(
                    attempt_id=attempt_id,
                    outcome=decided,
                    explanation="",
                    is_best=decided == "kept",
                    new_baseline_config_id=writer.config(config) if decided == "kept" else None,
                )
            )
        if decided == "kept":
            self.baseline = config
        return attempt_id

    def wander(self, turns: int, seed: int = 0) -> None:
        """Write turns of random legal changes with random gains; some are kept, some fail."""
        rng = random.Random(seed)
        with self.together():
            for _ in range(turns):
                move = rng.choice(list(self.of.menu.moves(self.baseline)))
                if rng.random() < 0.1:
                    self.turn(move.knob, move.value, None, failure="nan")
                else:
                    gain = rng.gauss(0.0, 0.05)
                    self.turn(move.knob, move.value, gain, outcome="kept" if gain > 0.08 else "reverted")
