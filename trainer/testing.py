"""The conformance tests of the `Trainer` protocol: subclass, say how to build yours, and run them with pytest.

    class TestMyTrainer(TrainerConformance):
        trainer_type = MyTrainer
        settings = {"steps": 2}
        config = {"lr": 1e-3}

They run a handful of trials of `config`, so make those short. This module needs pytest to run them, not to be imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Literal

from overnight.store.errors import CampaignError
from overnight.store.records import Config, TrialProgress, TrialRequest, TrialResult
from overnight.trainer.protocol import Trainer, TrainerContext
from overnight.trainer.wire import ResultFrame, pack_frame, unpack

_HEADER = 4


class TrainerConformance:
    """What every trainer has to do, whatever it trains."""

    trainer_type: ClassVar[type[Trainer]]
    settings: ClassVar[Mapping[str, object]] = {}
    config: ClassVar[Config]
    """A configuration that works, and is cheap."""
    metric: ClassVar[str] = "val_bpb"
    repeats: ClassVar[Literal["exact", "nearly", "no"]] = "exact"
    """How far the same (configuration, seed) gives the same metric: to the last bit, to 1%, or not at all."""

    def context(self, tmp_path: Path) -> TrainerContext:
        """Return what a campaign would tell the trainer, the knobs typed by the values of `config`."""
        knobs = {name: type(value).__name__ for name, value in self.config.items()}
        return TrainerContext(
            campaign_dir=tmp_path, cache_dir=tmp_path / "cache", knobs=knobs, metric=self.metric, memory_gib=None
        )

    @contextmanager
    def trainer(self, tmp_path: Path) -> Iterator[Trainer]:
        """Build the trainer, and close it after the test."""
        trainer = self.trainer_type.from_settings(self.settings, self.context(tmp_path))
        try:
            yield trainer
        finally:
            trainer.close()

    def trial(self, trainer: Trainer, seed: int = 1, split: Literal["val", "holdout"] = "val") -> TrialResult:
        """Run one trial of `config`."""
        return trainer.run(TrialRequest(self.config, seed, split, timeout_s=120.0), _ignore)

    def test_it_has_the_methods_of_a_trainer(self, tmp_path: Path) -> None:
        """Every method of the protocol is there."""
        with self.trainer(tmp_path) as trainer:
            assert isinstance(trainer, Trainer)

    def test_an_unknown_setting_is_refused_by_name(self, tmp_path: Path) -> None:
        """A typing error in a campaign file is told, when the trainer is prepared at the latest."""
        said = ""
        try:
            trainer = self.trainer_type.from_settings({**self.settings, "no_such_setting": 1}, self.context(tmp_path))
            with closing(trainer):
                trainer.prepare()
        except CampaignError as error:
            said = str(error)
        assert "no_such_setting" in said

    def test_prepare_twice_says_the_same(self, tmp_path: Path) -> None:
        """A resumed campaign recognises its trainer."""
        with self.trainer(tmp_path) as first, self.trainer(tmp_path) as second:
            assert first.prepare() == first.prepare() == second.prepare()

    def test_what_it_is_can_be_stored_as_json(self, tmp_path: Path) -> None:
        """The info is plain, finite data that names the campaign's metric."""
        with self.trainer(tmp_path) as trainer:
            info = trainer.prepare()
            assert info.metric == self.metric
            assert json.dumps(asdict(info), allow_nan=False)

    def test_a_trial_measures_a_finite_metric(self, tmp_path: Path) -> None:
        """The configuration that works gives a number."""
        with self.trainer(tmp_path) as trainer:
            trainer.prepare()
            result = self.trial(trainer)
            assert result.failure is None, result.trace
            assert result.metric is not None
            assert math.isfinite(result.metric)

    def test_a_result_survives_the_worker_s_wire(self, tmp_path: Path) -> None:
        """The result is plain data that the control process accepts."""
        with self.trainer(tmp_path) as trainer:
            trainer.prepare()
            result = self.trial(trainer)
            frame = unpack(pack_frame(ResultFrame(call=1, result=result))[_HEADER:])
            assert isinstance(frame, ResultFrame)
            assert frame.result.metric == result.metric

    def test_the_same_seed_repeats(self, tmp_path: Path) -> None:
        """(configuration, seed) fixes the metric as far as `repeats` says, whatever ran in between."""
        if self.repeats == "no":
            return
        with self.trainer(tmp_path) as trainer:
            trainer.prepare()
            first = self.trial(trainer, seed=1).metric
            self.trial(trainer, seed=2)
            again = self.trial(trainer, seed=1).metric
            assert first is not None
            assert again is not None
            assert first == again or (self.repeats == "nearly" and math.isclose(first, again, rel_tol=0.01))

    def test_the_holdout_is_measured_exactly_where_there_is_one(self, tmp_path: Path) -> None:
        """`has_holdout` is kept."""
        with self.trainer(tmp_path) as trainer:
            info = trainer.prepare()
            result = self.trial(trainer, split="holdout")
            assert (result.metric is not None) == info.has_holdout, result.trace

    def test_the_machine_can_run_the_configuration(self, tmp_path: Path) -> None:
        """A configuration that works is not called unsupported, and its memory, where it is known, is above 0."""
        with self.trainer(tmp_path) as trainer:
            trainer.prepare()
            assert trainer.unsupported(self.config) is None
            estimate = trainer.estimate_memory(self.config)
            assert estimate is None or estimate > 0

    def test_a_trial_runs_after_release(self, tmp_path: Path) -> None:
        """Memory that was given back is taken again."""
        with self.trainer(tmp_path) as trainer:
            trainer.prepare()
            before = self.trial(trainer)
            trainer.release()
            after = self.trial(trainer)
            assert after.failure is None, after.trace
            if self.repeats == "exact":
                assert after.metric == before.metric


def _ignore(progress: TrialProgress) -> None:
    """Take no notice of a trial's progress."""
