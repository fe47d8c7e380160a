"""Content addresses: SHA-256 over canonical JSON (RFC 8785 in spirit: sorted keys, no spaces, shortest floats).

One place hashes, so that a configuration has one identity whoever computes it. It relies on Python's `repr` of floats
being the shortest that round-trips. It does not promise equality with other languages' canonical JSON for floats
outside the double range, which are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

JsonValue = None | bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"]


def canonical_json(value: JsonValue) -> str:
    """Return the one JSON text that stands for `value`.

    Raises:
        ValueError: on NaN or an infinity, which JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: JsonValue) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 of the UTF-8 bytes of `text`, as 64 hexadecimal digits; lone surrogates are kept."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
