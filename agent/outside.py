"""Which paths of a campaign file lead out of its folder: absolute ones, `..`, and symbolic links on the way.

A path is followed the way its reader follows it (a glob as `glob` does, a folder with all that is in it), and the walk
stops where it leaves the folder: what lies outside is named, never listed. Hard links cannot be told from files, and a
link made after the look is not seen.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path

_MAGIC = re.compile(r"[*?\[]")


def outside_file(folder: Path, name: str) -> list[str]:
    """Return where the one file `name` really is, if that is outside `folder`."""
    real = os.path.realpath(folder / os.path.expanduser(name))
    return [] if _within(real, os.path.realpath(folder)) else [real]


def outside_tree(folder: Path, name: str) -> list[str]:
    """Return what is read outside `folder` when everything in the folder `name` is."""
    found = outside_file(folder, name)
    return found or sorted(
        set(_links(os.path.realpath(folder / os.path.expanduser(name)), os.path.realpath(folder), {}))
    )


def outside_glob(folder: Path, pattern: str) -> list[str]:
    """Return what is read outside `folder` when every match of `pattern` is; a pattern that leaves it stands as it is.

    The pattern is relative to `folder`, with `**` for any number of folders.
    """
    root = os.path.realpath(folder)
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if os.path.isabs(pattern) or ".." in parts:
        fixed = os.path.realpath(os.path.join(root, *_before_magic(pattern)))
        leaves = ".." in parts or not _within(fixed, root)
        return [os.path.normpath(os.path.join(root, pattern))] if leaves else outside_tree(folder, fixed)
    return sorted(set(_matches(root, parts, root, set())))


def _before_magic(pattern: str) -> list[str]:
    """Return the leading parts of a pattern that are plain names; an absolute pattern's first is the root."""
    fixed = ["/"] if os.path.isabs(pattern) else []
    for part in pattern.split("/"):
        if _MAGIC.search(part):
            break
        fixed += [part] if part else []
    return fixed


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _matches(folder: str, parts: list[str], root: str, seen: set[tuple[str, int]]) -> Iterator[str]:
    """Yield the real places outside `root` that `parts`, followed from `folder`, come to."""
    key = (os.path.realpath(folder), len(parts))
    if not parts or key in seen:
        return
    seen.add(key)
    head, rest = parts[0], parts[1:]
    if head == "**":
        yield from _matches(folder, rest, root, seen)
        for path in _entries(folder):
            if os.path.isdir(path) or not rest:
                yield from _step(path, parts, root, seen)
    elif _MAGIC.search(head):
        fits = re.compile(fnmatch.translate(head)).match
        for path in _entries(folder):
            if fits(os.path.basename(path)):
                yield from _step(path, rest, root, seen)
    else:
        yield from _step(os.path.join(folder, head), rest, root, seen)


def _step(path: str, rest: list[str], root: str, seen: set[tuple[str, int]]) -> Iterator[str]:
    real = os.path.realpath(path) if os.path.islink(path) else path
    if not _within(real, root):
        yield real
    else:
        yield from _matches(real, rest, root, seen)


def _links(folder: str, root: str, seen: dict[str, None]) -> Iterator[str]:
    """Yield the real places outside `root` that links in `folder`, at any depth, come to."""
    if folder in seen:
        return
    seen[folder] = None
    for path in _entries(folder):
        real = os.path.realpath(path) if os.path.islink(path) else path
        if not _within(real, root):
            yield real
        elif os.path.isdir(real):
            yield from _links(real, root, seen)


def _entries(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries]
    except OSError:  # no folder, or not ours to read: its reader will say so
        return []
