"""What a campaign's `base_model` names: a bundled model, a hub id, a folder of safetensors or a GGUF file.

Decided in the control process, by looking at names and folders only; `overnight.distill.model` reads the weights, in
the model host. Pickled weights are refused here, before anything could open them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from overnight.distill import bundled
from overnight.store.errors import CampaignError

BaseKind = Literal["hub", "folder", "gguf"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model, by where its weights are."""

    kind: BaseKind
    where: str
    """A hub id, or an absolute path."""
    sha256: str | None = None
    """What the file must hash to, where that was pinned."""

    @property
    def name(self) -> str:
        """What people call it: the bundled model's name, a hub id, or a path."""
        return bundled.NAME if self.sha256 == bundled.SHA256 else self.where

    def plain(self) -> Mapping[str, str | None]:
        """Return the fields, to send them to the model host."""
        return asdict(self)


def find_base(name: str, folder: Path) -> BaseModel:
    """Return the base model that `name` stands for, paths taken from `folder`.

    Raises:
        CampaignError: nothing of that name, or weights that would have to be unpickled.
    """
    if name == bundled.NAME:
        return BaseModel("gguf", str(bundled.bundled_gguf()), bundled.SHA256)
    path = (folder / Path(name).expanduser()).absolute()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise CampaignError(f"base model `{name}`: there is no file `{path}`; give a path to a GGUF file")
        return BaseModel("gguf", str(path))
    if path.is_dir():
        _check_folder(name, path)
        return BaseModel("folder", str(path))
    if _HUB_ID.fullmatch(name):
        return BaseModel("hub", name)
    raise CampaignError(
        f"base model `{name}`: neither `{bundled.NAME}`, nor a hub id such as `Qwen/Qwen2.5-3B-Instruct`, nor a folder "
        f"of safetensors or a `.gguf` file below `{folder}`; name one of these"
    )


def _check_folder(name: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise CampaignError(f"base model `{name}`: `{path}` has no `config.json`; give the folder that has one")
    if not any(path.glob("*.safetensors")):
        raise CampaignError(
            f"base model `{name}`: `{path}` has no `*.safetensors`, and pickled weights are refused; convert them with "
            "`save_pretrained(..., safe_serialization=True)`"
        )
