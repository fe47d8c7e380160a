"""Adapters on disk: `adapters/<campaign>/v<n>/` in peft's format, with what they were made of beside the weights.

An adapter is written to a temporary folder and renamed, so that a folder of that name is whole or not there. Reading
one back checks the hash of its weights and that it was trained on the base model at hand; pickled weights and code are
refused. Nothing here loads torch.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel as Model
from pydantic import ConfigDict, FiniteFloat, ValidationError

from overnight.store.errors import CampaignError, ProposerError
from overnight.store.hashing import JsonValue, file_digest

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RECORD = "overnight.json"
CARD = "README.md"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """What the campaign says about a training."""

    campaign: str
    version: str
    """`v<n>`: the n-th distillation of the campaign."""
    objective: str
    corpus_sha256: str
    cut: int
    """The last iteration that any target may know of."""
    corpus: Mapping[str, JsonValue] = field(default_factory=dict)
    """The corpus report: rows, knobs, pairs, ..."""
    augmentation: Mapping[str, JsonValue] = field(default_factory=dict)

    def plain(self) -> dict[str, JsonValue]:
        """Return the fields, to send or to write them."""
        return {name: getattr(self, name) for name in self.__slots__}


class AdapterRecord(Model):
    """`overnight.json`: what an adapter was made of, and what its files must hash to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, str]
    """SHA-256 of each file beside this one, the model card excepted."""
    base_model: str
    """As the campaign names it: a hub id, a folder or a file."""
    base_sha256: str
    """Content address of the base model's weights."""
    licence: str
    """Of the base model; the adapter is bound by it too."""
    facts: Mapping[str, object]
    """`AdapterFacts`: campaign, version, objective, corpus hash, cut, corpus report, augmentation."""
    recipe: dict[str, object]
    """`LoraRecipe`."""
    rows: int
    too_long: list[str]
    steps: int
    losses: list[FiniteFloat]
    """Mean over each epoch."""
    held_out_before: FiniteFloat | None
    held_out_after: FiniteFloat | None
    wall_s: FiniteFloat
    energy_j: FiniteFloat | None
    peak_memory_gib: FiniteFloat | None
    device: str
    versions: dict[str, str]
    """Of the libraries that trained it."""
    created_at: str

    @property
    def sha256(self) -> str:
        """Of the weights."""
        return self.files[WEIGHTS]


def refuse_existing(folder: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        CampaignError: the folder is there already.
    """
    if folder.exists():
        raise CampaignError(f"adapter `{folder}` is there already, and adapters are never overwritten; move it away")


def write_adapter(
    folder: Path, write: Callable[[Path], None], record: Callable[[dict[str, str]], AdapterRecord]
) -> AdapterRecord:
    """Write an adapter so that `folder` appears whole or not at all; return its record.

    Args:
        folder: must not exist.
        write: writes `WEIGHTS` and `CONFIG` into the folder that it is given.
        record: makes the record from the hashes of what was written.

    Raises:
        CampaignError: the folder is there already: adapters are never overwritten.
        ProposerError: the disk is full or cannot be written; nothing is left of the new adapter.
    """
    refuse_existing(folder)
    unfinished: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        write(unfinished)
        made = record({name: file_digest(unfinished / name) for name in (CONFIG, WEIGHTS)})
        (unfinished / CARD).write_text(model_card(made), encoding="utf-8")
        (unfinished / RECORD).write_text(made.model_dump_json(indent=2) + "\n")
        for file in unfinished.iterdir():
            _flush(file)
        unfinished.chmod(0o755)  # mkdtemp's folders are for one user alone
        unfinished.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise ProposerError(
            f"adapter `{folder}` could not be written: {error.strerror or error}; free space on that disk or mend its "
            "rights (nothing of it was kept, older adapters are as they were)",
            failure="llm_error",
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    return made


def sweep_unfinished(folder: Path) -> None:
    """Remove what killed trainings left in `folder`, where a campaign's one writer keeps its adapters."""
    for left in folder.glob(".v*-*"):
        shutil.rmtree(left, ignore_errors=True)


def model_card(record: AdapterRecord) -> str:
    """Return the `README.md` of an adapter: what it is, for people and for hubs."""
    facts, recipe = record.facts, record.recipe
    held_out = "no rows were held out"
    if record.held_out_before is not None and record.held_out_after is not None:
        held_out = f"{record.held_out_before:.4f} before, {record.held_out_after:.4f} after"
    losses = ", ".join(f"{loss:.4f}" for loss in record.losses)
    return f"""---
base_model: {json.dumps(record.base_model)}
library_name: peft
license: other
license_name: {json.dumps(record.licence)}
tags: [lora, overnight]
---

# {facts["campaign"]} {facts["version"]}

A LoRA adapter that proposes the next experiment of the campaign `{facts["campaign"]}`, trained by overnight on that
campaign's own history up to turn {facts["cut"]}. Made for that campaign's prompts; not meant for anything else.

- Base model: `{record.base_model}`. Its licence binds this adapter too: **{record.licence}**.
- Objective: {facts["objective"]}; {record.rows} rows, {record.steps} steps.
- Loss by epoch: {losses}. On held-out rows: {held_out}.
- LoRA r={recipe["r"]}, alpha={recipe["alpha"]}, dropout={recipe["dropout"]}; {record.wall_s:.1f} s on {record.device}.

`{RECORD}` holds all of it, with the hashes of these files.
"""


def read_record(folder: Path) -> AdapterRecord:
    """Return the record of the adapter in `folder`; the weights are not read.

    Raises:
        CampaignError: a file is missing, there are pickled weights, or the record is not one.
    """
    _refuse_pickles(folder)
    for name in (RECORD, CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CampaignError(f"adapter `{folder}` has no `{name}`; distil again, or give a whole adapter")
    try:
        record = AdapterRecord.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
        if not {CONFIG, WEIGHTS} <= record.files.keys():
            raise ValueError("it names no hash of the weights")
    except (ValidationError, ValueError) as error:
        raise CampaignError(
            f"adapter `{folder}`: `{RECORD}` is not what distilling writes ({str(error).splitlines()[0]}); distil again"
        ) from error
    return record


def verify_adapter(folder: Path, base_sha256: str) -> None:
    """Check an adapter before its weights are loaded: its own (`overnight.json`), or a foreign one in peft's format.

    Raises:
        CampaignError: a file is missing or was changed, weights are pickled, it was trained on another base model, or
            it asks for code to be run.
    """
    _refuse_pickles(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CampaignError(
            f"adapter `{folder}` has no `{missing[0]}`; give a folder in peft's format with safetensors "
            "(pickled weights are refused)"
        )
    _refuse_code(folder)
    if not (folder / RECORD).exists():  # trained elsewhere: nothing says what its hash should be
        return
    record = read_record(folder)
    for name, wanted in record.files.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise CampaignError(f"adapter `{folder}` has no `{name}`, which its record lists; distil again")
        if file_digest(folder / name) != wanted:
            raise CampaignError(
                f"adapter `{folder}`: `{name}` was changed after it was written (its SHA-256 is not the recorded one); "
                "restore it from a backup, or distil again"
            )
    if record.base_sha256 != base_sha256:
        raise CampaignError(
            f"adapter `{folder}` was trained on base model `{record.base_model}` ({record.base_sha256[:12]}), and this "
            f"one is another ({base_sha256[:12]}); set `base_model` back, or distil again"
        )


def _refuse_pickles(folder: Path) -> None:
    if not folder.is_dir():
        raise CampaignError(f"adapter `{folder}`: there is no such folder; give the folder of an adapter")
    for pattern in _PICKLES:
        for file in folder.glob(pattern):
            if not (folder / WEIGHTS).is_file():
                continue  # told as missing, with the remedy
            raise CampaignError(
                f"adapter `{folder}` holds pickled weights (`{file.name}`), which are refused; remove it"
            )


def _refuse_code(folder: Path) -> None:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CampaignError(f"adapter `{folder}`: `{CONFIG}` cannot be read ({error}); give a whole adapter") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CampaignError(f"adapter `{folder}`: `{CONFIG}` describes no LoRA adapter; give one in peft's format")
    if config.get("auto_mapping") or list(folder.glob("*.py")):
        raise CampaignError(f"adapter `{folder}` brings code of its own, which is never run; give one without")


def _flush(path: Path) -> None:
    """Have what was written to a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
