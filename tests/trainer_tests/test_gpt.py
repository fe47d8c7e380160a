"""The GPT trainer as a campaign sees it, on a CPU, with small real trials."""

from __future__ import annotations

import math
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from overnight.store.errors import CampaignError, TrainerError
from overnight.store.records import TrialProgress, TrialRequest, TrialResult
from overnight.trainer.gpt import GptTrainer
from overnight.trainer.protocol import Trainer, TrainerContext

QUICKSTART = Path(__file__).parents[2] / "campaigns" / "quickstart" / "campaign.toml"
TINY: Mapping[str, object] = {
    "steps": 8,
    "data": "*.txt",
    "val_tokens": 1000,
    "device": "cpu",
    "threads": 2,
    "n_layer": 1,
    "n_head": 2,
    "d_model": 16,
    "d_ff": 32,
    "batch_size": 4,
    "seq_len": 32,
    "lr": 1e-2,
}
# The quickstart's training loss on seed 0 at steps 1, 11 ... 51 and 60, and its val_bpb. Another CPU rounds float32
# sums in another order, 6e-8 of a value at a time. Disturbing every initial weight by 1e-5 of itself, far more than
# that, moves no point by more than 1e-5; the figures are rounded to 1e-4; 5e-4 leaves room for both.
GOLDEN = [5.5309, 4.434, 3.5819, 3.0558, 2.7711, 2.6437, 2.6004, 3.7388]
GOLDEN_TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("campaign")
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"line {n * i % 97} of text number {i}\n" for n in range(60)))
    return folder


def make(folder: Path, knobs: Mapping[str, str] | None = None, **settings: object) -> GptTrainer:
    context = TrainerContext(campaign_dir=folder, cache_dir=folder / "cache", knobs=knobs or {}, metric="val_bpb")
    return GptTrainer.from_settings({**TINY, **settings}, context)


def measure(trainer: GptTrainer, seed: int = 0, **config: int | float | str) -> TrialResult:
    return trainer.run(TrialRequest(config, seed), lambda _: None)


class TestSettings:
    def test_it_is_a_trainer(self, folder: Path) -> None:
        assert isinstance(make(folder), Trainer)

    def test_reading_them_loads_no_torch(self) -> None:
        code = "import sys, overnight.trainer.gpt; print('torch' in sys.modules or 'numpy' in sys.modules)"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
        assert found.stdout.strip() == "False"

    @pytest.mark.parametrize("bounds", [{"steps": None}, {"tokens": 5}, {"steps": 3, "seconds": 1.0}])
    def test_exactly_one_bound(self, folder: Path, bounds: dict[str, object]) -> None:
        with pytest.raises(CampaignError, match="exactly one of `steps`, `tokens` and `seconds`"):
            make(folder, **bounds)

    def test_an_unknown_key_is_named(self, folder: Path) -> None:
        with pytest.raises(CampaignError, match=r"`trainer.stepz`.*it has steps"):
            make(folder, stepz=3)

    def test_an_unknown_knob_is_named_beside_the_known_ones(self, folder: Path) -> None:
        with pytest.raises(CampaignError, match=r"`knobs.dropout`.*n_layer, n_head"):
            make(folder, {"dropout": "float"})

    def test_a_knob_of_the_wrong_type_is_named(self, folder: Path) -> None:
        with pytest.raises(CampaignError, match=r"`knobs.beta1`.*`float`"):
            make(folder, {"beta1": "str"})

    def test_a_knob_is_not_also_a_setting(self, folder: Path) -> None:
        with pytest.raises(CampaignError, match=r"`trainer.lr` is also a knob"):
            make(folder, {"lr": "float"})

    def test_a_strange_tokenizer_is_named(self, folder: Path) -> None:
        with pytest.raises(CampaignError, match=r"`trainer.tokenizer`.*bpe:<size>"):
            make(folder, tokenizer="bpe:ten")

    def test_another_metric_is_refused(self, folder: Path) -> None:
        context = TrainerContext(campaign_dir=folder, cache_dir=folder, knobs={}, metric="accuracy")
        with pytest.raises(CampaignError, match=r"`metric.name`.*val_bpb"):
            GptTrainer.from_settings(TINY, context)

    def test_too_little_text_names_the_key_and_the_remedy(self, folder: Path) -> None:
        with pytest.raises(CampaignError, match=r"`trainer.val_tokens` = 100000 .* lower `val_tokens` to \d+"):
            make(folder, val_tokens=100_000).prepare()

    def test_text_that_is_not_there_names_the_key(self, folder: Path) -> None:
        with pytest.raises(CampaignError, match=r"`trainer.data`"):
            make(folder, data="*.nothing").prepare()

    def test_constraints_see_the_numbers_that_are_not_on_the_menu(self, folder: Path) -> None:
        settings = {name: value for name, value in TINY.items() if name != "lr"}
        context = TrainerContext(
            campaign_dir=folder, cache_dir=folder / "cache", knobs={"lr": "float"}, metric="val_bpb"
        )
        numbers = GptTrainer.from_settings(settings, context).prepare().numbers
        assert numbers["steps"] == 8
        assert numbers["d_model"] == 16
        assert "lr" not in numbers


class TestIdentity:
    def test_other_text_is_other_data(self, folder: Path) -> None:
        assert make(folder).prepare().data_hash != make(folder, data="[0-6].txt").prepare().data_hash

    def test_other_settings_are_other_data(self, folder: Path) -> None:
        assert make(folder).prepare().data_hash != make(folder, steps=9).prepare().data_hash

    def test_preparing_twice_is_the_same(self, folder: Path) -> None:
        trainer = make(folder)
        assert trainer.prepare() is trainer.prepare()


class TestTrial:
    def test_a_seed_repeats_to_the_last_bit_in_another_trainer(self, folder: Path) -> None:
        assert measure(make(folder), 5).metric == measure(make(folder), 5).metric

    def test_what_ran_before_changes_nothing(self, folder: Path) -> None:
        trainer = make(folder)
        first = measure(trainer, 1).metric
        measure(trainer, 2, n_layer=2)
        torch.randn(10)
        assert measure(trainer, 1).metric == first

    def test_seeds_differ(self, folder: Path) -> None:
        trainer = make(folder)
        assert measure(trainer, 0).metric != measure(trainer, 1).metric

    @pytest.mark.parametrize(
        "change",
        [
            {"lr": 1e-3},
            {"lr_warmup": 0},
            {"grad_clip": 0.1},
            {"weight_decay": 0.5},
            {"beta1": 0.5},
            {"beta2": 0.8},
            {"n_layer": 2},
            {"n_head": 4},
            {"d_model": 32},
            {"d_ff": 64},
            {"batch_size": 2},
            {"seq_len": 16},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_every_knob_reaches_the_result(self, folder: Path, change: dict[str, int | float]) -> None:
        trainer = make(folder)
        assert measure(trainer, **change).metric != measure(trainer).metric

    def test_training_teaches(self, folder: Path) -> None:
        trainer = make(folder, steps=60)
        assert (measure(trainer).metric or 9) < 0.7 * (measure(make(folder, steps=1)).metric or 0)

    def test_bits_per_byte_do_not_depend_on_how_validation_is_cut(self, folder: Path) -> None:
        # A model that was never trained and sees no context to speak of: its loss is the same in any window.
        short, long = (measure(make(folder, steps=1, lr=1e-12, seq_len=s)).metric or 0 for s in (8, 32))
        assert short == pytest.approx(long, rel=0.01)

    def test_an_untrained_byte_model_needs_the_logarithm_of_its_vocabulary(self, folder: Path) -> None:
        assert measure(make(folder, steps=1, lr=1e-12)).metric == pytest.approx(math.log2(257), rel=0.02)

    def test_bits_are_counted_by_byte_not_by_token(self, folder: Path) -> None:
        # An untrained BPE spends log2(vocab) bits a token, so per byte it is less by the mean length of a token.
        bpe = measure(make(folder, tokenizer="bpe:400", val_tokens=500, steps=1, lr=1e-12)).metric or 0
        assert bpe < 0.6 * math.log2(400)

    def test_the_holdout_is_other_text(self, folder: Path) -> None:
        trainer = make(folder)
        val = trainer.run(TrialRequest({}, 0), lambda _: None)
        holdout = trainer.run(TrialRequest({}, 0, split="holdout"), lambda _: None)
        assert val.metric != holdout.metric
        assert val.metrics["train_loss_last"] == holdout.metrics["train_loss_last"]

    def test_accumulating_gradients_keeps_the_effective_batch(self, folder: Path) -> None:
        whole, pieces = measure(make(folder)), measure(make(folder, micro_batch=1))
        assert pieces.metrics["micro_batch"] == 1
        assert pieces.metric == pytest.approx(whole.metric, rel=1e-4)

    def test_progress_is_reported_step_by_step(self, folder: Path) -> None:
        seen: list[TrialProgress] = []
        make(folder).run(TrialRequest({}, 0), seen.append)
        assert [(progress.step, progress.steps) for progress in seen] == [(i, 8) for i in range(1, 9)]

    def test_tokens_bound_a_trial(self, folder: Path) -> None:
        trainer = make(folder, steps=None, tokens=1000)
        assert measure(trainer).steps == math.ceil(1000 / (4 * 32))

    def test_seconds_bound_a_trial(self, folder: Path) -> None:
        result = measure(make(folder, steps=None, seconds=0.3))
        assert result.train_s == pytest.approx(0.3, abs=0.25)

    def test_the_request_may_stop_it_early(self, folder: Path) -> None:
        assert make(folder).run(TrialRequest({}, 0, max_steps=2), lambda _: None).steps == 2


class TestFailures:
    def test_divergence_stops_at_once(self, folder: Path) -> None:
        seen: list[TrialProgress] = []
        result = make(folder, steps=5000, lr=1e30).run(TrialRequest({}, 0), seen.append)
        assert (result.failure, result.metric) == ("nan", None)
        assert len(seen) < 20

    def test_a_precision_without_hardware_is_unsupported(self, folder: Path) -> None:
        trainer = make(folder, {"precision": "str"})
        assert measure(trainer, precision="fp8").failure == "unsupported"
        assert "8.9" in (trainer.unsupported({"precision": "fp8"}) or "")

    def test_heads_that_do_not_divide_the_width_are_unsupported(self, folder: Path) -> None:
        assert "`n_head` 3" in measure(make(folder), n_head=3).trace

    def test_memory_that_cannot_be_had_is_out_of_memory(self, folder: Path) -> None:
        result = measure(make(folder, micro_batch=4096), d_model=1 << 21, n_head=1)
        assert (result.failure, result.metric) == ("oom", None)

    def test_a_gpu_that_fails_is_the_harness_and_no_candidate_s_fault(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lost(*_arguments: object) -> None:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

        monkeypatch.setattr(GptTrainer, "_trial", lost)
        with pytest.raises(TrainerError, match="uncorrectable ECC"):
            measure(make(folder))

    def test_the_next_trial_is_unharmed(self, folder: Path) -> None:
        trainer = make(folder)
        before = measure(trainer).metric
        measure(trainer, lr=1e30)
        assert measure(trainer).metric == before


class TestMemory:
    def test_trials_leave_none_behind(self, tmp_path: Path) -> None:
        # On the standard library: its token file is large enough that pages read late would show.
        context = TrainerContext(campaign_dir=Path(), cache_dir=tmp_path, knobs={}, metric="val_bpb")
        trainer = GptTrainer.from_settings({**TINY, "data": "stdlib", "steps": 2}, context)
        measure(trainer)
        process = psutil.Process()
        before = process.memory_info().rss
        for seed in range(60):
            measure(trainer, seed, n_layer=1 + seed % 3)
        assert process.memory_info().rss < 1.02 * before

    def test_a_larger_model_is_estimated_larger(self, folder: Path) -> None:
        trainer = make(folder)
        assert (trainer.estimate_memory({"d_model": 64}) or 0) > (trainer.estimate_memory({}) or 0)

    def test_gradients_accumulate_when_memory_is_short(self, folder: Path) -> None:
        trainer = make(folder)
        needed = trainer.estimate_memory({"seq_len": 512, "batch_size": 16}) or 0
        context = replace(trainer._context, memory_gib=needed / 2 / 2**30)
        tight = GptTrainer.from_settings(TINY, context)
        assert measure(tight, seq_len=512, batch_size=16).metrics["micro_batch"] < 16
        assert (tight.estimate_memory({"seq_len": 512, "batch_size": 16}) or 0) < needed / 2


def test_the_quickstarts_loss_curve_is_golden(tmp_path: Path) -> None:
    file = tomllib.loads(QUICKSTART.read_text())
    knobs = {name: knob["type"] for name, knob in file["knobs"].items()}
    # Python's library differs between versions; this text does not.
    words = [f"w{(n * n * 31 + n // 7) % 397**2 % 400:x}" for n in range(60_000)]
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(" ".join(words[i * 5000 : (i + 1) * 5000]))
    context = TrainerContext(campaign_dir=tmp_path, cache_dir=tmp_path / "cache", knobs=knobs, metric="val_bpb")
    settings = {**file["trainer"], "data": "*.txt", "val_tokens": 16384}
    losses: list[float] = []
    config = {name: knob["default"] for name, knob in file["knobs"].items()}
    result = GptTrainer.from_settings(settings, context).run(
        TrialRequest(config, 0), lambda progress: losses.append(progress.loss or 0.0)
    )
    found = [*losses[::10], losses[-1], result.metric]
    assert found == pytest.approx(GOLDEN, abs=GOLDEN_TOLERANCE)
