"""Whole adapters without a training: written as distilling writes them, around weights that nobody looks at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from overnight.distill.adapter import CONFIG, WEIGHTS, AdapterFacts, AdapterRecord, write_adapter
from overnight.store.hashing import JsonValue, text_digest


def make_adapter(
    home: Path,
    campaign: str,
    version: int,
    *,
    weights: str = "",
    r: int = 16,
    corpus: Mapping[str, JsonValue] | None = None,
) -> Path:
    """Write `adapters/<campaign>/v<version>` below `home`; return its folder."""
    folder = home / "adapters" / campaign / f"v{version}"

    def write(unfinished: Path) -> None:
        (unfinished / WEIGHTS).write_text(weights or f"the weights of {folder}")
        (unfinished / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": r}))

    def record(files: dict[str, str]) -> AdapterRecord:
        facts = AdapterFacts(
            campaign=campaign,
            version=f"v{version}",
            objective="clone",
            corpus_sha256="",
            cut=1,
            corpus=corpus or {},
        )
        return AdapterRecord(
            files=files, base_model="base", base_sha256=text_digest("base"), licence="apache-2.0", facts=facts.plain(),
            recipe={"r": r, "alpha": 32, "dropout": 0.0}, rows=1, too_long=[], steps=1, losses=[1.0],
            held_out_before=None, held_out_after=None, wall_s=1.0, energy_j=None, peak_memory_gib=None, device="none",
            versions={}, created_at="2026-01-01T00:00:00.000+00:00",
        )  # fmt: skip

    write_adapter(folder, write, record)
    return folder
