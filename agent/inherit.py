"""`[router] inherit`: the adapter that a campaign's challenger begins with, the one of another campaign's champion.

It is looked up until it took part here. From then on the challenger stays what it was, whatever becomes of the other
campaign's champion meanwhile, and a campaign that has taken a turn goes on whatever can be inherited.
"""

from __future__ import annotations

from overnight.agent.proposers.student import StudentProposer
from overnight.agent.router import reigns
from overnight.agent.runtime import Runtime
from overnight.store.contests import adapter_version
from overnight.store.errors import CampaignError
from overnight.store.protocol import CampaignState


def check_inherited(runtime: Runtime) -> None:
    """Refuse a campaign that could not begin with what its file names, before anything is measured for it.

    Raises:
        CampaignError: there is no such campaign, or its champion has no adapter.
    """
    challenger = runtime.campaign.file.router.challenger
    if challenger is not None and isinstance(runtime.proposers.get(challenger), StudentProposer):
        inherited_adapter(runtime, runtime.store.campaign(runtime.name))


def inherited_adapter(runtime: Runtime, state: CampaignState | None) -> tuple[str, str] | None:
    """Return version and folder of the adapter that the challenger has until one is distilled here.

    Args:
        runtime: the campaign.
        state: None for a campaign that the store does not know yet.

    Raises:
        CampaignError: the store has no such campaign, or, before the first turn, its champion has no adapter.
    """
    router, store = runtime.campaign.file.router, runtime.store
    name, challenger = router.inherit, router.challenger
    if not name or challenger is None:
        return None
    if state is not None:
        known = next((each for each in store.known_versions(state.id, challenger) if each.startswith(f"{name}/")), None)
        folder = None if known is None else store.adapter_folder(state.id, challenger, known)
        if known is not None and folder is not None:
            return known, folder
    where = f"{runtime.campaign.path}: `router.inherit`"
    other = store.campaign(name)
    if other is None:
        raise CampaignError(f"{where}: this store has no campaign `{name}`; name one that it has, or drop the key")
    found = _of_champion(runtime, other)
    if found is None and (state is None or store.last_attempt(state.id) is None):
        raise CampaignError(f"{where}: the champion of `{name}` has no adapter to start from; drop the key")
    return found


def _of_champion(runtime: Runtime, other: CampaignState) -> tuple[str, str] | None:
    reign = reigns(runtime.store.promotions(other.id))
    if not reign:
        return None
    champion = runtime.store.contestant(reign[-1].to_proposer_id)
    version = adapter_version(champion.description)
    folder = None if version is None else runtime.store.adapter_folder(other.id, champion.name, version)
    return None if folder is None else (f"{other.name}/{version}", folder)
