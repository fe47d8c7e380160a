"""Looks at this machine, whatever the campaign: Python, torch and its device, disk, database, plugins, the port."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from overnight.agent.doctor.finding import Finding, amiss, note, ok
from overnight.store.database import database_url
from overnight.store.errors import OvernightError

_TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
fp8 = cuda and torch.cuda.get_device_capability() >= (8, 9)
name = torch.cuda.get_device_name() if cuda else "CPU, %d threads" % torch.get_num_threads()
print(json.dumps({"torch": torch.__version__, "device": name, "cuda": cuda, "fp8": fp8}))
"""
TORCH_S = 120.0
PORT = 8001
"""Where `overnight serve` listens."""
MIN_FREE = 2 * 2**30
"""Bytes for token files, converted models and history, where no campaign says how much it needs."""


def python() -> Finding:
    """Look at the interpreter."""
    version = sys.version.split()[0]
    return ok("python", version) if sys.version_info >= (3, 11) else amiss("python", version, "install Python 3.11")


def torch() -> Finding:
    """Look at torch and its device, in a process of its own: this one stays without."""
    try:
        probe = subprocess.run(
            [sys.executable, "-P", "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=TORCH_S, check=True
        )
        found = json.loads(probe.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        return amiss("torch", type(error).__name__, "reinstall torch: `pip install --force-reinstall torch`")
    precisions = "float32" if not found["cuda"] else "float32, bf16, fp8" if found["fp8"] else "float32, bf16"
    return ok("torch", f"{found['torch']} on {found['device']} ({precisions})")


def store_folder(db: str) -> Path:
    """Return the folder that the store's files lie in; for a database on a server, the current one."""
    url = database_url(db)
    return Path(url.database).absolute().parent if url.get_backend_name() == "sqlite" and url.database else Path.cwd()


def disk(db: str, needed: int = MIN_FREE, what_for: str = "data and history") -> Finding:
    """Look whether the store's folder can be written and has room."""
    folder = store_folder(db)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"overnight")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return amiss("disk", f"`{folder}` cannot be written: {error.strerror}", "give another path with `--db`")
    found = f"{size(free)} free in {folder}, {size(needed)} needed for {what_for}"
    return ok("disk", found) if free >= needed else amiss("disk", found, f"free {size(needed - free)} there")


def size(count: int) -> str:
    """Return bytes as people read them."""
    if count < 2**20:
        return f"{max(count, 0) / 2**10:.0f} KiB"
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def database(db: str) -> Finding:
    """Look whether the store can be opened and is of this version."""
    from overnight.store.database import HEAD, is_missing
    from overnight.store.read_only import read_store

    if is_missing(db):
        return ok("database", f"{db} will be made by the first run, with schema {HEAD}")
    try:
        count = read_store(db, lambda store: len(store.campaigns()))
    except OvernightError as error:
        return amiss("database", error)
    return ok("database", f"schema {HEAD}, {count} campaigns")


def plugins() -> Iterator[Finding]:
    """List what is installed under the three entry-point groups, and what package it is from."""
    from overnight.agent.proposers.registry import installed_kinds
    from overnight.rails.registry import installed_rails
    from overnight.trainer.registry import installed_trainers

    try:
        trainers = installed_trainers().items()
    except OvernightError as error:
        yield amiss("trainers", error)
    else:
        listed = [f"{name} ({point.dist.name if point.dist else '?'})" for name, point in trainers]
        yield _listed("trainers", listed)
    yield _listed("proposers", [f"{kind.kind} ({kind.distribution})" for kind in installed_kinds()])
    rails = [f"{point.name} ({point.dist.name if point.dist else '?'})" for point in installed_rails()]
    yield _listed("rails", rails)


def _listed(what: str, names: list[str]) -> Finding:
    return ok(what, ", ".join(names)) if names else amiss(what, "none is installed", "reinstall overnight")


def port() -> Finding:
    """Look whether `overnight serve` finds its port free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError as error:
            return note("port", f"{PORT} on 127.0.0.1: {error.strerror}", "`overnight serve --port 0` takes a free one")
    return ok("port", f"{PORT} on 127.0.0.1 is free for `overnight serve`")
