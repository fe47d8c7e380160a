"""What every trajectory store must do; one subclass an engine."""

from __future__ import annotations

import pytest
from sqlalchemy import text, update

from overnight.store.errors import LeaseHeldError, LeaseLostError
from overnight.store.hashing import digest
from overnight.store.prompt import information
from overnight.store.protocol import (
    CampaignState,
    Lease,
    Measurement,
    NewAttempt,
    NewDecision,
    NewTrial,
    NewVerdict,
)
from overnight.store.records import FailureClass, KnobValue, Outcome, Purpose, TrainerInfo, TrialResult
from overnight.store.sql_store import VALUES_PER_KNOB, SqlStore
from overnight.store.tables import CampaignRow, utc_now

SPEC = {
    "campaign": {"seed": 3},
    "metric": {"name": "loss", "direction": "min", "gain": "relative"},
    "budget": {"iterations": 9},
}
BASE = {"lr": 0.1, "width": 8}
ENVIRONMENT = "e" * 64
TRAINER = "t" * 64
LONG_AGO = "2026-01-01T00:00:00.000+00:00"


def result(metric: float | None, wall_s: float = 2.0) -> TrialResult:
    return TrialResult(metric, None if metric is not None else "nan", wall_s=wall_s, energy_j=3600.0)


class Campaigner:
    """Writes attempts stage by stage, as the nodes do."""

    def __init__(self, store: SqlStore, name: str = "c") -> None:
        self.store = store
        self.state = self.open(name)
        self.lease: Lease = store.acquire(self.state.id)
        with store.writing(self.lease) as writer:
            self.base_id = writer.config(BASE)
            writer.baseline(self.base_id)
            self.proposer_id = writer.proposer("random", "random", {"kind": "random"})

    def open(self, name: str, budget: int = 9) -> CampaignState:
        spec = {**SPEC, "budget": {"iterations": budget}}
        return self.store.open_campaign(name=name, path="/c", spec=spec, frozen_hash="f", knobs_on_menu=2)

    def propose(self, iteration: int, try_no: int = 1, *, audit: bool = False, failure: object = None) -> int:
        with self.store.writing(self.lease) as writer:
            return writer.attempt(
                NewAttempt(
                    iteration=iteration,
                    try_no=try_no,
                    role="champion",
                    proposer_id=self.proposer_id,
                    baseline_config_id=self.base_id,
                    prompt=f"prompt {iteration}",
                    audit=audit,
                    reply="{}",
                    failure=failure,  # type: ignore[arg-type]
                    started_at=utc_now(),
                )
            )

    def check(self, attempt_id: int, lr: KnobValue, rail: str | None = None) -> None:
        with self.store.writing(self.lease) as writer:
            writer.verdict(
                NewVerdict(
                    attempt_id=attempt_id,
                    rail=rail,
                    rail_reason="why" if rail else "",
                    knob="lr",
                    new_value=lr,
                    reason="because",
                    config=None if rail == "R3_range" else {**BASE, "lr": lr},
                    diff=None if rail == "R3_range" else {"lr": (0.1, lr)},
                )
            )

    def trial(
        self,
        attempt_id: int | None,
        lr: float,
        seed: int,
        metric: float | None,
        *,
        purpose: Purpose = "screening",
        replicate: int = 0,
    ) -> None:
        with self.store.writing(self.lease) as writer:
            writer.trial(
                NewTrial(
                    attempt_id=attempt_id,
                    purpose=purpose,
                    config_id=writer.config({**BASE, "lr": lr}),
                    trainer_hash=TRAINER,
                    environment_hash=ENVIRONMENT,
                    split="val",
                    seed=seed,
                    replicate=replicate,
                    result=result(metric),
                )
            )

    def finish(
        self, attempt_id: int, outcome: Outcome, gain: float | None, trials: int = 1, failure: FailureClass = "nan"
    ) -> None:
        with self.store.writing(self.lease) as writer:
            writer.trained(attempt_id)
            writer.measurement(
                Measurement(
                    attempt_id=attempt_id,
                    metric=None if gain is None else 1 - gain,
                    metric_se=None,
                    baseline_metric=1.0,
                    gain=gain,
                    gain_se=None,
                    gain_lower=None,
                    trials=trials,
                    failure=failure if outcome == "failed" else None,
                    trace="",
                    notes="",
                    wall_s=2.0,
                    energy_wh=None,
                )
            )
        with self.store.writing(self.lease) as writer:
            writer.decision(
                NewDecision(
                    attempt_id=attempt_id,
                    outcome=outcome,
                    explanation="x",
                    is_best=outcome == "kept",
                    new_baseline_config_id=None,
                )
            )

    def turn(
        self, iteration: int, lr: float, outcome: Outcome, gain: float | None, failure: FailureClass = "nan"
    ) -> int:
        attempt_id = self.propose(iteration)
        self.check(attempt_id, lr)
        self.trial(attempt_id, lr, 1, None if gain is None else 1 - gain)
        self.finish(attempt_id, outcome, gain, failure=failure)
        return attempt_id


class StoreConformance:
    """Subclass with a fixture `store` that gives an empty store."""

    @pytest.fixture
    def campaign(self, store: SqlStore) -> Campaigner:
        return Campaigner(store)

    def test_a_campaign_is_made_once(self, campaign: Campaigner) -> None:
        assert campaign.open("c").id == campaign.state.id

    def test_a_changed_file_is_recorded_as_an_event(self, campaign: Campaigner, store: SqlStore) -> None:
        campaign.open("c", budget=20)
        event = store.last_event(campaign.state.id, "file_changed")
        assert event is not None
        assert event[1] == {"changed": ["budget"]}

    def test_a_configuration_is_stored_once_under_its_hash(self, campaign: Campaigner, store: SqlStore) -> None:
        with store.writing(campaign.lease) as writer:
            assert writer.config(dict(reversed(BASE.items()))) == campaign.base_id == digest(BASE)
        assert store.config_of(campaign.base_id) == BASE

    def test_a_prompt_comes_back_byte_for_byte(self, campaign: Campaigner, store: SqlStore) -> None:
        attempt = store.attempt(campaign.propose(1))
        assert attempt.prompt_id is not None
        assert store.prompt_of(attempt.prompt_id) == "prompt 1"

    def test_position_follows_the_last_committed_stage(self, campaign: Campaigner, store: SqlStore) -> None:
        def stage() -> tuple[str, int, int]:
            position = store.next_stage(campaign.state.id)
            return position.stage, position.iteration, position.try_no

        seen = [stage()]
        attempt_id = campaign.propose(1)
        seen.append(stage())
        campaign.check(attempt_id, 0.2)
        seen.append(stage())
        with store.writing(campaign.lease) as writer:
            writer.trained(attempt_id)
        seen.append(stage())
        campaign.finish(attempt_id, "reverted", -0.1)
        seen.append(stage())
        assert seen == [
            ("propose", 1, 1), ("check_rails", 1, 1), ("train", 1, 1), ("validate", 1, 1), ("propose", 2, 1),
        ]  # fmt: skip

    def test_a_blocked_try_gives_the_turn_another_until_the_last(self, campaign: Campaigner, store: SqlStore) -> None:
        positions = []
        for try_no in (1, 2, 3, 4):
            campaign.check(campaign.propose(1, try_no), 5.0, rail="R3_range")
            position = store.next_stage(campaign.state.id)
            positions.append((position.iteration, position.try_no))
        assert positions == [(1, 2), (1, 3), (1, 4), (2, 1)]

    def test_a_proposer_that_failed_gives_the_turn_another_try(self, campaign: Campaigner, store: SqlStore) -> None:
        campaign.propose(1, failure="llm_timeout")
        assert (store.next_stage(campaign.state.id).iteration, store.next_stage(campaign.state.id).try_no) == (1, 2)

    def test_writing_a_stage_twice_writes_it_once(self, campaign: Campaigner, store: SqlStore) -> None:
        attempt_id = campaign.propose(1)
        assert campaign.propose(1) == attempt_id
        for _ in range(2):
            campaign.check(attempt_id, 0.2)
        for _ in range(2):
            campaign.trial(attempt_id, 0.2, 1, 0.9)
        for _ in range(2):
            campaign.finish(attempt_id, "kept", 0.1)
        total = store.knob_totals(campaign.state.id)[0].values[0]
        assert (total.proposed, total.kept, total.trials, len(store.trials_of_attempt(attempt_id))) == (1, 1, 1, 1)
        assert store.spent(campaign.state.id).trial_hours == pytest.approx(2 / 3600)

    def test_trials_are_read_on_the_seeds_asked_for(self, campaign: Campaigner, store: SqlStore) -> None:
        attempt_id = campaign.propose(1)
        campaign.check(attempt_id, 0.2)
        for seed in (1, 2, 3, 1_000_000_700):
            campaign.trial(attempt_id, 0.2, seed, 0.9)
        one = store.trials_of_attempt(attempt_id)[0]
        where = {"trainer_hash": one.trainer_hash, "environment_hash": one.environment_hash}
        found = store.trials_of(campaign.state.id, one.config_id, **where, seeds=range(2, 1_000_000_000))
        assert [trial.seed for trial in found] == [2, 3]

    def test_a_failure_has_no_metric(self, campaign: Campaigner, store: SqlStore) -> None:
        attempt = store.attempt(campaign.turn(1, 0.9, "failed", None))
        assert (attempt.metric, attempt.gain, attempt.failure) == (None, None, "nan")

    def test_only_what_the_rule_is_done_with_counts_as_earlier(self, campaign: Campaigner, store: SqlStore) -> None:
        reverted = campaign.turn(1, 0.2, "reverted", -0.1)
        blocked = campaign.propose(2)
        campaign.check(blocked, 0.3, rail="R7_capability")
        open_try = campaign.propose(2, 2)
        campaign.check(open_try, 0.4)
        ids = [digest({**BASE, "lr": lr}) for lr in (0.2, 0.3, 0.4, 0.5)]
        assert {key: attempt.id for key, attempt in store.earlier(campaign.state.id, ids).items()} == {ids[0]: reverted}

    def test_many_configurations_can_be_asked_for_at_once(self, campaign: Campaigner, store: SqlStore) -> None:
        assert store.earlier(campaign.state.id, [digest({"lr": i}) for i in range(40_000)]) == {}

    def test_pair_totals_add_up(self, campaign: Campaigner, store: SqlStore) -> None:
        campaign.turn(1, 0.2, "kept", 0.1)
        campaign.turn(2, 0.2, "reverted", -0.3)
        campaign.turn(3, 0.2, "failed", None)
        knob = store.knob_totals(campaign.state.id)[0]
        total = knob.values[0]
        assert (knob.knob, knob.proposed, knob.kept, knob.distinct_values) == ("lr", 3, 1, 1)
        assert (total.knob, total.new_value, total.proposed, total.kept, total.reverted, total.failed) == (
            "lr", "0.2", 3, 1, 1, 1,
        )  # fmt: skip
        assert (total.trials, total.mean_gain, total.failures) == (2, pytest.approx(-0.1), {"nan": 1})

    def test_failures_are_counted_by_class(self, campaign: Campaigner, store: SqlStore) -> None:
        failed: list[tuple[float, FailureClass]] = [(0.2, "oom"), (0.2, "nan"), (0.2, "oom"), (0.3, "nan")]
        for turn, (lr, failure) in enumerate(failed, 1):
            campaign.turn(turn, lr, "failed", None, failure=failure)
        (knob,) = store.knob_totals(campaign.state.id)
        assert knob.failures == {"oom": 2, "nan": 2}
        assert {total.new_value: total.failures for total in knob.values} == {
            "0.2": {"oom": 2, "nan": 1}, "0.3": {"nan": 1},
        }  # fmt: skip

    def test_a_blocked_proposal_is_counted_apart(self, campaign: Campaigner, store: SqlStore) -> None:
        campaign.check(campaign.propose(1), 0.3, rail="R7_capability")
        campaign.turn(2, 0.2, "reverted", -0.1)
        (knob,) = store.knob_totals(campaign.state.id)
        assert (knob.proposed, knob.blocked, knob.tried, knob.distinct_values) == (2, 1, 1, 2)

    def test_a_value_off_the_menu_has_no_totals(self, campaign: Campaigner, store: SqlStore) -> None:
        campaign.check(campaign.propose(1), 5.0, rail="R3_range")
        (knob,) = store.knob_totals(campaign.state.id)
        assert (knob.proposed, knob.blocked, knob.distinct_values, knob.values) == (1, 1, 0, [])

    def test_a_value_that_no_engine_holds_is_made_storable(self, campaign: Campaigner, store: SqlStore) -> None:
        attempt_id = campaign.propose(1)
        campaign.check(attempt_id, "a\0b\ud800", rail="R3_range")
        assert store.attempt(attempt_id).new_value == "a\ufffdb?"

    def test_the_most_informative_values_come_in_one_order(self, campaign: Campaigner, store: SqlStore) -> None:
        turns: list[tuple[float, Outcome, float | None]] = [
            (0.5, "reverted", 0.02), (0.3, "kept", 0.01), (0.2, "failed", None), (0.6, "reverted", -0.3),
            (0.4, "reverted", 0.02), (0.7, "reverted", 0.001), (0.7, "reverted", 0.001),
        ]  # fmt: skip
        for turn, told in enumerate(turns, 1):
            campaign.turn(turn, *told)
        (knob,) = store.knob_totals(campaign.state.id)
        assert [total.new_value for total in knob.values] == ["0.3", "0.7", "0.2", "0.6", "0.4", "0.5"]
        assert list(knob.values) == sorted(knob.values, key=information)

    def test_what_is_left_out_of_many_values_is_the_least_informative(
        self, campaign: Campaigner, store: SqlStore
    ) -> None:
        campaign.turn(1, 0.9, "failed", None)
        for turn in range(2, VALUES_PER_KNOB + 8):
            campaign.turn(turn, turn / 100, "reverted", turn / 1000)
        (knob,) = store.knob_totals(campaign.state.id)
        assert len(knob.values) == VALUES_PER_KNOB < knob.distinct_values
        assert (knob.values[0].new_value, knob.values[0].failures) == ("0.9", {"nan": 1})

    def test_recent_shows_the_last_try_of_each_turn_newest_first(self, campaign: Campaigner, store: SqlStore) -> None:
        campaign.turn(1, 0.2, "reverted", -0.1)
        campaign.check(campaign.propose(2, 1), 5.0, rail="R3_range")
        attempt_id = campaign.propose(2, 2)
        campaign.check(attempt_id, 0.3)
        campaign.finish(attempt_id, "reverted", -0.2)
        assert [(a.iteration, a.try_no) for a in store.recent(campaign.state.id, 5)] == [(2, 2), (1, 1)]

    def test_seed_spread_pools_within_configurations(self, campaign: Campaigner, store: SqlStore) -> None:
        for seed, metric in enumerate((1.0, 1.2, 1.4)):
            campaign.trial(None, 0.1, seed, metric, purpose="calibration")
        campaign.trial(None, 0.1, 0, 1.0, purpose="calibration", replicate=1)
        for seed, metric in enumerate((5.0, 5.2)):
            campaign.trial(None, 0.7, seed, metric, purpose="calibration")
        spread = store.seed_spread(campaign.state.id, trainer_hash=TRAINER, environment_hash=ENVIRONMENT)
        assert (spread.ss, spread.df) == (pytest.approx(0.08 + 0.02), 3)

    def test_recent_trials_are_the_newest_that_measured_something(self, campaign: Campaigner, store: SqlStore) -> None:
        for seed, metric in enumerate((1.0, 1.2, None, 1.4)):
            campaign.trial(None, 0.1, seed, metric, purpose="calibration")
        where = {"trainer_hash": TRAINER, "environment_hash": ENVIRONMENT}
        assert [trial.seed for trial in store.recent_trials(campaign.state.id, **where, count=2)] == [3, 1]

    def test_an_event_that_had_to_wait_keeps_its_own_time(self, campaign: Campaigner, store: SqlStore) -> None:
        with store.writing(campaign.lease) as writer:
            writer.event("late", {}, at=LONG_AGO)
        assert store.last_event(campaign.state.id, "late") == (LONG_AGO, {})

    def test_a_stale_writer_writes_nothing(self, campaign: Campaigner, store: SqlStore) -> None:
        with store.engine.begin() as connection:
            connection.execute(update(CampaignRow).values(lease_owner="elsewhere:1:1.0", lease_seen_at=LONG_AGO))
        campaign_id = campaign.state.id
        fresh = store.acquire(campaign_id)
        with pytest.raises(LeaseLostError, match="taken over"):
            campaign.propose(1)
        assert fresh.epoch == campaign.lease.epoch + 1
        assert store.last_attempt(campaign_id) is None

    def test_a_live_holder_keeps_its_lease(self, campaign: Campaigner, store: SqlStore) -> None:
        with store.engine.begin() as connection:
            connection.execute(update(CampaignRow).values(lease_owner="elsewhere:4711:1.0", lease_seen_at=utc_now()))
        with pytest.raises(LeaseHeldError, match="process 4711 on elsewhere since"):
            store.acquire(campaign.state.id)

    def test_a_released_lease_can_be_taken(self, campaign: Campaigner, store: SqlStore) -> None:
        store.release(campaign.lease)
        assert store.acquire(campaign.state.id).epoch == campaign.lease.epoch + 1

    def test_a_transaction_that_fails_leaves_nothing(self, campaign: Campaigner, store: SqlStore) -> None:
        def fail_half_way() -> None:
            with store.writing(campaign.lease) as writer:
                writer.event("x", {})
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail_half_way()
        assert store.last_event(campaign.state.id, "x") is None

    def test_a_request_waits_until_an_attempt_answers_it(self, campaign: Campaigner, store: SqlStore) -> None:
        event_id = store.request(campaign.state.id, "enqueued", {"knob": "lr", "new_value": 0.5, "reason": "me"})
        assert [pending[0] for pending in store.pending_requests(campaign.state.id)] == [event_id]
        with store.writing(campaign.lease) as writer:
            writer.attempt(
                NewAttempt(
                    iteration=1,
                    try_no=1,
                    role="request",
                    proposer_id=campaign.proposer_id,
                    baseline_config_id=campaign.base_id,
                    prompt="p",
                    request_event_id=event_id,
                    started_at=utc_now(),
                )
            )
        assert store.pending_requests(campaign.state.id) == []

    def test_a_pause_counts_until_the_next_run_starts(self, campaign: Campaigner, store: SqlStore) -> None:
        store.request(campaign.state.id, "pause_requested", {})
        asked = store.pause_requested(campaign.state.id)
        store.request(campaign.state.id, "run_started", {})
        assert (asked, store.pause_requested(campaign.state.id)) == (True, False)

    def test_text_that_no_engine_holds_is_made_storable(self, campaign: Campaigner, store: SqlStore) -> None:
        with store.writing(campaign.lease) as writer:
            attempt_id = writer.attempt(
                NewAttempt(
                    iteration=1,
                    try_no=1,
                    role="champion",
                    proposer_id=campaign.proposer_id,
                    baseline_config_id=campaign.base_id,
                    prompt="p",
                    reply="a\0b\ud800" + "x" * 100_000,
                    started_at=utc_now(),
                )
            )
        reply = store.attempt(attempt_id).reply
        assert reply is not None
        assert (reply[:4], len(reply)) == ("a\ufffdb?", 65_536)

    def test_energy_costs_what_the_campaign_file_says(self, campaign: Campaigner, store: SqlStore) -> None:
        query = text("SELECT energy_cost FROM campaign_stats")
        campaign.turn(1, 0.2, "kept", 0.1)
        with store.engine.connect() as connection:
            unknown = connection.execute(query).scalar()
        spec = {**SPEC, "budget": {"iterations": 9, "price_per_kwh": 0.5}}
        store.open_campaign(name="c", path="/c", spec=spec, frozen_hash="f", knobs_on_menu=2)
        with store.engine.connect() as connection:
            assert (unknown, connection.execute(query).scalar()) == (None, pytest.approx(0.001 * 0.5))

    def test_every_view_answers(self, campaign: Campaigner, store: SqlStore) -> None:
        campaign.trial(None, 0.1, 0, 1.0, purpose="calibration")
        campaign.turn(1, 0.2, "kept", 0.1)
        campaign.turn(2, 0.2, "reverted", -0.3)
        with store.writing(campaign.lease) as writer:
            writer.trainer(TrainerInfo("t", "loss", "d", {"device": "cpu"}, has_holdout=False), "exact", 0.1)
        with store.engine.connect() as connection:
            stats = connection.execute(text("SELECT * FROM campaign_stats")).mappings().one()
            iterations = connection.execute(text("SELECT iteration, knob, gain FROM iterations ORDER BY 1")).all()
            knobs = connection.execute(
                text("SELECT knob, value, value_num FROM config_knobs WHERE config_id = :id ORDER BY knob"),
                {"id": digest({**BASE, "lr": 0.2})},
            ).all()
        assert (stats["iterations"], stats["kept"], stats["repeats"], stats["knobs_touched"]) == (2, 1, 1, 1)
        assert (stats["calibration_trials"], stats["screening_trials"], stats["best_iteration"]) == (1, 1, 1)
        assert [tuple(row) for row in iterations] == [(1, "lr", 0.1), (2, "lr", -0.3)]
        assert [tuple(row) for row in knobs] == [("lr", "0.2", 0.2), ("width", "8", 8.0)]
