"""How fast one GPT trial is and how much its result scatters: one JSON line a case.

    python benchmarks/trial.py [--campaign campaigns/gpt354m] [--seeds 8] [--only speed|memory|noise]

`speed` puts variants side by side in one run: plain PyTorch (autocast, torch.optim.AdamW), the same compiled whole,
cold and with a warm cache, and the trainer: its first trial, a repeated shape, shapes never seen before, fp8. Wall time
is from configuration to val_bpb. `noise` measures four configurations on the same seeds and prints the standard
deviation of a difference, paired and unpaired, and repeats of one seed. `memory` compares estimates with peaks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overnight.store.records import Config, TrialRequest, TrialResult
from overnight.trainer import gpt_model
from overnight.trainer.gpt import GptTrainer
from overnight.trainer.gpt_loop import Bound, Text, bits_per_byte, train
from overnight.trainer.gpt_settings import GptConfig
from overnight.trainer.protocol import TrainerContext

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
VAL_BATCH_TOKENS = 16384


def emit(case: str, **values: object) -> None:
    rounded = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"case": case, **rounded}), flush=True)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def matmul_rate() -> float:
    """FLOP/s of the largest dense product that a step resembles, in the precision that trials run in."""
    size, dtype, repeats = (8192, torch.bfloat16, 30) if CUDA else (1024, torch.float32, 10)
    a = torch.randn(size, size, device="cuda" if CUDA else "cpu", dtype=dtype)
    for _ in range(3):
        a @ a
    synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        a @ a
    synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - started)


class PlainEngine:
    """What anyone writes first: parameters, autocast, clip_grad_norm_, torch.optim.AdamW; optionally compiled whole."""

    mode = "plain"
    lag = 2

    def __init__(self, shape: gpt_model.Shape, config: GptConfig, seed: int, *, compiled: bool) -> None:
        self._shape, self._config = shape, config
        flat = torch.empty(gpt_model.buffer_size(shape)[0], device="cuda" if CUDA else "cpu")
        gpt_model.initialise(shape, flat, seed)
        self._weights = {name: torch.nn.Parameter(view.clone()) for name, view in gpt_model.views(shape, flat).items()}
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        function: Callable[..., torch.Tensor] = gpt_model.token_losses
        self._losses = torch.compile(function) if compiled else function

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda" if CUDA else "cpu", dtype=torch.bfloat16, enabled=CUDA):
            inputs, targets = ids[:, :-1].clamp(min=0).contiguous(), ids[:, 1:].contiguous()
            return self._losses(self._shape, self._weights, inputs, targets)

    def train_step(self, batch: NDArray[np.int64], *, lr: float, count: int) -> Callable[[], float]:  # noqa: ARG002
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss = self._forward(torch.from_numpy(batch).to(self._weights["tok"].device)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights.values(), self._config.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return lambda: float(loss.detach())

    @torch.no_grad()
    def token_losses(self, batch: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._forward(torch.from_numpy(batch).to(self._weights["tok"].device)).double().cpu().numpy()

    def wait(self) -> None:
        synchronize()


class Bench:
    """A campaign's trainer with its default configuration."""

    def __init__(self, campaign: Path) -> None:
        self.file = tomllib.loads((campaign / "campaign.toml").read_text())
        self.knobs = {name: knob["type"] for name, knob in self.file["knobs"].items()}
        self.default = {name: knob["default"] for name, knob in self.file["knobs"].items()}
        self.folder = campaign
        self.trainer = self.make()
        self.info = self.trainer.prepare()
        self.rate = matmul_rate()

    def make(self, *, memory_gib: float | None = None, **settings: object) -> GptTrainer:
        context = TrainerContext(
            campaign_dir=self.folder,
            cache_dir=ROOT / "build" / "benchmark-cache",
            knobs=self.knobs,
            metric="val_bpb",
            memory_gib=memory_gib,
        )
        return GptTrainer.from_settings({**self.file["trainer"], **settings}, context)

    def run(self, config: Config, seed: int = 0, *, trainer: GptTrainer | None = None, **request: Any) -> TrialResult:
        result = (trainer or self.trainer).run(
            TrialRequest({**self.default, **config}, seed, **request), lambda _: None
        )
        if result.failure is not None and not request:
            raise SystemExit(f"{config} seed {seed}: {result.failure}: {result.trace}")
        return result

    def complete(self, config: Config) -> GptConfig:
        return self.trainer._settings.complete({**self.default, **config})

    def utilisation(self, config: Config, params_m: float, tokens_per_s: float) -> float:
        """Model FLOPs (6 a parameter and token, causal attention counted once) over the measured matmul rate."""
        c = self.complete(config)
        flops = 6 * (params_m * 1e6 - c.seq_len * c.d_model) + 6 * c.n_layer * c.d_model * c.seq_len
        return flops * tokens_per_s / self.rate

    def line(self, case: str, config: Config, result: TrialResult) -> None:
        tokens_per_s = result.metrics["tokens_per_s"]
        emit(
            case,
            wall_s=result.wall_s,
            step_ms=result.metrics["mean_step_ms"],
            tokens_per_s=round(tokens_per_s),
            mfu=self.utilisation(config, result.metrics["params_m"], tokens_per_s),
            val_s=result.val_s,
            peak_gib=result.peak_memory_gib,
            val_bpb=result.metric,
            joules=result.energy_j,
            mode=result.mode,
        )


def plain(bench: Bench, case: str, *, compiled: bool) -> None:
    ready = bench.trainer._ready
    assert ready is not None
    config, corpus = bench.complete({}), ready.corpus
    shape = gpt_model.Shape(
        n_layer=config.n_layer, n_head=config.n_head, d_model=config.d_model, d_ff=config.d_ff,
        seq_len=config.seq_len, vocab=corpus.vocab, padded_vocab=corpus.vocab,
    )  # fmt: skip
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    started = time.perf_counter()
    engine = PlainEngine(shape, config, 0, compiled=compiled)
    steps = bench.file["trainer"]["steps"]
    trained = train(
        engine, config, Bound(steps, None, None), Text(corpus, ready.shards.train), seed=0, report=lambda _: None
    )
    targets = bench.file["trainer"]["val_tokens"]
    rows = max(VAL_BATCH_TOKENS // config.seq_len, 1)
    metric = bits_per_byte(engine, Text(corpus, ready.shards.val), targets=targets, seq_len=config.seq_len, rows=rows)
    wall = time.perf_counter() - started
    tokens_per_s = config.batch_size * config.seq_len * steps / trained.seconds
    peak = torch.cuda.max_memory_reserved() / 2**30 if CUDA else None
    emit(
        case, wall_s=wall, step_ms=trained.seconds / steps * 1e3, tokens_per_s=round(tokens_per_s),
        mfu=bench.utilisation({}, shape.parameters / 1e6, tokens_per_s), peak_gib=peak, val_bpb=metric,
    )  # fmt: skip
    del engine
    if CUDA:
        torch.cuda.empty_cache()


def speed(bench: Bench) -> None:
    bench.line("ours, first trial of the process", {}, bench.run({}))
    for _ in range(2):
        bench.line("ours, repeated shape", {}, bench.run({}))
    if CUDA:
        for change in (
            {"d_ff": 6144},
            {"n_layer": 20, "seq_len": 512},
            {"d_model": 768, "n_head": 8},
            {"d_model": 1536, "n_layer": 10},
            {"batch_size": 8, "n_head": 32},
        ):
            case = f"ours, never seen: {' '.join(f'{k}={v}' for k, v in change.items())}"
            bench.line(case, change, bench.run(change))
        fp8 = {"precision": "fp8"}
        for case in ("ours, fp8, never seen", "ours, fp8, repeated shape"):
            bench.line(case, fp8, bench.run(fp8))
        eager = bench.make(engine="eager")
        eager.prepare()
        for case in ("ours, engine = eager, first", "ours, engine = eager, repeated"):
            bench.line(case, {}, bench.run({}, trainer=eager))
    bench.trainer.release()
    plain(bench, "plain eager", compiled=False)
    plain(bench, "plain eager, again", compiled=False)
    if CUDA:
        plain(bench, "plain compiled, cold", compiled=True)
        plain(bench, "plain compiled, warm cache", compiled=True)


def noise(bench: Bench, seeds: int) -> None:
    """Differences between configurations, paired by seed and not; then repeats of one seed."""
    changes: list[Mapping[str, Any]] = (
        [{"lr": 6e-4}, {"batch_size": 8}, {"n_layer": 12}, {"precision": "fp8"}]
        if "precision" in bench.knobs
        else [{"lr": 2e-3}, {"batch_size": 16}, {"n_layer": 1}]
    )
    base = [bench.run({}, seed).metric or 0.0 for seed in range(seeds)]
    emit("noise: default", mean=statistics.mean(base), sd=statistics.stdev(base), val_bpb=base)
    for change in changes:
        name = " ".join(f"{k}={v}" for k, v in change.items())
        values = [bench.run(change, seed).metric or 0.0 for seed in range(seeds)]
        differences = [b - v for b, v in zip(base, values, strict=True)]
        unpaired = (statistics.variance(base) + statistics.variance(values)) ** 0.5
        paired = statistics.stdev(differences)
        emit(
            f"noise: {name}", mean=statistics.mean(values), sd=statistics.stdev(values),
            mean_difference=statistics.mean(differences), sd_unpaired=unpaired, sd_paired=paired,
            trials_saved=1 - (paired / unpaired) ** 2,
        )  # fmt: skip
    repeats = [bench.run({}, 0).metric or 0.0 for _ in range(3)]
    emit("noise: seed 0 again", spread=max(repeats) - min(repeats), same_as_first=repeats[0] == base[0])
    if CUDA:
        eager = bench.make(engine="eager")
        eager.prepare()
        other = [bench.run({}, seed, trainer=eager).metric or 0.0 for seed in range(min(seeds, 3))]
        emit("noise: eager minus fused, same seeds", differences=[o - b for o, b in zip(other, base, strict=False)])


def memory(bench: Bench) -> None:
    """Estimates against measured peaks over the menu's corners; two steps and a short validation each."""
    trainer = bench.make(val_tokens=65536)
    trainer.prepare()
    sizes = ("n_layer", "d_model", "d_ff", "batch_size", "seq_len")
    ends = [
        (knob["choices"][0], knob["choices"][-1]) if "choices" in knob else tuple(int(x) for x in knob["range"])
        for knob in (bench.file["knobs"][name] for name in sizes)
    ]
    worst = float("inf")
    for corner in itertools.product(*ends):
        config = {**bench.default, **dict(zip(sizes, corner, strict=True))}
        result = bench.run(config, trainer=trainer, max_steps=2)
        estimate = (trainer.estimate_memory(config) or 0) / 2**30
        ratio = estimate / result.peak_memory_gib if result.peak_memory_gib else None
        worst = min(worst, ratio or worst)
        emit(
            f"memory: {' '.join(f'{n}={v}' for n, v in zip(sizes, corner, strict=True))}", estimate_gib=estimate,
            peak_gib=result.peak_memory_gib, ratio=ratio, failure=result.failure,
            micro_batch=result.metrics.get("micro_batch"),
        )  # fmt: skip
    emit("memory: smallest estimate over peak", ratio=worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaign", type=Path, default=ROOT / "campaigns" / "gpt354m")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--only", choices=["speed", "memory", "noise"])
    options = parser.parse_args()
    started = time.perf_counter()
    bench = Bench(options.campaign)
    emit(
        "environment", prepare_s=time.perf_counter() - started, matmul_tflops=bench.rate / 1e12,
        **bench.info.environment,
    )  # fmt: skip
    if options.only in (None, "speed"):
        speed(bench)
    if options.only in (None, "memory") and CUDA:
        memory(bench)
    if options.only in (None, "noise"):
        noise(bench, options.seeds)


if __name__ == "__main__":
    main()
