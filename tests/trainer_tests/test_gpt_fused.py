"""The hand-written GPU step against autograd in float64, and its repeats. Needs a CUDA device with Triton."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from overnight.store.records import TrialRequest, TrialResult
from overnight.trainer import gpt_model
from overnight.trainer.gpt import GptTrainer
from overnight.trainer.gpt_settings import GptSettings
from overnight.trainer.protocol import TrainerContext

pytestmark = pytest.mark.gpu
SHAPE = gpt_model.Shape(n_layer=2, n_head=2, d_model=128, d_ff=256, seq_len=64, vocab=1000, padded_vocab=1024)


def make(folder: Path, **settings: object) -> GptTrainer:
    if not list(folder.glob("*.txt")):
        (folder / "a.txt").write_text("".join(f"line {n * n % 977} of a text\n" for n in range(20_000)))
    base = {"steps": 10, "data": "*.txt", "val_tokens": 8192, "n_layer": 2, "n_head": 4, "d_model": 256}
    context = TrainerContext(
        campaign_dir=folder, cache_dir=folder / "cache", knobs={"precision": "str"}, metric="val_bpb"
    )
    return GptTrainer.from_settings({**base, "d_ff": 512, "batch_size": 4, "seq_len": 128, **settings}, context)


def measure(trainer: GptTrainer, precision: str = "bf16") -> TrialResult:
    return trainer.run(TrialRequest({"precision": precision}, 0), lambda _: None)


def test_gradients_agree_with_float64() -> None:
    # bf16 keeps 8 bits: 0.004 for each rounding; a gradient at the bottom has passed some thirty of them.
    from overnight.trainer.gpt_fused import FusedEngine

    config = GptSettings(steps=1, n_layer=2, n_head=2, d_model=128, d_ff=256, batch_size=4, seq_len=64).complete({})
    engine = FusedEngine(SHAPE, config, seed=0, device=torch.device("cuda"), micro_batch=4, attention="sdpa")
    ids = torch.randint(0, 1000, (4, 65), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.no_grad():
        loss = engine._piece(ids, 1 / 256)
    weights = {name: view.double().detach().requires_grad_() for name, view in engine._weights.items()}
    exact = gpt_model.token_losses(SHAPE, weights, ids[:, :-1], ids[:, 1:]).mean()
    exact.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(float(exact.detach()), rel=2e-3)
    for name, weight in weights.items():
        assert weight.grad is not None
        error = (engine._grads[name].double() - weight.grad).norm() / weight.grad.norm()
        assert float(error) < 0.05, name


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_seed_repeats_to_the_last_bit(tmp_path: Path, precision: str) -> None:
    trainer = make(tmp_path)
    assert measure(trainer, precision).metric == measure(trainer, precision).metric


def test_the_fused_mode_is_the_eager_one_but_for_rounding(tmp_path: Path) -> None:
    fused, eager = measure(make(tmp_path)), measure(make(tmp_path, engine="eager"))
    assert (fused.mode, eager.mode) == ("fused", "eager")
    assert fused.metric == pytest.approx(eager.metric, rel=5e-3)


def test_accumulating_gradients_keeps_the_effective_batch(tmp_path: Path) -> None:
    whole, pieces = measure(make(tmp_path)), measure(make(tmp_path, micro_batch=1))
    assert pieces.metric == pytest.approx(whole.metric, rel=5e-3)


def test_no_memory_stays_behind(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    measure(trainer)
    before = torch.cuda.memory_allocated()
    measure(trainer)
    assert torch.cuda.memory_allocated() <= before
