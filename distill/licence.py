"""Under which licence a base model may be used: read from the model's own files, or from a short list kept here.

An adapter is bound by its base model's licence, so that its model card names it. What a hub knows of a model is not
asked over the network: where nothing says, the answer is where to look. Nothing here loads torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from overnight.distill import bundled
from overnight.distill.base import BaseModel

_KNOWN = {
    "qwen/qwen2.5-3b": "Qwen Research License: for research and evaluation only, not for commercial use",
    "qwen/qwen2.5-3b-instruct": "Qwen Research License: for research and evaluation only, not for commercial use",
    "qwen/qwen2.5-0.5b-instruct": "apache-2.0",
    "qwen/qwen2.5-1.5b-instruct": "apache-2.0",
    "qwen/qwen2.5-7b-instruct": "apache-2.0",
    "huggingfacetb/smollm2-135m-instruct": "apache-2.0",
    "huggingfacetb/smollm2-360m-instruct": "apache-2.0",
    "huggingfacetb/smollm2-1.7b-instruct": "apache-2.0",
}
"""Of models that are often used here, by their hub ids in lower case: written down by hand, not read from the hub, so
that a model's own card decides."""
_CARD_CHARS = 20_000
_LICENCE = re.compile(r"^(license(?:_name|_link)?):[ \t]*(.+?)[ \t]*$", re.MULTILINE)


def licence_of(base: BaseModel) -> str:
    """Return the licence in a few words, or where to look for it."""
    match base.kind:
        case "gguf":
            found = bundled.LICENCE if base.sha256 == bundled.SHA256 else _of_gguf(Path(base.where))
        case "folder":
            found = _of_folder(Path(base.where))
        case "hub":
            found = _KNOWN.get(base.where.lower())
    if found:
        return found
    where = f"huggingface.co/{base.where}" if base.kind == "hub" else f"where `{base.where}` came from"
    return f"unknown: look at {where}"


def _of_gguf(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(str(file)).fields.get("general.license")
    return None if field is None else str(field.contents())


def _of_folder(folder: Path) -> str | None:
    """Return what the front matter of the folder's model card says."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")[:_CARD_CHARS]
    front = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    said = {key: value.strip("\"' ") for key, value in _LICENCE.findall(front)}
    name = said.get("license_name") if said.get("license", "other") == "other" else said["license"]
    link = said.get("license_link")
    return name and (f"{name} ({link})" if link else name)
