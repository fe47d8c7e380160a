"""Loads a base model: safetensors or GGUF, never a pickle and never remote code.

Runs in the model host only, so torch may be imported here. A GGUF file is dequantized once, into safetensors in the
user's cache, named after the file's SHA-256; the copy's own SHA-256 is checked at each load, and a copy that does not
match is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overnight.distill.base import BaseModel
from overnight.distill.fusing import fuse_norms
from overnight.store.errors import CampaignError, ProposerError
from overnight.store.hashing import file_digest

RECORD = "overnight.json"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A base model, ready to answer."""

    model: Any
    """A `transformers` causal language model, in evaluation mode, its parameters frozen."""
    tokenizer: Any
    device: torch.device
    sha256: str
    """Content address of the weights: over their files' hashes; a hub model's is its commit."""


def pick_device(wanted: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` stands for.

    Raises:
        CampaignError: a CUDA device is asked for where there is none.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise CampaignError(f'`device = "{wanted}"`: torch sees no CUDA device here; set `device = "auto"`')
    return torch.device(wanted)


def load_base(base: BaseModel, *, cache_dir: Path, device: torch.device) -> Loaded:
    """Load `base` in bf16 on a GPU and in float32 on a CPU.

    Raises:
        CampaignError: the files are not a model that may be loaded.
        ProposerError: a hub model is neither cached nor reachable.
    """
    if base.kind == "gguf":
        folder = dequantized(Path(base.where), base.sha256, cache_dir)
        return _load(str(folder), device, _record(folder)["source_sha256"])
    if base.kind == "folder":
        return _load(base.where, device, _combined(_weights(Path(base.where))))
    return _load(base.where, device, None)


def _load(where: str, device: torch.device, sha256: str | None) -> Loaded:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, trust_remote_code=False, use_safetensors=True, attn_implementation="sdpa"
        )
    except OSError as error:
        if sha256 is None:  # a hub id: not there, gated, without safetensors, or no network
            raise ProposerError(
                f"base model `{where}` cannot be loaded from the hub: {_first_line(error)}; check the id and the "
                "network, or give a folder",
                failure="llm_error",
            ) from error
        raise CampaignError(f"base model `{where}` cannot be loaded: {_first_line(error)}; mend the folder") from error
    except (ValueError, KeyError, ImportError, SafetensorError) as error:
        raise CampaignError(
            f"base model `{where}` cannot be loaded: {_first_line(error)}; give whole safetensors of an architecture "
            "that `transformers` knows (a model's own code is never run)"
        ) from error
    model.eval().requires_grad_(False)
    if device.type == "cuda":
        fuse_norms(model)
    commit = getattr(model.config, "_commit_hash", None)
    return Loaded(model.to(device), tokenizer, device, sha256 or str(commit))


def dequantized(gguf: Path, expected_sha256: str | None, cache_dir: Path) -> Path:
    """Return the folder of safetensors made from `gguf`, made now where it is not in the cache.

    Raises:
        CampaignError: the file is not the one that was pinned, or cannot be read.
    """
    found = file_digest(gguf)
    if expected_sha256 is not None and found != expected_sha256:
        raise CampaignError(
            f"`{gguf}` has the SHA-256 {found[:16]}..., not {expected_sha256[:16]}... as pinned; install it again"
        )
    folder = cache_dir / "models" / f"{gguf.stem}-{found[:16]}"
    if not _intact(folder, found):
        shutil.rmtree(folder, ignore_errors=True)
        _convert(gguf, found, folder)
    return folder


def _convert(gguf: Path, sha256: str, folder: Path) -> None:
    """Write the model beside `folder`, then rename: a half-written copy is never found under that name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        _dequantize(gguf, unfinished)
        record = {"source": gguf.name, "source_sha256": sha256, "weights": _weights(unfinished)}
        (unfinished / RECORD).write_text(json.dumps(record, indent=2))
        try:
            unfinished.rename(folder)
        except OSError:
            if not _intact(folder, sha256):  # not another process that was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _dequantize(gguf: Path, folder: Path) -> None:
    """Dequantize with `transformers` and save in bf16, whose rounding is a tenth of 4-bit quantization's and less."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        quantized: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise CampaignError(
            f"`{gguf}` cannot be read as a GGUF model: {_first_line(error)}; use one of an architecture that "
            "`transformers` dequantizes, or a folder of safetensors"
        ) from error
    config = quantized.config
    del config.quantization_config  # `save_pretrained` refuses a model that still says it is quantized
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        plain = factory.from_config(config, dtype=torch.bfloat16)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in quantized.state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _intact(folder: Path, source_sha256: str) -> bool:
    if not (folder / RECORD).is_file():
        return False
    record = _record(folder)
    return record == {**record, "source_sha256": source_sha256, "weights": _weights(folder)}


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text())
    except ValueError:
        record = {}
    return record if isinstance(record, dict) else {}


def _weights(folder: Path) -> dict[str, str]:
    return {file.name: file_digest(file) for file in sorted(folder.glob("*.safetensors"))}


def _combined(weights: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
