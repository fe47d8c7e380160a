"""Builds a campaign's proposers from its `[proposers.<name>]` tables, by the entry points of `overnight.proposers`.

The built-ins are found the way a stranger's plugin is. Only the kinds that a campaign names are imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from overnight.agent.proposers.protocol import Proposer, ProposerContext, ProposerPlugin
from overnight.store.errors import CampaignError

GROUP = "overnight.proposers"


@dataclass(frozen=True, slots=True)
class InstalledKind:
    """One kind of proposer that a campaign file may name."""

    kind: str
    target: str
    """`module:Class`."""
    distribution: str
    """The installed distribution that brings it, with its version."""


def installed_kinds() -> tuple[InstalledKind, ...]:
    """Return every installed kind, by name; imports none of them."""
    kinds = {
        InstalledKind(point.name, point.value, f"{point.dist.name} {point.dist.version}" if point.dist else "unknown")
        for point in entry_points(group=GROUP)
    }
    return tuple(sorted(kinds, key=lambda kind: (kind.kind, kind.target)))


def build_proposers(tables: Mapping[str, Mapping[str, object]], context: ProposerContext) -> dict[str, Proposer]:
    """Build every proposer of a campaign, in the file's order; when one cannot be built, close those before it.

    Raises:
        CampaignError: a table without `kind`, a kind that is not installed, or settings that it refuses.
    """
    built: dict[str, Proposer] = {}
    try:
        for name, table in tables.items():
            built[name] = build_proposer(name, table, context)
    except CampaignError:
        for proposer in built.values():
            proposer.close()
        raise
    return built


def build_proposer(name: str, table: Mapping[str, object], context: ProposerContext) -> Proposer:
    """Build the proposer of one `[proposers.<name>]` table.

    Raises:
        CampaignError: see `build_proposers`.
    """
    settings = dict(table)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str):
        raise CampaignError(f"`[proposers.{name}]` needs `kind`, one of {_listed()}")
    points = {point.value: point for point in entry_points(group=GROUP, name=kind)}
    if not points:
        raise CampaignError(f"`[proposers.{name}]`: no proposer of kind `{kind}` is installed; there are {_listed()}")
    if len(points) > 1:
        raise CampaignError(
            f"`[proposers.{name}]`: kind `{kind}` is offered by {' and '.join(sorted(points))}; uninstall all but one"
        )
    return _load(name, next(iter(points.values()))).from_settings(name, settings, context)


def _load(name: str, point: EntryPoint) -> ProposerPlugin:
    try:
        return cast(ProposerPlugin, point.load())
    except (ImportError, AttributeError) as error:
        raise CampaignError(
            f"`[proposers.{name}]`: the plugin `{point.value}` of kind `{point.name}` does not load: {error}"
        ) from error


def _listed() -> str:
    return ", ".join(sorted({f"`{kind.kind}`" for kind in installed_kinds()}))
