"""An adapter of a campaign inside a running vLLM: loaded under a versioned name, unloaded when a newer one answers.

The name holds the hash of the weights (`night-v3-1f0a9c22`), so that what a server lists under it is this adapter and
no other of that version. Which adapters it holds is asked of the server each time: it may have been restarted. The base
model under them cannot be verified beyond its name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from overnight.agent.proposers.chat import ChatSession, Refused
from overnight.agent.proposers.replies import ListedModel
from overnight.distill.adapter import read_record, verify_adapter

HASH_CHARS = 8


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """One version of a campaign's adapter, and where its server finds it."""

    version: str
    """As the campaign calls it: `v3`, or `other/v3` of another campaign."""
    folder: Path
    """Here: `adapters/<campaign>/v<n>`."""
    path: str
    """The same folder as the server sees it."""
    sha256: str
    """Of the weights."""
    base_sha256: str
    """Of the base model that it was trained on."""
    rank: int

    @classmethod
    def of(cls, version: str, folder: Path, *, root: str | None) -> Self:
        """Return the adapter in `folder`; its weights are not read yet.

        Args:
            version: the adapter's name in its campaign.
            folder: `adapters/<campaign>/v<n>`.
            root: where the server sees the folder `adapters`; None: where it is here.

        Raises:
            CampaignError: there is no whole adapter in `folder`.
        """
        record = read_record(folder)
        folder = folder.absolute()
        path = str(folder) if root is None else str(PurePosixPath(root, folder.parent.name, folder.name))
        rank = record.recipe.get("r")
        return cls(version, folder, path, record.sha256, record.base_sha256, rank if isinstance(rank, int) else 0)

    @property
    def campaign(self) -> str:
        """The campaign that trained it."""
        return self.folder.parent.name

    @property
    def name(self) -> str:
        """What it is called at the server."""
        return f"{self.campaign}-{self.folder.name}-{self.sha256[:HASH_CHARS]}"

    async def load(self, session: ChatSession, listed: Sequence[ListedModel]) -> None:
        """Make sure that the server has it; its files are checked before they are handed over.

        Raises:
            CampaignError: a file was changed or is missing.
            Refused: the server does not load it.
        """
        if self._is_in(listed):
            return
        verify_adapter(self.folder, self.base_sha256)
        try:
            await session.post("/load_lora_adapter", {"lora_name": self.name, "lora_path": self.path})
        except Refused as error:
            if self._is_in(await session.models()):
                return  # an earlier request, cut off, came through after all
            raise Refused(
                f"adapter `{self.name}` was not loaded from `{self.path}`: {error}; start vLLM with "
                f"`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`, `--enable-lora` and `--max-lora-rank {self.rank}` or more, "
                "and let it see that folder (`adapter_root` says where it does)"
            ) from None

    def _is_in(self, listed: Sequence[ListedModel]) -> bool:
        return any(model.id == self.name for model in listed)

    def replaced(self, listed: Sequence[ListedModel], in_use: Collection[str]) -> list[str]:
        """Return the names of this campaign's other adapters that the server holds and nobody here answers with.

        Only what has a name of ours and lies beside this adapter's folder is meant: never an adapter of somebody else.
        """
        ours = re.compile(rf"{re.escape(self.campaign)}-v\d+-[0-9a-f]{{{HASH_CHARS}}}")
        beside = PurePosixPath(self.path).parent
        return [
            model.id
            for model in listed
            if isinstance(model.root, str)
            and PurePosixPath(model.root).parent == beside
            and ours.fullmatch(model.id)
            and model.id not in in_use
        ]


async def unload(session: ChatSession, names: Sequence[str]) -> None:
    """Have the server drop adapters.

    Raises:
        Refused: it does not, or has no such adapter any more.
    """
    for name in names:
        await session.post("/unload_lora_adapter", {"lora_name": name})
