"""What people allowed campaign files, remembered for each user: one file a permission, readable by that user alone.

A permission is bound to a campaign file's hash and to exactly what it wanted; either one changed is another permission.
Deleting a file takes a permission back. A file that another user owns or could have written counts for nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import platformdirs

from overnight.agent.wants import Want
from overnight.store import clock
from overnight.store.hashing import digest

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
WRITABLE_BY_OTHERS = 0o022


def permissions_folder() -> Path:
    """Return where permissions are kept: `$OVERNIGHT_DATA`, or the user's data folder."""
    return Path(os.environ.get("OVERNIGHT_DATA") or platformdirs.user_data_dir("overnight")) / "permissions"


def is_remembered(sha256: str, wants: Sequence[Want]) -> bool:
    """Say whether this user allowed exactly this file exactly these things."""
    path = _path(sha256, wants)
    return _is_ours_alone(path) and _is_ours_alone(path.parent)


def remember(sha256: str, wants: Sequence[Want], *, where: Path) -> Path:
    """Keep a permission, written whole or not at all; return its file.

    Raises:
        OSError: the user's data folder cannot be written.
    """
    path = _path(sha256, wants)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(PRIVATE_FOLDER)
    record = {
        "campaign": str(where),
        "sha256": sha256,
        "allowed": [asdict(want) for want in wants],
        "at": clock.utc_text(clock.time()),
    }
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE_FILE), "w") as file:
        json.dump(record, file, indent=2)
    draft.replace(path)
    return path


def _path(sha256: str, wants: Sequence[Want]) -> Path:
    key = digest({"sha256": sha256, "wants": [asdict(want) for want in wants]})
    return permissions_folder() / f"{key[:32]}.json"


def _is_ours_alone(path: Path) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & WRITABLE_BY_OTHERS
