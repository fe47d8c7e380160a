"""What a campaign file wants that a file from somebody else must not get unasked.

A command or a Python function, a plugin, a path outside the campaign's folder, a key for a host that is not this one.
The file is only read here: no plugin is imported, no path outside the folder is opened, no name is looked up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal
from urllib.parse import urlsplit

from overnight.agent.campaign import Campaign
from overnight.agent.outside import outside_file, outside_glob, outside_tree
from overnight.agent.proposers.registry import GROUP as PROPOSERS
from overnight.distill import bundled
from overnight.rails.registry import BUILT_IN as RAILS_BUILT_IN
from overnight.rails.registry import GROUP as RAILS
from overnight.report.gate import is_loopback
from overnight.trainer.registry import GROUP as TRAINERS

OURS = "overnight"
"""The distribution whose entry points are no plugins."""
KNOWN: Mapping[str, frozenset[str]] = {
    TRAINERS: frozenset({"gpt", "command", "function", "scripted"}),
    PROPOSERS: frozenset({"openai", "student", "random", "optuna", "scripted"}),
    RAILS: RAILS_BUILT_IN,
}
"""What this file knows the settings of; anything else, ours or not, is asked for like a plugin."""
Part = Literal["brief", "trainer", "proposers", "rails", "notify"]
"""Which part of a run uses it."""
Kind = Literal["command", "code", "plugin", "path", "key"]


@dataclass(frozen=True, slots=True, order=True)
class Want:
    """One thing that a campaign file wants."""

    part: Part
    kind: Kind
    key: str
    """The key of the file that says so."""
    what: str
    """All of it, untrusted text; a permission is for exactly this."""


def wants_of(campaign: Campaign) -> tuple[Want, ...]:
    """Return what the file wants, in a fixed order."""
    found = [*_brief(campaign), *_trainer(campaign), *_proposers(campaign), *_rails(campaign), *_notify(campaign)]
    return tuple(sorted(set(found)))


def _brief(campaign: Campaign) -> Iterator[Want]:
    brief = campaign.file.campaign.brief
    if brief is not None:
        yield from _paths("brief", "campaign.brief", outside_file(campaign.folder, brief))


def _trainer(campaign: Campaign) -> Iterator[Want]:
    name, settings = campaign.file.campaign.trainer, campaign.file.trainer
    folder = os.path.realpath(campaign.folder)
    yield from _plugin("trainer", "campaign.trainer", TRAINERS, name)
    if name == "gpt" and isinstance(data := settings.get("data"), str) and data != "stdlib":
        local = data.removeprefix("hf:")
        find = outside_glob if local == data else outside_tree
        yield from _paths("trainer", "trainer.data", find(campaign.folder, local))
    if name == "function" and isinstance(function := settings.get("function"), str):
        yield Want("trainer", "code", "trainer.function", f"{function}, looked for in {folder} and what is installed")
    if name == "command":
        cwd = os.path.realpath(campaign.folder / str(settings.get("cwd", ".")))
        for key in ("command", "holdout_command"):
            yield from _command("trainer", f"trainer.{key}", settings.get(key), cwd, settings.get("env"))
        for pattern in _words(settings.get("data_files")):
            yield from _paths("trainer", "trainer.data_files", outside_glob(campaign.folder, pattern))


def _proposers(campaign: Campaign) -> Iterator[Want]:
    for name, table in campaign.file.proposers.items():
        key, kind = f"proposers.{name}", table.get("kind")
        yield from _plugin("proposers", f"{key}.kind", PROPOSERS, str(kind))
        if kind == "openai":
            yield from _key(key, table)
            yield from _served(key, table)
        for setting in ("base_model", "adapter") if kind == "student" else ():
            value = table.get(setting)
            if isinstance(value, str) and value != bundled.NAME:
                yield from _paths("proposers", f"{key}.{setting}", outside_tree(campaign.folder, value))


def _rails(campaign: Campaign) -> Iterator[Want]:
    for name in campaign.file.rails.extra:
        yield from _plugin("rails", "rails.extra", RAILS, name)


def _notify(campaign: Campaign) -> Iterator[Want]:
    section = campaign.file.notify
    folder = os.path.realpath(campaign.folder)
    yield from _command("notify", "notify.command", section.command, folder, section.env)


def _command(part: Part, key: str, words: object, folder: str, env: object) -> Iterator[Want]:
    if listed := _words(words):
        seen = f", which sees the variables {', '.join(_words(env))}" if _words(env) else ""
        yield Want(part, "command", key, f"{json.dumps(listed, ensure_ascii=False)} in {folder}{seen}")


def _paths(part: Part, key: str, paths: Sequence[str]) -> Iterator[Want]:
    return (Want(part, "path", key, path) for path in paths)


def _plugin(part: Part, key: str, group: str, name: str) -> Iterator[Want]:
    for point in entry_points(group=group, name=name):
        if name not in KNOWN[group] or not _is_ours(point):
            source = point.dist.name if point.dist else "an unknown package"
            yield Want(part, "plugin", key, f"{name} from {source} ({point.value})")


def _is_ours(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == OURS and point.value.startswith(f"{OURS}.")


def _key(key: str, table: Mapping[str, object]) -> Iterator[Want]:
    variable, url = table.get("api_key_env"), table.get("base_url")
    if variable is None or not isinstance(url, str):
        return
    try:
        parts = urlsplit(url)
        host, where = parts.hostname or "", f"{parts.scheme}://{parts.netloc}"
    except ValueError:  # no URL: its proposer will say so; nobody is sent a key
        return
    if not is_loopback(host):
        yield Want("proposers", "key", key, f"the value of {variable} to {where}")


def _served(key: str, table: Mapping[str, object]) -> Iterator[Want]:
    """Yield the folder outside this machine's view that a server is told to load adapters from."""
    root, url = table.get("adapter_root"), table.get("base_url")
    if isinstance(root, str):
        yield Want("proposers", "path", f"{key}.adapter_root", f"{root}, as the server at {url} sees it")


def _words(value: object) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list | tuple) else []


def shown(text: str, limit: int = 2000) -> str:
    """Return untrusted text for a terminal: what is not plain ASCII is spelt out, a long one is cut and says so."""
    plain = text.encode("ascii", "backslashreplace").decode()
    plain = "".join(char if char.isprintable() else repr(char)[1:-1] for char in plain)
    return plain if len(plain) <= limit else f"{plain[:limit]}... ({len(plain) - limit} more characters; read the file)"
