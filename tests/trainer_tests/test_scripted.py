"""ScriptedTrainer does what its settings say, to the last bit, so that tests can say what a loop should have found."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from overnight.store.errors import CampaignError
from overnight.store.records import Config, FailureClass, KnobValue, TrialProgress, TrialRequest
from overnight.trainer.protocol import TrainerContext
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer
from overnight.trainer.testing import TrainerConformance

OPTIMUM: dict[str, int | float | str] = {"lr": 0.01, "width": 64, "precision": "bf16"}


def ignore(progress: TrialProgress) -> None:
    """Nobody watches."""


def measure(trainer: ScriptedTrainer, config: Config, seed: int = 0) -> float:
    metric = trainer.run(TrialRequest(config, seed), ignore).metric
    assert metric is not None
    return metric


def trainer(**settings: object) -> ScriptedTrainer:
    return ScriptedTrainer(ScriptedSettings.model_validate({"optimum": OPTIMUM, **settings}))


class TestScriptedTrainerConforms(TrainerConformance):
    trainer_type = ScriptedTrainer
    settings: ClassVar[Mapping[str, object]] = {"optimum": {"lr": 0.01}, "seed_sd": 0.1, "memory_gib": {"lr=0.02": 1.5}}
    config: ClassVar[Mapping[str, KnobValue]] = {"lr": 0.02}


class TestScriptedTrainerWithNoiseConforms(TrainerConformance):
    trainer_type = ScriptedTrainer
    settings: ClassVar[Mapping[str, object]] = {"unseeded": True, "noise_sd": 0.1, "holdout": False}
    config: ClassVar[Mapping[str, KnobValue]] = {"lr": 0.02}
    repeats = "no"


def test_the_optimum_measures_the_base_and_a_decade_away_costs_one() -> None:
    assert measure(trainer(), OPTIMUM) == 1.0
    assert measure(trainer(), {**OPTIMUM, "lr": 0.1}) == pytest.approx(2.0)
    assert measure(trainer(), {**OPTIMUM, "precision": "fp8"}) == pytest.approx(2.0)
    assert measure(trainer(higher_is_better=True), {**OPTIMUM, "lr": 0.1}) == pytest.approx(0.0)


def test_a_pair_on_one_seed_shares_what_the_seed_adds() -> None:
    noisy = trainer(seed_sd=5.0)
    worse = {**OPTIMUM, "lr": 0.1}
    differences = [measure(noisy, worse, seed) - measure(noisy, OPTIMUM, seed) for seed in range(20)]
    assert differences == pytest.approx([1.0] * 20)


def test_the_noise_has_the_standard_deviation_that_was_asked_for() -> None:
    noisy = trainer(noise_sd=0.3)
    values = [measure(noisy, OPTIMUM, seed) for seed in range(2000)]
    assert statistics.stdev(values) == pytest.approx(0.3, rel=0.1)
    assert statistics.mean(values) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("settings", [{"unseeded": True, "seed_sd": 1.0}, {"repeat_sd": 1.0}])
def test_an_inexact_trainer_does_not_repeat(settings: dict[str, object]) -> None:
    inexact = trainer(**settings)
    assert measure(inexact, OPTIMUM) != measure(inexact, OPTIMUM)


def test_the_holdout_has_noise_of_its_own() -> None:
    noisy = trainer(seed_sd=1.0)
    holdout = noisy.run(TrialRequest(OPTIMUM, 0, "holdout"), ignore).metric
    assert holdout != measure(noisy, OPTIMUM)


@pytest.mark.parametrize("failure", ["oom", "nan", "timeout", "crash", "unsupported", "harness"])
def test_a_scripted_failure_comes_as_its_class(failure: FailureClass) -> None:
    result = trainer(faults={"lr=0.5": failure}).run(TrialRequest({**OPTIMUM, "lr": 0.5}, 0), ignore)
    assert (result.metric, result.failure) == (None, failure)


def test_a_function_replaces_the_shape() -> None:
    assert measure(ScriptedTrainer(fn=lambda config, seed: float(config["lr"]) + seed), {"lr": 1.0}, 2) == 3.0


def _raise(error: Exception) -> float:
    raise error


@pytest.mark.parametrize(
    ("error", "failure"), [(MemoryError("no more"), "oom"), (ZeroDivisionError("by zero"), "crash")]
)
def test_what_a_function_raises_is_the_trial_s_failure(error: Exception, failure: FailureClass) -> None:
    result = ScriptedTrainer(fn=lambda config, seed: _raise(error)).run(TrialRequest({"lr": 1.0}, 0), ignore)
    assert result.failure == failure
    assert str(error) in result.trace


def test_a_function_that_gives_nan_is_a_nan() -> None:
    result = ScriptedTrainer(fn=lambda config, seed: float("nan")).run(TrialRequest({}, 0), ignore)
    assert (result.metric, result.failure) == (None, "nan")


def test_an_optimum_of_a_knob_that_is_not_on_the_menu_is_refused(tmp_path: Path) -> None:
    context = TrainerContext(campaign_dir=tmp_path, cache_dir=tmp_path, knobs={"lr": "float"}, metric="m")
    with pytest.raises(CampaignError, match="`width`, which is not a knob"):
        ScriptedTrainer.from_settings({"optimum": {"width": 3}}, context)
