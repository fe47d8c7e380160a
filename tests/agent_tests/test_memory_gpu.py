"""A candidate that really exhausts a GPU's memory costs its turn, and nothing else. Needs a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest

from overnight.agent.campaign import parse_campaign
from overnight.agent.proposers.protocol import reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.run import open_runtime, run_campaign
from overnight.store.sql_store import SqlStore

from .campaigns import data

pytestmark = pytest.mark.gpu

TRAINER = {
    "steps": 4,
    "data": "*.txt",
    "val_tokens": 4096,
    "device": "cuda",
    "n_layer": 2,
    "n_head": 4,
    "d_ff": 512,
    "batch_size": 4,
    "seq_len": 128,
}
KNOBS = {
    "d_model": {"type": "int", "choices": [256, 65_536], "default": 256},
    "lr": {"type": "float", "range": [1e-4, 1e-1], "scale": "log", "default": 1e-3},
}


def test_a_candidate_too_large_for_the_gpu_fails_as_oom_and_the_next_one_is_measured(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {n * n % 977} of a text\n" for n in range(20_000)))
    sections = data(
        campaign={"trainer": "gpt"},
        metric={"name": "val_bpb"},
        budget={"iterations": 2},
        rails={"skip": ["R7_capability"]},  # which would have blocked it: here the GPU itself has to say so
    ) | {"trainer": TRAINER, "knobs": KNOBS}
    proposer = ScriptedProposer("random", [reply_text("d_model", 65_536, "wider"), reply_text("lr", 3e-3, "faster")])
    store = SqlStore.open(tmp_path / "store.db", create=True)
    of = parse_campaign(sections, tmp_path / "campaign.toml")
    runtime = open_runtime(of, store, proposers={"random": proposer})
    try:
        run_campaign(runtime)
        state = runtime.state()
        first, second = (store.attempts_of_turn(state.id, turn)[-1] for turn in (1, 2))
    finally:
        runtime.close()
        store.close()
    assert (first.outcome, first.failure, first.metric) == ("failed", "oom", None)
    assert second.outcome in ("kept", "reverted")
    assert second.metric is not None
