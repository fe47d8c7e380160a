"""The GPT trainer: one trial is a small GPT, trained on real text to a fixed bound and measured in bits per byte.

It runs trials in its own process, which is the trial worker's in a campaign. (configuration, seed) fixes the result on
one machine: to the last bit on a CPU with the same number of threads, to rounding on a GPU. The execution mode is a
function of settings, device and configuration alone, never of timing or of what ran before, so that both halves of a
pair always share it. Importing this module loads neither torch nor numpy.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from overnight.store.errors import CampaignError, TrainerError
from overnight.store.hashing import digest
from overnight.store.records import Config, FailureClass, TrainerInfo, TrialRequest, TrialResult
from overnight.trainer.gpt_settings import GptConfig, GptSettings
from overnight.trainer.protocol import Report, TrainerContext

if TYPE_CHECKING:
    from overnight.trainer.data import Corpus, Shards
    from overnight.trainer.energy import Energy
    from overnight.trainer.gpt_device import Machine

VERSION = "1"
"""Raised when the same (configuration, seed) would give another number."""
METRIC = "val_bpb"
RESIDENT_BYTES = 2**28
"""Token files up to this size are read once at the start, so that memory does not seem to grow as trials touch them."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """What `prepare` found."""

    corpus: Corpus
    shards: Shards
    machine: Machine
    energy: Energy
    info: TrainerInfo


class GptTrainer:
    """Trains and measures a GPT. See `overnight.trainer.protocol.Trainer` for what each method promises."""

    def __init__(self, settings: GptSettings, context: TrainerContext) -> None:
        self._settings = settings
        self._context = context
        self._ready: _Ready | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, object], context: TrainerContext) -> Self:
        """Validate the `[trainer]` table and the menu's knobs; opens no data, loads no torch."""
        if context.metric != METRIC:
            raise CampaignError(f'`metric.name`: the `gpt` trainer measures `{METRIC}`; set `name = "{METRIC}"`')
        return cls(GptSettings.parse(settings, context.knobs), context)

    def prepare(self) -> TrainerInfo:
        """Map the token file, building it when it is new, and find the device."""
        return self._prepared().info

    def _prepared(self) -> _Ready:
        if self._ready is None:
            self._ready = self._get_ready()
        return self._ready

    def _get_ready(self) -> _Ready:
        # Segments that grow leave no holes between trials of different shapes; read when torch first touches the GPU.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        from overnight.trainer.data import open_corpus, split
        from overnight.trainer.energy import Energy, find_meter
        from overnight.trainer.gpt_device import find_machine

        settings = self._settings
        try:
            corpus = open_corpus(
                settings.data,
                settings.tokenizer,
                folder=self._context.campaign_dir,
                cache_dir=self._context.cache_dir,
            )
        except OSError as error:
            raise TrainerError(f"the token file of `trainer.data` cannot be built: {error}") from error
        shards = split(len(corpus.tokens), corpus.starts, settings.val_tokens)
        if corpus.tokens.nbytes <= RESIDENT_BYTES:
            corpus.tokens[: shards.holdout.start].max()
        threads = settings.threads or os.cpu_count() or 1
        machine = find_machine(
            settings.device, engine=settings.engine, threads=threads, memory_gib=self._context.memory_gib
        )
        info = TrainerInfo(
            trainer="gpt",
            metric=METRIC,
            data_hash=digest({"version": VERSION, "settings": settings.model_dump(), "data": corpus.content_hash}),
            environment=machine.environment,
            has_holdout=True,
            numbers=settings.numbers(self._context.knobs),
            data=f"{settings.data}: {shards.train.size:,} tokens to train on, {shards.val.size:,} to validate, "
            f"{shards.holdout.size:,} kept aside ({settings.tokenizer}, {corpus.vocab:,} in the vocabulary)",
        )
        return _Ready(corpus, shards, machine, Energy(find_meter(gpu=machine.gpu)), info)

    def run(self, request: TrialRequest, report: Report) -> TrialResult:
        """Train and measure; what goes wrong with the candidate comes back as the result's failure."""
        started = time.perf_counter()
        ready = self._prepared()
        config = self._settings.complete(request.config)
        mode = ready.machine.mode(config)
        problem = self._problem(config, ready)
        if problem is not None:
            return TrialResult(metric=None, failure="unsupported", trace=problem, mode=mode)
        from overnight.trainer.gpt_device import is_device_fault, is_out_of_memory
        from overnight.trainer.gpt_loop import Diverged

        failure: FailureClass
        try:
            with ready.energy:
                result = self._trial(request, config, ready, report, started)
            return replace(result, energy_j=ready.energy.joules, energy_source=ready.energy.source)
        except Diverged as error:
            failure, trace = "nan", str(error)
        except (RuntimeError, MemoryError) as error:
            if is_device_fault(error):
                raise TrainerError(f"the GPU failed, whatever was proposed: {error}") from error
            if not is_out_of_memory(error):
                raise
            failure, trace = "oom", str(error)[-2000:]
        finally:
            ready.machine.empty_cache()
        gc.collect()  # a failed trial's tensors hang on its traceback's frames
        ready.machine.empty_cache()
        return TrialResult(
            metric=None,
            failure=failure,
            trace=trace,
            mode=mode,
            wall_s=time.perf_counter() - started,
            energy_j=ready.energy.joules,
            energy_source=ready.energy.source,
        )

    def _trial(
        self, request: TrialRequest, config: GptConfig, ready: _Ready, report: Report, started: float
    ) -> TrialResult:
        from overnight.trainer.gpt_device import VAL_BATCH_TOKENS
        from overnight.trainer.gpt_loop import Bound, Text, bits_per_byte, train

        settings, corpus, machine = self._settings, ready.corpus, ready.machine
        machine.reset_peak()
        micro_batch = machine.micro_batch(config, corpus.vocab, settings.micro_batch)
        engine = machine.engine(config, corpus.vocab, seed=request.seed, micro_batch=micro_batch)
        bound = Bound(settings.total_steps(config), settings.seconds, request.max_steps)
        text = Text(corpus, ready.shards.train)
        trained = train(engine, config, bound, text, seed=request.seed, report=report)
        training_done = time.perf_counter()
        shard = ready.shards.holdout if request.split == "holdout" else ready.shards.val
        rows = max(VAL_BATCH_TOKENS // config.seq_len, 1)
        metric = bits_per_byte(
            engine, Text(corpus, shard), targets=settings.val_tokens, seq_len=config.seq_len, rows=rows
        )
        ended = time.perf_counter()
        peak = machine.peak_gib()
        steps = len(trained.losses)
        return TrialResult(
            metric=metric,
            mode=engine.mode,
            wall_s=ended - started,
            train_s=trained.seconds,
            val_s=ended - training_done,
            steps=steps,
            peak_memory_gib=peak,
            metrics={
                "params_m": machine.shape(config, corpus.vocab).parameters / 1e6,
                "train_loss_first": trained.losses[0],
                "train_loss_last": trained.losses[-1],
                "mean_step_ms": trained.seconds / steps * 1e3,
                "tokens_per_s": config.batch_size * config.seq_len * steps / trained.seconds,
                "micro_batch": float(micro_batch),
            },
        )

    def _problem(self, config: GptConfig, ready: _Ready) -> str | None:
        room = ready.shards.train.size - 1
        if config.seq_len > room:
            return f"`seq_len` {config.seq_len} is longer than the {room} tokens of training text"
        return config.problem() or ready.machine.problem(config)

    def estimate_memory(self, config: Config) -> int | None:
        """Bytes that a trial needs at its peak, with gradients accumulated as far as memory asks for."""
        ready = self._prepared()
        complete = self._settings.complete(config)
        if self._problem(complete, ready) is not None:
            return None
        micro_batch = ready.machine.micro_batch(complete, ready.corpus.vocab, self._settings.micro_batch)
        return ready.machine.estimate(complete, ready.corpus.vocab, micro_batch)

    def unsupported(self, config: Config) -> str | None:
        """Why this machine cannot run `config`: a precision without hardware, a width that its heads do not divide."""
        return self._problem(self._settings.complete(config), self._prepared())

    def release(self) -> None:
        """Give cached device memory back; nothing but the mapped token file stays between trials."""
        if self._ready is not None:
            gc.collect()
            self._ready.machine.empty_cache()

    def close(self) -> None:
        """Drop everything."""
        self.release()
        self._ready = None
