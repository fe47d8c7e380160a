"""Trajectory files made here, in the format of the first trajectory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SEED_FILE = Path(__file__).parents[3] / "shared" / "seed" / "trajectory.jsonl"
"""The first trajectory; it does not lie in the repository."""
BASE = {"lr": 0.0003, "n_head": 16, "d_model": 1024, "precision": "fp8", "seed": 0}
MENU = {"lr": [0.0002, 0.0004], "n_head": [8, 32], "d_model": [768, 1536]}


def header(**changed: Any) -> dict[str, Any]:
    return {"_meta": "log", "baseline_val_bpb": 10.9, "baseline_cfg": BASE, "accept_delta_frac": 0.005, **changed}


def attempt(
    number: int, knob: str = "lr", value: object = 0.0002, metric: float = 10.8, **changed: Any
) -> dict[str, Any]:
    keep = (10.9 - metric) / 10.9 >= 0.005
    return {
        "iter": number, "ts": f"2026-04-25 18:{number % 60:02}:22", "stage": "evaluated", "verdict_ok": True,
        "proposal": {"knob": knob, "new_value": value, "reason": "may help"}, "diff": "--- a\n+++ b\n",
        "candidate_cfg": {**BASE, knob: value},
        "eval_metrics": {"ok": True, "params_m": 354.6, "train_steps": 60, "train_wall_s": 71.8, "val_wall_s": 0.5,
                         "peak_gpu_mem_gib": 24.3, "val_bpb": metric},
        "val_bpb": metric, "baseline_val_bpb": 10.9, "improvement_frac": round((10.9 - metric) / 10.9, 4),
        "decision": "keep" if keep else "revert", "is_new_best": keep, "nim_latency_s": 1.3, "iter_wall_s": 74.2,
        **changed,
    }  # fmt: skip


def every_stage() -> list[dict[str, Any]]:
    """A file with each stage that the first format knows."""
    return [
        header(),
        attempt(1),
        {"iter": 2, "ts": "2026-04-25 18:02:00", "stage": "blocked", "verdict_ok": False, "rail": "R3_range",
         "proposal": {"knob": "lr", "new_value": 7, "reason": "big"}, "block_reason": "7 is outside 0..1"},
        {"iter": 3, "ts": "2026-04-25 18:03:00", "stage": "eval_failed", "candidate_cfg": {**BASE, "d_model": 1536},
         "proposal": {"knob": "d_model", "new_value": 1536, "reason": "more"}, "error": "CUDA out of memory"},
        {"iter": 4, "ts": "2026-04-25 18:04:00", "stage": "nim_error", "error": "request timed out"},
        {"iter": 5, "ts": "2026-04-25 18:05:00", "stage": "paused", "why": "asked"},
        attempt(5, "n_head", 8, 10.95),
        attempt(6, "precision", "bf16", 10.94),
        {"stage": "loop_complete", "iters_requested": 6, "accept_count": 1},
    ]  # fmt: skip


def as_bytes(records: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(record).encode() + b"\n" for record in records]


def random_history(turns: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    found = [header()]
    for turn in range(1, turns + 1):
        knob = rng.choice(list(MENU))
        found.append(attempt(turn, knob, rng.choice(MENU[knob]), round(rng.gauss(10.88, 0.02), 4)))
    return found
