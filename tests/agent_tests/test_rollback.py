"""The bundled model for real, from the command line: distilled, promoted, turned to noise, and rolled back."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomlkit
from safetensors.numpy import load_file, save_file

from overnight.agent.campaign import load_campaign
from overnight.agent.proposers.protocol import reply_text

WARM_TURNS = 14
PROBATION = 40
LIMIT_S = 3600
GOOD_RATES = [round(0.003 * 1.02**i, 6) for i in range(60)]
"""The quickstart's `lr` is 0.001: each of these gains several percent."""


def write_campaign(folder: Path, *, distill_every: int) -> None:
    """Write the quickstart with shorter trials: `one` knows good learning rates, `two` learns from the history."""
    spec = json.loads(json.dumps(load_campaign("quickstart").spec()))
    spec["campaign"] |= {"baseline": "fixed"}
    del spec["campaign"]["brief"]
    spec["budget"] = {"iterations": 200, "trial_timeout_s": 120}
    spec["decision"] |= {"min_gain": 0.04}
    spec["trainer"] |= {"steps": 40, "val_tokens": 8192}
    spec["proposers"] = {
        "one": {"kind": "scripted", "order": "drawn", "replies": [reply_text("lr", rate, "") for rate in GOOD_RATES]},
        "two": {"kind": "student", "base_model": "smollm2-135m", "mode": "score"},
        "random": {"kind": "random"},
    }
    spec["router"] = {
        "champion": "one",
        "challenger": "two",
        "warmup": True,
        "explore": 0.0,
        "duel_share": 0.0,
        "max_latency_s": 600.0,
    }
    spec["distill"] |= {"every": distill_every, "min_rows": 8, "min_knobs": 2, "min_pairs": 4, "max_share": 1.0}
    spec["distill"] |= {"holdout": 3, "epochs": 1, "batch": 4, "accumulation": 1, "augment": []}
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "campaign.toml").write_text(tomlkit.dumps(without_none(spec)))


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value


def overnight(folder: Path, *words: str) -> str:
    command = [str(Path(sys.executable).with_name("overnight")), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def asked(folder: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(f"file:{folder / 'overnight.db'}?mode=ro", uri=True)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def turn_to_noise(folder: Path) -> None:
    """Overwrite an adapter's weights with large random ones, and its record to match: it loads like any other."""
    weights, draw = folder / "adapter_model.safetensors", np.random.default_rng(0)
    noise = {
        name: (draw.standard_normal(tensor.shape) * 0.2).astype(tensor.dtype)
        for name, tensor in load_file(weights).items()
    }
    save_file(noise, weights, metadata={"format": "pt"})
    record = json.loads((folder / "overnight.json").read_text())
    record["files"][weights.name] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "overnight.json").write_text(json.dumps(record))


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
def test_an_adapter_that_turns_to_noise_after_its_promotion_is_rolled_back(tmp_path: Path) -> None:
    write_campaign(tmp_path, distill_every=WARM_TURNS)
    overnight(tmp_path, "run", "mine", "--iterations", str(WARM_TURNS + 1))
    assert asked(tmp_path, "SELECT version, failure FROM distillations") == [(1, None)]
    overnight(tmp_path, "promote", "mine", "two", "--reason", "to see it fall")
    (folder,) = asked(tmp_path, "SELECT adapter FROM distillations")[0]
    turn_to_noise(Path(folder))
    write_campaign(tmp_path, distill_every=200)
    overnight(tmp_path, "run", "mine", "--iterations", str(WARM_TURNS + 1 + PROBATION))
    columns = "iteration, kind, from_proposer, to_proposer"
    switches = asked(tmp_path, f"SELECT {columns} FROM promotion_log ORDER BY iteration")
    assert [switch[1:] for switch in switches] == [("promotion", "one", "two@v1"), ("rollback", "two@v1", "one")]
    assert switches[1][0] - switches[0][0] <= PROBATION
    noise = "FROM attempts JOIN proposers ON proposers.id = proposer_id WHERE name = 'two' AND role = 'duel_champion'"
    answered = asked(tmp_path, f"SELECT count(*) {noise} AND gain IS NOT NULL")[0][0]
    assert answered >= 3  # the noise was really asked, and what it proposed was really measured
    last = asked(
        tmp_path, "SELECT name FROM attempts JOIN proposers ON proposers.id = proposer_id ORDER BY attempts.id"
    )
    assert last[-1] == ("one",)
