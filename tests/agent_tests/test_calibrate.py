"""Calibrating anew: the noise comes from trials that nothing was selected by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from overnight.agent.measure import calibration_seeds
from overnight.agent.run import run_campaign
from overnight.store.sql_store import SqlStore
from overnight.trainer.noise import Spread
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

from .campaigns import campaign, runtime, scripted


class Moves(ScriptedTrainer):
    """Runs on one device or another."""

    device = "one"

    def prepare(self) -> Any:
        return replace(super().prepare(), environment={"device": self.device})


def test_a_kept_baseline_is_calibrated_on_trials_of_its_own(tmp_path: Path) -> None:
    trials = 4
    of = campaign(tmp_path, decision={"calibration_trials": trials}, trainer={"repeat_sd": 0.01})
    store = SqlStore.open(tmp_path / "store.db", create=True)
    for turns, device in enumerate(("one", "another", "one"), 1):
        trainer = Moves(ScriptedSettings.model_validate(of.file.trainer), metric="loss")
        trainer.device = device
        running = runtime(of, store, trainer=trainer, proposers=scripted(("b", 3), ("a", 1.0), ("b", 9)))
        running.iterations = turns
        run_campaign(running)
        running.close()
    state = store.campaign("c")
    assert state is not None
    assert state.baseline_config_id is not None
    assert store.config_of(state.baseline_config_id)["b"] == 3  # kept on device `one`, where its trials were selected
    where = {"trainer_hash": running.trainer_hash, "environment_hash": running.environment_hash}
    stored = store.trials_of(state.id, state.baseline_config_id, **where, seeds=running.decision_seeds)
    own = [trial for trial in stored if trial.purpose == "calibration"]
    first = {trial.seed: trial.metric for trial in reversed(own)}
    assert sorted(trial.seed or 0 for trial in own) == sorted([running.decision_seeds[0], *calibration_seeds(running)])
    assert state.noise_sd == Spread.from_values([first[seed] or 0.0 for seed in calibration_seeds(running)]).sd
    store.close()
