"""One proposal on a campaign's rails, without a run: what `overnight check` and the MCP server answer from."""

from __future__ import annotations

from pathlib import Path

from overnight.agent.campaign import Campaign, parse_campaign
from overnight.agent.run import rails_of
from overnight.agent.runtime import results_in_words
from overnight.rails.gate import NoveltyRail, Verdict, check_reply
from overnight.store.protocol import CampaignState, TrajectoryStore
from overnight.store.records import Config


def stored_campaign(state: CampaignState) -> Campaign:
    """Return the campaign as the store has it: its file may have gone or changed since.

    Raises:
        CampaignError: it has no campaign file that could be run, as an imported trajectory has none.
    """
    return parse_campaign(state.spec, Path(state.path or state.name))


def check_proposal(
    reply: str, campaign: Campaign, known: tuple[TrajectoryStore, CampaignState] | None = None
) -> Verdict:
    """Put a reply through the rails.

    Args:
        reply: the text, as a proposer would give it.
        campaign: whose menu and rails judge it.
        known: the store and its state of the campaign; without them its baseline is the defaults and nothing was tried.

    `R7_capability` is left to the run, which knows the machine.

    Raises:
        CampaignError: a rail that the campaign names is not installed, or refuses it.
    """
    menu, baseline = campaign.menu, campaign.menu.default
    if known is not None and known[1].baseline_config_id is not None:
        baseline = known[0].config_of(known[1].baseline_config_id)

    def earlier(config: Config) -> str | None:
        return None if known is None else results_in_words(*known, menu, [config])[0]

    novelty = [] if "R6_novelty" in campaign.file.rails.skip else [NoveltyRail(earlier)]
    return check_reply(reply, menu=menu, baseline=baseline, rails=[*novelty, *rails_of(campaign)])
