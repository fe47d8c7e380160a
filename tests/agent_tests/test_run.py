"""A campaign runs turn by turn, decides on evidence, and ends with its budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overnight.agent import events
from overnight.agent.measure import stored_trials
from overnight.agent.proposers.protocol import Ask, reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.run import run_campaign
from overnight.agent.seeds import audit_seeds
from overnight.agent.signals import PauseSwitch
from overnight.store.errors import CampaignError, ProposerError, TrainerError
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

from .campaigns import Recorder, campaign, first_move, proposing, run, runtime, scripted


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def turns(store: SqlStore, name: str = "c") -> list[Any]:
    state = store.campaign(name)
    assert state is not None
    return list(reversed(store.recent(state.id, 1000)))


def test_proposers_that_lack_one_that_the_router_names_are_refused(tmp_path: Path, store: SqlStore) -> None:
    of = campaign(
        tmp_path, proposers={"other": {"kind": "random"}}, router={"champion": "random", "challenger": "other"}
    )
    with pytest.raises(CampaignError, match="`other`, which is not among the `proposers` given"):
        run(of, store, proposers=scripted())


def test_a_better_change_is_kept_and_becomes_the_baseline(tmp_path: Path, store: SqlStore) -> None:
    run(campaign(tmp_path, budget={"iterations": 2}), store, proposers=scripted(("b", 3), ("b", 9)))
    first, second = turns(store)
    assert (first.outcome, second.outcome) == ("kept", "reverted")
    assert second.baseline_config_id == first.config_id


def test_a_fixed_baseline_stays(tmp_path: Path, store: SqlStore) -> None:
    fixed = campaign(tmp_path, campaign={"baseline": "fixed"}, budget={"iterations": 2})
    run(fixed, store, proposers=scripted(("b", 3), ("b", 2)))
    first, second = turns(store)
    assert (first.outcome, second.outcome) == ("kept", "kept")
    assert second.baseline_config_id == first.baseline_config_id
    assert (first.is_best, second.is_best) == (True, False)


def test_a_kept_change_was_confirmed_on_paired_seeds(tmp_path: Path, store: SqlStore) -> None:
    run(campaign(tmp_path, budget={"iterations": 1}), store, proposers=scripted(("b", 3)))
    (attempt,) = turns(store)
    trials = store.trials_of_attempt(attempt.id)
    assert [trial.purpose for trial in trials] == ["screening"] + ["confirmation"] * 4
    assert sorted(trial.seed for trial in trials if trial.seed is not None) == [7000, 7001, 7002, 7003, 7004]
    assert attempt.gain_lower is not None
    assert attempt.gain_lower > 0


def test_baseline_trials_are_never_repeated(tmp_path: Path, store: SqlStore) -> None:
    trainer = ScriptedTrainer(ScriptedSettings(optimum={"b": 3}, noise_sd=0.01))
    run(campaign(tmp_path), store, trainer=trainer, proposers=proposing(first_move))
    keys = [(tuple(sorted(r.config.items())), r.seed, r.split) for r in trainer.requests]
    assert len(keys) - len(set(keys)) == 1  # the calibration runs one seed twice


def test_single_shot_decides_on_one_run(tmp_path: Path, store: SqlStore) -> None:
    old = campaign(tmp_path, decision={"rule": "single_shot", "calibration_trials": 1}, budget={"iterations": 1})
    run(old, store, proposers=scripted(("b", 3)))
    (attempt,) = turns(store)
    assert (attempt.outcome, attempt.trials) == ("kept", 1)


def test_a_larger_metric_can_be_better(tmp_path: Path, store: SqlStore) -> None:
    up = campaign(
        tmp_path,
        metric={"name": "score", "direction": "max", "gain": "absolute"},
        trainer={"higher_is_better": True},
        budget={"iterations": 1},
    )
    run(up, store, proposers=scripted(("b", 3)))
    assert turns(store)[0].outcome == "kept"


def test_an_audited_turn_measures_both_sides_on_the_audit_seeds(tmp_path: Path, store: SqlStore) -> None:
    run(campaign(tmp_path, decision={"audit": 1.0}, budget={"iterations": 1}), store, proposers=scripted(("b", 9)))
    (attempt,) = turns(store)
    audits = [trial for trial in store.trials_of_attempt(attempt.id) if trial.purpose == "audit"]
    assert sorted(trial.seed for trial in audits if trial.seed is not None) == sorted(
        [*audit_seeds(1), *audit_seeds(1)]
    )
    state = store.campaign("c")
    assert state is not None
    assert state.trainer_hash is not None
    assert state.environment_hash is not None
    where = {"trainer_hash": state.trainer_hash, "environment_hash": state.environment_hash}
    spreads = store.audit_spreads(state.id, **where)
    assert {of: spread.df for of, spread in spreads.items()} == {attempt.id: 4}
    assert not store.audit_spreads(state.id, **where, since=attempt.id)


def test_every_audit_measures_the_baseline_anew_and_changes_no_decision(tmp_path: Path, store: SqlStore) -> None:
    answers = [("b", 9), ("b", 8)]
    for name, share in (("c", 1.0), ("plain", 0.0)):
        options = {"campaign": {"name": name}, "decision": {"audit": share}, "budget": {"iterations": 2}}
        run(campaign(tmp_path, **options), store, proposers=scripted(*answers))
    audited, plain = turns(store, "c"), turns(store, "plain")
    assert [(a.outcome, a.gain, a.trials) for a in audited] == [(a.outcome, a.gain, a.trials) for a in plain]
    trials = [t for a in audited for t in store.trials_of_attempt(a.id) if t.purpose == "audit"]
    assert sorted(t.seed for t in trials if t.seed) == sorted(2 * [*audit_seeds(1), *audit_seeds(2)])


def test_a_decision_loads_no_audit_of_its_baseline(tmp_path: Path, store: SqlStore) -> None:
    of = campaign(tmp_path, decision={"audit": 1.0}, budget={"iterations": 3})
    running = runtime(of, store, proposers=scripted(("b", 9), ("b", 4), ("a", 1.0)))
    run_campaign(running)
    state = running.state()
    assert state.baseline_config_id is not None
    loaded = stored_trials(running, state, state.baseline_config_id)
    running.close()
    assert loaded
    assert "audit" not in {trial.purpose for trial in loaded}


def test_a_blocked_proposal_is_told_why_and_tried_again(tmp_path: Path, store: SqlStore) -> None:
    proposers = scripted("raise the rate", ("a", 7.0), ("b", 3))
    run(campaign(tmp_path, budget={"iterations": 1}), store, proposers=proposers)
    state = store.campaign("c")
    assert state is not None
    tries = store.attempts_of_turn(state.id, 1)
    assert [attempt.rail for attempt in tries] == ["R1_schema", "R3_range", None]
    assert [rejection.rail for rejection in proposers["random"].asks[-1].rejections] == ["R1_schema", "R3_range"]


def test_three_blocked_tries_end_in_a_labelled_fallback(tmp_path: Path, store: SqlStore) -> None:
    run(campaign(tmp_path, budget={"iterations": 1}), store, proposers=scripted("no"))
    state = store.campaign("c")
    assert state is not None
    tries = store.attempts_of_turn(state.id, 1)
    assert [(attempt.role, attempt.outcome) for attempt in tries][:3] == [("champion", "blocked")] * 3
    assert tries[3].role == "fallback"
    assert tries[3].outcome in ("kept", "reverted")


def test_a_proposer_that_does_not_answer_costs_no_turn(tmp_path: Path, store: SqlStore) -> None:
    late = ProposerError("the endpoint did not answer in 5 s", failure="llm_timeout")

    def reply(_ask: Ask) -> str:
        raise late

    run(campaign(tmp_path, budget={"iterations": 3}), store, proposers=proposing(reply))
    state = store.campaign("c")
    assert state is not None
    first, second = store.attempts_of_turn(state.id, 2)
    assert (first.outcome, first.failure, first.metric) == ("failed", "llm_timeout", None)
    assert (second.role, second.iteration) == ("fallback", 2)
    assert store.spent(state.id).iterations == 3


@pytest.mark.parametrize("failure", ["oom", "nan", "crash", "timeout"])
def test_a_failed_trial_fails_the_attempt_and_the_campaign_goes_on(
    tmp_path: Path, store: SqlStore, failure: str
) -> None:
    faulty = campaign(tmp_path, trainer={"faults": {"b=9": failure}}, budget={"iterations": 2})
    run(faulty, store, proposers=scripted(("b", 9), ("b", 3)))
    first, second = turns(store)
    assert (first.outcome, first.failure, first.metric, first.gain) == ("failed", failure, None, None)
    assert second.outcome == "kept"


def test_a_harness_failure_is_retried_once(tmp_path: Path, store: SqlStore) -> None:
    faulty = campaign(tmp_path, trainer={"faults": {"b=9": "harness"}}, budget={"iterations": 1})
    run(faulty, store, proposers=scripted(("b", 9)))
    (attempt,) = turns(store)
    assert (attempt.failure, len(store.trials_of_attempt(attempt.id))) == ("harness", 2)


def test_what_the_rule_is_done_with_is_blocked_with_its_result(tmp_path: Path, store: SqlStore) -> None:
    run(campaign(tmp_path, budget={"iterations": 2}), store, proposers=scripted(("b", 9), ("b", 9), ("b", 9), ("b", 3)))
    state = store.campaign("c")
    assert state is not None
    again = store.attempts_of_turn(state.id, 2)[0]
    assert again.rail == "R6_novelty"
    assert again.rail_reason is not None
    assert "turn 1" in again.rail_reason


def test_every_turn_stores_its_prompt(tmp_path: Path, store: SqlStore) -> None:
    proposers = scripted(("b", 9), ("b", 3))
    run(campaign(tmp_path, budget={"iterations": 2}), store, proposers=proposers)
    prompts = [store.prompt_of(attempt.prompt_id) for attempt in turns(store)]
    assert prompts == [ask.prompt for ask in proposers["random"].asks]
    assert "turn 1: b = 9: reverted" in prompts[1]


def test_warm_up_touches_each_knob_before_the_champion(tmp_path: Path, store: SqlStore) -> None:
    warm = campaign(tmp_path, router={"warmup": True}, budget={"iterations": 4})
    run(warm, store)
    assert sorted(attempt.knob for attempt in turns(store)[:2]) == ["a", "b"]
    assert [attempt.role for attempt in turns(store)] == ["warmup", "warmup", "champion", "champion"]


def test_exploring_turns_go_to_the_least_tried_knob(tmp_path: Path, store: SqlStore) -> None:
    wide = {"a": {"type": "float", "range": [0.0, 1.0], "default": 0.75, "levels": 40}}
    explore = campaign(tmp_path, router={"explore": 1.0}, budget={"iterations": 4}, knobs=wide)
    run(explore, store)
    tried = [attempt.knob for attempt in turns(store)]
    assert (tried.count("a"), tried.count("b")) == (2, 2)


def test_an_exhausted_menu_is_refined_once_and_then_ends_the_campaign(tmp_path: Path, store: SqlStore) -> None:
    recorder = Recorder()
    result = run(
        campaign(tmp_path, budget={"iterations": 500}, campaign={"baseline": "fixed"}),
        store,
        proposers=proposing(first_move),
        hooks=[recorder],
    )
    assert result.stop_reason == "menu_exhausted"
    assert len(recorder.of(events.GridRefined)) == 1
    assert len(turns(store)) == 8 + 4  # nine points of `a` and five of `b`, less the defaults


def test_a_person_may_ask_for_what_no_grid_has_once_the_grid_is_exhausted(tmp_path: Path, store: SqlStore) -> None:
    class AsksAtTheEnd(Recorder):
        def on_event(self, event: events.Event) -> None:
            super().on_event(event)
            if len(self.of(events.Decided)) == 12 and isinstance(event, events.Decided):
                store.request(running.state().id, "enqueued", {"knob": "a", "new_value": 0.333, "reason": "me"})

    of = campaign(tmp_path, budget={"iterations": 500}, campaign={"baseline": "fixed"})
    running = runtime(of, store, proposers=proposing(first_move), hooks=[AsksAtTheEnd()])
    run_campaign(running)
    running.close()
    (asked,) = turns(store)[12:]
    assert (asked.role, asked.outcome in ("kept", "reverted")) == ("request", True)


@pytest.mark.parametrize("reply", ['"\\ud800"', '"\\u0000"'])
def test_a_value_that_no_store_can_hold_is_blocked_and_the_campaign_goes_on(
    tmp_path: Path, store: SqlStore, reply: str
) -> None:
    replies = [f'{{"knob": "a", "new_value": {reply}, "reason": "x"}}', reply_text("b", 3, "why")]
    hostile = ScriptedProposer("random", replies)
    run(campaign(tmp_path, budget={"iterations": 1}), store, proposers={"random": hostile})
    state = store.campaign("c")
    assert state is not None
    assert [attempt.rail for attempt in store.attempts_of_turn(state.id, 1)] == ["R1_schema", None]


def test_no_turn_of_an_unseeded_trainer_is_audited(
    tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overnight.agent.calibrate.classify", lambda _pairs, _metrics: "unseeded")  # chance may miss it
    unseeded = {"seed_sd": 0.0, "noise_sd": 0.02, "unseeded": True}
    run(campaign(tmp_path, trainer=unseeded, decision={"audit": 1.0}, budget={"iterations": 2}), store)
    state = store.campaign("c")
    assert state is not None
    assert state.trainer_kind == "unseeded"
    assert not any(trial.purpose == "audit" for a in turns(store) for trial in store.trials_of_attempt(a.id))


def test_a_campaign_with_the_same_seed_repeats_itself(tmp_path: Path, store: SqlStore) -> None:
    other = SqlStore.open(tmp_path / "other.db", create=True)
    for memory in (store, other):
        run(campaign(tmp_path, router={"explore": 0.3}), memory)
    first, second = ([(a.knob, a.new_value, a.outcome, a.gain) for a in turns(memory)] for memory in (store, other))
    other.close()
    assert first == second


@pytest.mark.parametrize(
    ("budget", "reason"),
    [({"iterations": 3}, "iterations"), ({"iterations": 50, "patience": 2}, "patience"),
     ({"iterations": 50, "gpu_hours": 1e-9}, "gpu_hours")],
)  # fmt: skip
def test_whichever_budget_ends_first_ends_the_campaign(
    tmp_path: Path, store: SqlStore, budget: dict[str, Any], reason: str
) -> None:
    assert run(campaign(tmp_path, budget=budget), store).stop_reason == reason


def test_the_clock_ends_the_campaign(tmp_path: Path, store: SqlStore) -> None:
    running = runtime(campaign(tmp_path), store)
    running.clock, running.deadline = lambda: 100.0, 99.0
    assert run_campaign(running).stop_reason == "until"


def test_turns_asked_for_in_a_run_pause_and_leave_the_holdout_locked(tmp_path: Path, store: SqlStore) -> None:
    running = runtime(campaign(tmp_path), store)
    running.iterations = 2
    assert run_campaign(running).stop_reason == "paused"
    state = store.campaign("c")
    assert state is not None
    assert (state.status, store.last_event(state.id, "holdout_measured")) == ("paused", None)
    assert run(campaign(tmp_path), store).stop_reason == "iterations"


def test_the_holdout_is_measured_once_on_fresh_seeds(tmp_path: Path, store: SqlStore) -> None:
    trainer = ScriptedTrainer(ScriptedSettings(optimum={"a": 0.25, "b": 3}, noise_sd=0.01), metric="loss")
    run(campaign(tmp_path, budget={"iterations": 1}), store, trainer=trainer, proposers=scripted(("b", 3)))
    state = store.campaign("c")
    assert state is not None
    looked = store.last_event(state.id, "holdout_measured")
    assert looked is not None
    seen = {request.seed for request in trainer.requests if request.split == "val"}
    held = {request.seed for request in trainer.requests if request.split == "holdout"}
    assert (len(held), held & seen) == (5, set())
    assert float(str(looked[1]["gain_low"])) > 0


def test_a_second_look_at_the_holdout_is_refused(tmp_path: Path, store: SqlStore) -> None:
    recorder = Recorder()
    run(campaign(tmp_path, budget={"iterations": 1}), store, proposers=scripted(("b", 3)))
    run(campaign(tmp_path, budget={"iterations": 2}), store, proposers=scripted(("b", 9)), hooks=[recorder])
    (skipped,) = recorder.of(events.HoldoutSkipped)
    assert "second look is refused" in skipped.reason


@pytest.mark.parametrize(
    ("sections", "why"), [({"trainer": {"holdout": False}}, "no holdout"), ({"budget": {"iterations": 1}}, "nothing")]
)
def test_a_holdout_that_cannot_be_measured_is_said(
    tmp_path: Path, store: SqlStore, sections: dict[str, Any], why: str
) -> None:
    recorder = Recorder()
    replies = scripted(("b", 3)) if "trainer" in sections else scripted(("b", 9))
    limited = {"budget": {"iterations": 1}, **sections}
    run(campaign(tmp_path, **limited), store, proposers=replies, hooks=[recorder])
    assert why in recorder.of(events.HoldoutSkipped)[0].reason


def test_a_gain_that_cannot_be_resolved_is_refused_with_the_remedy(tmp_path: Path, store: SqlStore) -> None:
    with pytest.raises(CampaignError, match=r"`min_gain` = 1e-06.*set `min_gain` to"):
        run(campaign(tmp_path, decision={"min_gain": 1e-6}), store)


def test_a_baseline_that_fails_is_refused_with_the_remedy(tmp_path: Path, store: SqlStore) -> None:
    with pytest.raises(CampaignError, match=r"baseline failed \(oom\).*smaller defaults"):
        run(campaign(tmp_path, trainer={"faults": {"b=1": "oom"}}), store)


def test_a_harness_that_fails_on_the_baseline_is_a_fault_outside(tmp_path: Path, store: SqlStore) -> None:
    with pytest.raises(TrainerError, match="harness"):
        run(campaign(tmp_path, trainer={"faults": {"b=1": "harness"}}), store)


# One repeat cannot always tell an unseeded trainer from a noisy one (`classify` says so): both are not exact.
@pytest.mark.parametrize(("options", "kinds"), [({}, {"exact"}), ({"unseeded": True}, {"unseeded", "noisy"})])
def test_calibration_tells_whether_a_seed_repeats(
    tmp_path: Path, store: SqlStore, options: dict[str, Any], kinds: set[str]
) -> None:
    recorder = Recorder()
    run(campaign(tmp_path, trainer=options, budget={"iterations": 1}), store, hooks=[recorder])
    assert recorder.of(events.Calibrated)[0].trainer_kind in kinds


def test_a_changed_frozen_key_is_refused_by_name(tmp_path: Path, store: SqlStore) -> None:
    run(campaign(tmp_path, budget={"iterations": 1}), store)
    with pytest.raises(CampaignError, match="`decision` changed since"):
        run(campaign(tmp_path, decision={"alpha": 0.02}), store)


def test_another_environment_is_calibrated_anew(tmp_path: Path, store: SqlStore) -> None:
    class Moved(ScriptedTrainer):
        def prepare(self) -> Any:
            return replace(super().prepare(), environment={"device": "another"})

    of = campaign(tmp_path, budget={"iterations": 1})
    settings = ScriptedSettings.model_validate(of.file.trainer)
    run(of, store, proposers=scripted(("b", 3)))
    recorder = Recorder()
    longer = campaign(tmp_path, budget={"iterations": 2})
    moved = Moved(settings, metric="loss")
    run(longer, store, trainer=moved, proposers=scripted(("b", 9)), hooks=[recorder])
    assert recorder.of(events.EnvironmentChanged)[0].changed == ["device"]
    assert sum(request.split == "val" and request.config["b"] == 3 for request in moved.requests) == 6


def test_a_request_is_proposed_next_under_the_same_rails(tmp_path: Path, store: SqlStore) -> None:
    running = runtime(campaign(tmp_path, budget={"iterations": 1}), store, proposers=scripted(("b", 9)))
    store.request(running.state().id, "enqueued", {"knob": "b", "new_value": 3, "reason": "me"})
    run_campaign(running)
    (attempt,) = turns(store)
    assert (attempt.role, attempt.new_value, attempt.reason) == ("request", "3", "me")
    with store.engine.connect() as connection:
        assert not list(connection.exec_driver_sql("SELECT * FROM proposer_stats")), "it is nobody's own proposal"


def test_a_request_that_is_blocked_leaves_the_turn_to_the_champion(tmp_path: Path, store: SqlStore) -> None:
    running = runtime(campaign(tmp_path, budget={"iterations": 1}), store, proposers=scripted(("b", 9)))
    store.request(running.state().id, "enqueued", {"knob": "b", "new_value": 99, "reason": "me"})
    run_campaign(running)
    state = store.campaign("c")
    assert state is not None
    assert [(a.role, a.rail) for a in store.attempts_of_turn(state.id, 1)] == [
        ("request", "R3_range"),
        ("champion", None),
    ]


def test_a_pause_between_trials_goes_on_with_the_same_candidate(tmp_path: Path, store: SqlStore) -> None:
    of, switch = campaign(tmp_path, budget={"iterations": 1}), PauseSwitch()

    class Pausing(Recorder):
        def on_event(self, event: events.Event) -> None:
            if isinstance(event, events.TrialFinished) and event.purpose == "screening":
                switch.reason = "SIGTERM"

    running = runtime(of, store, proposers=scripted(("b", 3)), hooks=[Pausing()])
    paused = run_campaign(running, switch=switch)
    running.close()
    state = store.campaign("c")
    assert state is not None
    position = store.next_stage(state.id)
    assert (paused.finished, position.stage, state.stop_reason) == (False, "train", "SIGTERM")
    run(of, store, proposers=scripted(("b", 9)))
    (attempt,) = turns(store)
    assert (attempt.new_value, attempt.outcome, attempt.trials) == ("3", "kept", 5)


def test_a_hook_that_raises_stops_nothing(tmp_path: Path, store: SqlStore) -> None:
    class Broken:
        def on_event(self, event: events.Event) -> None:
            raise RuntimeError("broken hook")

    assert run(campaign(tmp_path), store, hooks=[Broken()]).finished


def test_no_configuration_is_measured_again_over_a_long_campaign(tmp_path: Path, store: SqlStore) -> None:
    long = campaign(
        tmp_path,
        budget={"iterations": 120},
        knobs={f"k{i}": {"type": "float", "range": [0.0, 1.0], "default": 0.5, "levels": 20} for i in range(4)},
        router={"warmup": True, "explore": 0.2},
        trainer={"optimum": {"a": 0.5, "k1": 0.1}},
    )
    run(long, store)
    measured = [attempt.config_id for attempt in turns(store)]
    assert len(measured) == len(set(measured)) == 120


def test_what_this_machine_cannot_run_is_blocked_before_a_trial(tmp_path: Path, store: SqlStore) -> None:
    lacking = campaign(tmp_path, trainer={"faults": {"b=9": "unsupported"}}, budget={"iterations": 1})
    run(lacking, store, proposers=scripted(("b", 9), ("b", 3)))
    state = store.campaign("c")
    assert state is not None
    assert [attempt.rail for attempt in store.attempts_of_turn(state.id, 1)] == ["R7_capability", None]


def test_a_broken_checkpoint_file_stops_nothing(tmp_path: Path, store: SqlStore) -> None:
    broken = tmp_path / "checkpoints"
    broken.write_text("no database")
    running = runtime(campaign(tmp_path, budget={"iterations": 2}), store)
    try:
        assert run_campaign(running, checkpoints=broken).finished
    finally:
        running.close()


def test_a_baseline_that_failed_once_is_measured_again_at_the_next_run(tmp_path: Path, store: SqlStore) -> None:
    of = campaign(tmp_path, budget={"iterations": 1})
    settings = ScriptedSettings.model_validate(of.file.trainer)

    class FailsFirst(ScriptedTrainer):
        def run(self, request: Any, report: Any) -> Any:
            result = super().run(request, report)
            return replace(result, metric=None, failure="timeout") if len(self.requests) == 1 else result

    with pytest.raises(CampaignError, match="timeout"):
        run(of, store, trainer=FailsFirst(settings, metric="loss"))
    run(of, store, proposers=scripted(("b", 3)))
    assert turns(store)[0].outcome == "kept"


def test_a_refused_start_can_be_mended_in_the_file(tmp_path: Path, store: SqlStore) -> None:
    with pytest.raises(CampaignError, match="set `min_gain` to"):
        run(campaign(tmp_path, decision={"min_gain": 1e-6}), store)
    assert run(campaign(tmp_path, decision={"min_gain": 0.05}), store).finished


def test_trials_of_another_environment_are_not_paired(tmp_path: Path, store: SqlStore) -> None:
    of = campaign(tmp_path, budget={"iterations": 1})
    settings = ScriptedSettings.model_validate(of.file.trainer)
    switch = PauseSwitch()

    class Pausing(Recorder):
        def on_event(self, event: events.Event) -> None:
            if isinstance(event, events.TrialFinished) and event.purpose == "screening":
                switch.reason = "SIGTERM"

    class Moved(ScriptedTrainer):
        def prepare(self) -> Any:
            return replace(super().prepare(), environment={"device": "another"})

        def run(self, request: Any, report: Any) -> Any:
            result = super().run(request, report)
            return replace(result, metric=(result.metric or 0.0) + 1.0)

    running = runtime(of, store, proposers=scripted(("b", 3)), hooks=[Pausing()])
    run_campaign(running, switch=switch)
    running.close()
    run(of, store, trainer=Moved(settings, metric="loss"))
    (attempt,) = turns(store)
    assert (attempt.outcome, attempt.trials) == ("kept", 5)
    assert attempt.metric is not None
    assert attempt.metric > 1.9


def test_a_knob_without_an_open_move_does_not_hold_up_the_champion(tmp_path: Path, store: SqlStore) -> None:
    pinned = campaign(
        tmp_path, router={"warmup": True}, trainer={"faults": {f"b={b}": "unsupported" for b in (2, 3, 4, 9)}}
    )
    run(pinned, store)
    assert {attempt.role for attempt in turns(store)[1:]} == {"champion"}


def test_asking_for_turns_that_are_done_pauses(tmp_path: Path, store: SqlStore) -> None:
    for _ in range(2):
        running = runtime(campaign(tmp_path), store)
        running.iterations = 2
        assert run_campaign(running).stop_reason == "paused"
        running.close()
    assert len(turns(store)) == 2


def test_a_time_asked_for_in_a_run_pauses_and_leaves_the_holdout_locked(tmp_path: Path, store: SqlStore) -> None:
    running = runtime(campaign(tmp_path), store, proposers=scripted(("b", 3)))
    running.clock, running.until = lambda: 100.0, 99.0
    assert run_campaign(running).stop_reason == "paused"


def test_a_relative_gain_over_zero_is_refused(tmp_path: Path, store: SqlStore) -> None:
    zero = ScriptedTrainer(fn=lambda _config, _seed: 0.0, metric="loss")
    with pytest.raises(CampaignError, match='set `gain = "absolute"`'):
        run(campaign(tmp_path), store, trainer=zero)


def test_a_holdout_trial_that_the_harness_lost_is_run_again(tmp_path: Path, store: SqlStore) -> None:
    of = campaign(tmp_path, budget={"iterations": 1})
    settings = ScriptedSettings.model_validate(of.file.trainer)

    class LosesOne(ScriptedTrainer):
        lost = False

        def run(self, request: Any, report: Any) -> Any:
            result = super().run(request, report)
            if request.split == "holdout" and not self.lost:
                self.lost = True
                return replace(result, metric=None, failure="harness")
            return result

    run(of, store, trainer=LosesOne(settings, metric="loss"), proposers=scripted(("b", 3)))
    state = store.campaign("c")
    assert state is not None
    assert store.last_event(state.id, "holdout_measured") is not None
