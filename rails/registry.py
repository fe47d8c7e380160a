"""Finds rails by name among the installed packages' entry points, group `overnight.rails`.

A plugin's rail runs after the built-in ones, and only in campaigns that name it in `[rails] extra`: what is installed
never changes a campaign by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol, cast

from overnight.rails.gate import Rail
from overnight.rails.menu import Menu
from overnight.store.errors import CampaignError

GROUP = "overnight.rails"
BUILT_IN = frozenset({"R6_novelty", "R7_capability"})
"""Registered beside plugins so that `doctor` lists them; every campaign has them unless it skips them."""


@dataclass(frozen=True, slots=True)
class RailContext:
    """What a campaign hands to each rail that it builds."""

    campaign_dir: Path
    menu: Menu


class RailPlugin(Protocol):
    """What an entry point of the group names: a rail class that builds itself."""

    @classmethod
    def from_context(cls, context: RailContext) -> Rail:
        """Build the rail.

        Raises:
            CampaignError: it cannot enforce what it states in this campaign.
        """
        ...


def installed_rails() -> Sequence[EntryPoint]:
    """Return every installed rail's entry point, by name; imports none of them."""
    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def build_rails(names: Sequence[str], context: RailContext) -> list[Rail]:
    """Build the rails that a campaign names, in its order.

    Raises:
        CampaignError: one is not installed, is built in, does not load, or refuses the campaign.
    """
    return [_plugin(name).from_context(context) for name in names]


def _plugin(name: str) -> RailPlugin:
    if name in BUILT_IN:
        raise CampaignError(f"`rails.extra`: `{name}` is built in; every campaign has it already")
    points = [point for point in installed_rails() if point.name == name]
    if len(points) != 1:
        known = ", ".join(f"`{point.name}`" for point in installed_rails() if point.name not in BUILT_IN) or "none"
        what = "is offered by several packages" if points else "is not installed"
        raise CampaignError(f"`rails.extra`: the rail `{name}` {what}; installed besides the built-in ones: {known}")
    try:
        return cast(RailPlugin, points[0].load())
    except (ImportError, AttributeError) as error:
        raise CampaignError(f"`rails.extra`: the plugin `{points[0].value}` does not load: {error}") from error
