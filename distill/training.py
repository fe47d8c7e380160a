"""One distillation in the model host: rows in, a verified adapter on disk and in memory out.

Encodes the rows, leaves out those that are too long, keeps to the memory that it is given, trains, measures what was
held out before and after, and writes the adapter with its record and model card. Torch is imported here: for the model
host only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from overnight.distill.adapter import (
    CONFIG,
    WEIGHTS,
    AdapterFacts,
    AdapterRecord,
    refuse_existing,
    write_adapter,
)
from overnight.distill.base import BaseModel
from overnight.distill.chat import ChatEncoder
from overnight.distill.encoding import EncodedRow, encode_row
from overnight.distill.licence import licence_of
from overnight.distill.lora import LoraTraining, News
from overnight.distill.memory import Allowance, bytes_a_token
from overnight.distill.model import Loaded
from overnight.distill.recipe import LoraRecipe
from overnight.distill.rows import read_rows
from overnight.distill.shelf import AdapterShelf
from overnight.store.errors import CampaignError
from overnight.trainer.energy import Energy, find_meter

TELL_S = 0.2
"""Shortest time between two pieces of news."""
LIBRARIES = ("torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the control process asks for, as `ModelHost.train` documents."""

    rows: Path
    held_out: Path
    recipe: LoraRecipe
    facts: AdapterFacts
    folder: Path
    memory_gib: float | None

    @classmethod
    def parse(cls, question: Mapping[str, Any]) -> Order:
        """Return what a question says."""
        recipe = {**question["recipe"], "targets": tuple(question["recipe"]["targets"])}
        return cls(
            rows=Path(question["rows"]),
            held_out=Path(question["held_out"]),
            recipe=LoraRecipe(**recipe),
            facts=AdapterFacts(**question["facts"]),
            folder=Path(question["folder"]),
            memory_gib=question["memory_gib"],
        )


def train_adapter(
    base: BaseModel, loaded: Loaded, shelf: AdapterShelf, order: Order, tell: Callable[[News], None]
) -> AdapterRecord:
    """Train an adapter, write it, and have it answer for its folder; return its record.

    Raises:
        CampaignError: no row is short enough, the folder is there already, or the model cannot be trained.
        ProposerError: memory, disk or the loss failed.
    """
    refuse_existing(order.folder)
    encoder = ChatEncoder(loaded.tokenizer)
    rows, too_long = _encoded(order.rows, encoder, order.recipe.max_length)
    held_out, _ = _encoded(order.held_out, encoder, order.recipe.max_length)
    if not rows:
        raise CampaignError(
            f"none of the {len(too_long)} training rows is within `max_length = {order.recipe.max_length}` tokens; "
            "raise `max_length` in `[distill]`, or lower `recent` in `[prompt]`"
        )
    name = shelf.fresh(order.recipe)
    allowance = Allowance(loaded.device, order.memory_gib)
    most = allowance.tokens(bytes_a_token(loaded.model))
    with allowance.enforced():
        training = LoraTraining(loaded.model, name, order.recipe, most_tokens=most)
        before = training.evaluate(held_out) if held_out else None
        with _energy(loaded.device) as energy:
            trained = training.run(rows, _seldom(tell))
        after = training.evaluate(held_out) if held_out else None
        peak = allowance.peak_gib()
    del training
    weights = shelf.weights(name)
    licence = licence_of(base)

    def record(files: dict[str, str]) -> AdapterRecord:
        return AdapterRecord(
            files=files,
            base_model=base.name,
            base_sha256=loaded.sha256,
            licence=licence,
            facts=order.facts.plain(),
            recipe=asdict(order.recipe),
            rows=len({row.id.partition("/")[0] for row in rows}),
            too_long=list(dict.fromkeys(too_long)),
            steps=trained.steps,
            losses=trained.losses,
            held_out_before=before,
            held_out_after=after,
            wall_s=trained.wall_s,
            energy_j=energy.joules,
            peak_memory_gib=peak,
            device=_device_name(loaded.device),
            versions={library: version(library) for library in LIBRARIES},
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )

    def write(folder: Path) -> None:
        from safetensors.torch import save

        (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
        (folder / CONFIG).write_text(shelf.config(name, base.name))

    written = write_adapter(order.folder, write, record)
    shelf.keep(name, str(order.folder))
    return written


def _encoded(file: Path, encoder: ChatEncoder, max_length: int) -> tuple[list[EncodedRow], list[str]]:
    """Return the rows of a file in tokens, and the ids of those above `max_length`."""
    rows = [encode_row(row, encoder) for row in read_rows(file)]
    return [r for r in rows if r.length <= max_length], [r.id for r in rows if r.length > max_length]


@contextmanager
def _energy(device: torch.device) -> Iterator[Energy]:
    gpu = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    with Energy(find_meter(gpu=gpu)) as energy:
        yield energy


def _seldom(tell: Callable[[News], None]) -> Callable[[News], None]:
    """Tell of the first and last step, and between them at most every `TELL_S`."""
    last = -TELL_S

    def told(news: News) -> None:
        nonlocal last
        now = time.monotonic()
        if news.step == news.steps or now - last >= TELL_S:
            last = now
            tell(news)

    return told


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
