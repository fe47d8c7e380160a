"""The adapters of one loaded base model: verified, loaded into its layers once, switched on and off.

peft keeps every adapter's weights beside the base's, so that switching costs nothing; the ones not used for longest are
dropped. Torch is imported here: for the model host only.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from overnight.distill.adapter import verify_adapter
from overnight.distill.model import Loaded
from overnight.distill.recipe import LoraRecipe
from overnight.store.errors import CampaignError

KEPT = 4
"""Adapters in memory: champion, challenger, the one in training and one more; of a 3B model 60 MB each in bf16."""


class AdapterShelf:
    """Adapters in the layers of one model.

    Args:
        loaded: the base model.
        dropped: told the folder of each adapter that leaves memory.
    """

    def __init__(self, loaded: Loaded, *, dropped: Callable[[str], object] = lambda _folder: None) -> None:
        self._model = loaded.model
        self._base_sha256 = loaded.sha256
        self._dropped = dropped
        self._peft: Any = None
        """peft's view of the model; made with the first adapter."""
        self._names: OrderedDict[str, str] = OrderedDict()
        """peft's name of each folder's adapter, the last used at the end."""
        self._made = 0

    @contextmanager
    def using(self, folder: str | None) -> Iterator[None]:
        """Have the model answer with an adapter inside the block, loaded at its first use; None: as it is.

        Raises:
            CampaignError: the adapter cannot be loaded.
        """
        if folder is None:
            if self._peft is None:
                yield
                return
            with self._peft.disable_adapter():
                yield
            return
        if folder not in self._names:
            self._load(folder)
        self._names.move_to_end(folder)
        self._peft.set_adapter(self._names[folder])
        self._model.requires_grad_(False)
        yield

    def fresh(self, recipe: LoraRecipe) -> str:
        """Put a new adapter that changes nothing yet into the layers, ready to be trained; return peft's name for it.

        Raises:
            CampaignError: the model has none of the layers that the recipe adapts.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=recipe.r,
            # A whole number where it is one, as other readers of the format want it; peft itself takes any.
            lora_alpha=int(recipe.alpha) if float(recipe.alpha).is_integer() else recipe.alpha,  # type: ignore[arg-type]
            lora_dropout=recipe.dropout,
            target_modules=list(recipe.targets),
            task_type="CAUSAL_LM",
        )
        name = self._name()
        torch.manual_seed(recipe.seed)
        try:
            with _quiet():
                if self._peft is None:
                    self._peft = get_peft_model(self._model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
        except ValueError as error:
            raise CampaignError(
                f"the base model has no layers named {', '.join(recipe.targets)} to adapt: {str(error)[:200]}"
            ) from error
        self._peft.set_adapter(name)
        self._model.requires_grad_(False)
        return name

    def keep(self, name: str, folder: str) -> None:
        """Have a trained adapter answer for the folder that it was written to, in the base's precision as written."""
        self._shelve(name, folder)

    def discard(self, name: str) -> None:
        """Take an adapter out of the layers."""
        self._peft.delete_adapter(name)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return an adapter's weights by the names of peft's format, in the base's precision, on the CPU."""
        from peft import get_peft_model_state_dict

        with _quiet():
            found = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        return {key: value.detach().to("cpu", self._model.dtype).contiguous() for key, value in found.items()}

    def config(self, name: str, base: str) -> str:
        """Return an adapter's configuration in peft's format."""
        said = self._peft.peft_config[name].to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}
        plain |= {"base_model_name_or_path": base, "inference_mode": True}
        return json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"

    def _load(self, folder: str) -> None:
        from peft import PeftModel
        from safetensors import SafetensorError

        verify_adapter(Path(folder), self._base_sha256)
        name = self._name()
        try:
            with _quiet():
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self._model, folder, adapter_name=name)
                else:
                    self._peft.load_adapter(folder, adapter_name=name)
        except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise CampaignError(f"adapter `{folder}` does not fit this base model: {str(error)[:300]}") from error
        self._shelve(name, folder)

    def _shelve(self, name: str, folder: str) -> None:
        self._names[folder] = name
        for module in self._model.modules():
            for part in ("lora_A", "lora_B"):
                if name in getattr(module, part, ()):
                    layer = getattr(module, part)[name]
                    layer.weight.grad = None  # of its training
                    layer.to(self._model.dtype)
        self._model.eval().requires_grad_(False)
        while len(self._names) > KEPT:
            gone, old = self._names.popitem(last=False)
            self._peft.delete_adapter(old)
            self._dropped(gone)

    def _name(self) -> str:
        self._made += 1
        return f"adapter{self._made}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out peft's warning that it asks `transformers` by an old name."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        yield
