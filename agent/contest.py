"""Who proposes, who challenges, and how far the challenger is: from the campaign file, the switches and the duels.

The champion is who the last switch says, else the campaign file's. The challenger is the file's; a student challenges
with its newest adapter, and not before it has one. A proposer that serves adapters elsewhere takes part with the one
that its table asks for. Everything is derived from the store; what is remembered here is
valid while this process holds the lease. A campaign without a challenger and without a switch asks the store nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from overnight.agent.evidence import Evidence, share, weigh
from overnight.agent.inherit import inherited_adapter
from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.protocol import Answer, Ask, Proposer
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.race_gate import gains_by_turn, gate_of
from overnight.agent.router import Gate, Route, keeps_place, reigns, route_challenger, route_heldout, route_predecessor
from overnight.agent.runtime import Runtime
from overnight.store.contests import Contestant, DuelKind, Promotion, Race, RaceItem, adapter_version, label
from overnight.store.errors import CampaignError, ProposerError
from overnight.store.hashing import JsonValue
from overnight.store.protocol import CampaignState, Lease, StoreWriter

AdapterProposer = StudentProposer | OpenAIProposer
"""Whoever can answer with an adapter."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Somebody who takes part, with its id where the store knows it."""

    proposer: Proposer
    id: int | None


@dataclass(frozen=True, slots=True)
class Challenge:
    """A challenger, and how far it is."""

    proposer: Proposer
    id: int | None
    """None until the store knows it."""
    number: int
    """Which challenger of the campaign it is, from 1: what its share of `alpha` depends on."""
    distillation_id: int | None
    """The distillation that made it, for a student of this campaign."""
    evidence: Evidence
    gate: Gate
    race: Race | None
    route: Route

    @property
    def is_student(self) -> bool:
        """Whether it stays as it was trained: what looking back found of it does not change."""
        return isinstance(self.proposer, StudentProposer)


@dataclass(frozen=True, slots=True)
class Standing:
    """Who stands where between two turns."""

    champion: Proposer
    champion_id: int | None = None
    promoted_after: int | None = None
    """The turn after which the champion was promoted; None for one that the campaign file names."""
    predecessor: Proposer | None = None
    predecessor_id: int | None = None
    returning: Evidence | None = None
    """The reversed test: whether the predecessor proposes better."""
    back: Route | None = None
    challenge: Challenge | None = None


class Unusable:
    """Stands in for a contestant that cannot be used here, so that its turns fail and the campaign goes on."""

    def __init__(self, contestant: Contestant, why: str) -> None:
        self.name = contestant.name
        self.why = why
        self._contestant = contestant

    def propose(self, ask: Ask) -> Answer:  # noqa: ARG002
        """Say why there is no answer.

        Raises:
            ProposerError: always.
        """
        raise ProposerError(f"`{self._contestant.label}` cannot be used: {self.why}", failure="llm_error")

    def describe(self) -> Mapping[str, JsonValue]:
        """Return what identifies the contestant in the store."""
        return self._contestant.description

    def close(self) -> None:
        """Hold nothing, release nothing."""


def standing(runtime: Runtime, state: CampaignState) -> Standing:
    """Return who stands where; the store is asked again after `forget`, and where a new adapter was trained."""
    router = runtime.campaign.file.router
    if runtime.lease is None or runtime.stood is None or runtime.stood.lease is not runtime.lease:
        runtime.stood = Stood(runtime.lease, runtime.store.promotions(state.id))
    stood = runtime.stood
    if router.challenger is None and not stood.switches:
        return Standing(seated(runtime, state, runtime.campaign.champion))
    newest = _newest_adapter(runtime, state)
    if stood.standing is None or stood.newest != newest:
        stood.standing, stood.newest = _stand(runtime, state, stood.switches, newest), newest
        stood.clear_before = None
    return stood.standing


@dataclass(slots=True)
class Stood:
    """What was read, and under which lease: another holder may have changed it."""

    lease: Lease | None
    switches: Sequence[Promotion]
    """All switches, oldest first."""
    standing: Standing | None = None
    newest: tuple[int, str, str] | None = None
    clear_before: tuple[int, bool] | None = None
    """The turn before which nothing was due, and whether the budget was used up then."""


def is_contested(runtime: Runtime) -> bool:
    """Whether there may be duels and switches: the store need not be asked in a campaign without a challenger."""
    switches = () if runtime.stood is None else runtime.stood.switches
    return runtime.campaign.file.router.challenger is not None or bool(switches)


def forget(runtime: Runtime) -> None:
    """Have the store asked again: a duel was settled, a race is over, or the champion changed."""
    runtime.stood = None


def label_of(proposer: Proposer) -> str:
    """Return how a contestant is written: `student@v3`."""
    return label(proposer.name, proposer.describe())


def stored_id(writer: StoreWriter, proposer: Proposer) -> int:
    """Return a proposer's id, storing it as it is configured now."""
    description = proposer.describe()
    return writer.proposer(proposer.name, str(description.get("kind", proposer.name)), description)


def _newest_adapter(runtime: Runtime, state: CampaignState) -> tuple[int, str, str] | None:
    """Return distillation, version and folder of the challenger's newest adapter, where it is a student."""
    name = runtime.campaign.file.router.challenger
    if name is None or not isinstance(runtime.proposers[name], StudentProposer):
        return None
    return runtime.store.newest_adapter(state.id, name)


def _stand(
    runtime: Runtime, state: CampaignState, switches: Sequence[Promotion], newest: tuple[int, str, str] | None
) -> Standing:
    reign = reigns(switches)
    champion, promoted_after, predecessor = seated(runtime, state, runtime.campaign.champion), None, None
    if reign:
        last = reign[-1]
        champion, promoted_after = usable(runtime, state, last.to_proposer_id), last.iteration
        if last.from_proposer_id is not None:
            predecessor = usable(runtime, state, last.from_proposer_id)
    champion_id, predecessor_id = _id(runtime, state, champion), _id(runtime, state, predecessor)
    returning = None
    if promoted_after is not None and champion_id is not None and predecessor_id is not None:
        _, returning = weigh_pair(runtime, state, "return", champion_id, predecessor_id)
    return Standing(
        champion=champion,
        champion_id=champion_id,
        promoted_after=promoted_after,
        predecessor=predecessor,
        predecessor_id=predecessor_id,
        returning=returning,
        back=None if returning is None else route_predecessor(returning),
        challenge=_challenge(runtime, state, Seat(champion, champion_id), _deposed(switches), newest),
    )


def _switches(runtime: Runtime, state: CampaignState) -> Sequence[Promotion]:
    return runtime.store.promotions(state.id) if runtime.stood is None else runtime.stood.switches


def _deposed(switches: Sequence[Promotion]) -> set[int]:
    """Return who was rolled back: it does not challenge again, though a person may still promote it."""
    return {switch.from_proposer_id for switch in switches if switch.kind == "rollback" and switch.from_proposer_id}


def _id(runtime: Runtime, state: CampaignState, proposer: Proposer | None) -> int | None:
    return None if proposer is None else runtime.store.proposer_id(state.id, proposer.name, proposer.describe())


def usable(runtime: Runtime, state: CampaignState, proposer_id: int) -> Proposer:
    """Return a stored contestant as it can be asked here; one that cannot be used fails when it is asked."""
    contestant = runtime.store.contestant(proposer_id)
    plain = runtime.proposers.get(contestant.name)
    if plain is None:
        return Unusable(contestant, f"the campaign file has no `[proposers.{contestant.name}]`")
    version = adapter_version(contestant.description)
    if version is None or not isinstance(plain, AdapterProposer):
        return plain
    folder = adapter_folder(runtime, state, plain, version)
    if folder is None:
        return Unusable(contestant, f"no distillation of this store made its adapter {version}")
    return with_adapter(runtime, plain, version, folder, contestant)


def seated(runtime: Runtime, state: CampaignState, name: str) -> Proposer:
    """Return a proposer of the campaign file as it takes part now: one that serves adapters, with the one it wants."""
    plain = runtime.proposers[name]
    if not isinstance(plain, OpenAIProposer) or plain.wanted is None:
        return plain
    version = promoted_adapter(runtime, state) if plain.wanted == "promoted" else plain.wanted
    if version is None:
        return plain
    folder = adapter_folder(runtime, state, plain, version)
    if folder is None:
        description = {**plain.describe(), "adapter": {"version": version}}
        return Unusable(
            Contestant(0, name, "openai", description), f"no distillation of this store made adapter {version}"
        )
    return with_adapter(runtime, plain, version, folder)


def promoted_adapter(runtime: Runtime, state: CampaignState) -> str | None:
    """Return the version of the adapter that was promoted last and not rolled back."""
    promoted = (runtime.store.contestant(each.to_proposer_id) for each in reversed(reigns(_switches(runtime, state))))
    versions = (adapter_version(contestant.description) for contestant in promoted)
    return next((version for version in versions if version is not None), None)


def adapter_folder(runtime: Runtime, state: CampaignState, plain: AdapterProposer, version: str) -> str | None:
    """Return the folder of an adapter; one that serves adapters takes those of any student of the campaign."""
    if isinstance(plain, OpenAIProposer) and "/" not in version:
        version = f"{state.name}/{version}"
    return runtime.store.adapter_folder(state.id, plain.name, version)


def with_adapter(
    runtime: Runtime, plain: AdapterProposer, version: str, folder: str, contestant: Contestant | None = None
) -> Proposer:
    """Return a proposer with an adapter, the same object each time; what cannot be read fails when it is asked."""
    key = plain.name, version
    if key not in runtime.versions:
        try:
            runtime.versions[key] = plain.with_adapter(version, Path(folder))
        except CampaignError as error:
            description = {**plain.describe(), "adapter": {"version": version}}
            kind = str(description["kind"])
            return Unusable(contestant or Contestant(0, plain.name, kind, description), str(error))
    return runtime.versions[key]


def _challenge(
    runtime: Runtime,
    state: CampaignState,
    champion: Seat,
    deposed: set[int],
    newest: tuple[int, str, str] | None,
) -> Challenge | None:
    """Return who may take over: the newest, or the one before it while that is in the lead."""
    found = _candidate(runtime, state, newest)
    if found is None:
        return None
    proposer, distillation_id = found
    own = Seat(proposer, _id(runtime, state, proposer))
    incumbent = runtime.store.aliases(state.id).get("challenger")
    if (
        incumbent is not None
        and incumbent.id not in (own.id, champion.id, *deposed)
        and incumbent.name == proposer.name
    ):
        defending = _weigh(runtime, state, champion, Seat(usable(runtime, state, incumbent.id), incumbent.id), None)
        if keeps_place(defending.evidence):
            return defending
    if label_of(proposer) == label_of(champion.proposer) or own.id in deposed:
        return None
    return _weigh(runtime, state, champion, own, distillation_id)


def _candidate(
    runtime: Runtime, state: CampaignState, newest: tuple[int, str, str] | None
) -> tuple[Proposer, int | None] | None:
    router = runtime.campaign.file.router
    if router.challenger is None:
        return None
    proposer = runtime.proposers[router.challenger]
    if not isinstance(proposer, StudentProposer):
        return seated(runtime, state, router.challenger), None
    if newest is not None:
        distillation_id, version, folder = newest
        return with_adapter(runtime, proposer, version, folder), distillation_id
    inherited = inherited_adapter(runtime, state)
    if inherited is not None:
        return with_adapter(runtime, proposer, *inherited), None
    return (proposer, None) if proposer.describe()["adapter"] is not None else None


def _weigh(
    runtime: Runtime, state: CampaignState, champion: Seat, challenger: Seat, distillation_id: int | None
) -> Challenge:
    """Weigh what is stored of one challenger against the champion."""
    store, router = runtime.store, runtime.campaign.file.router
    champion_id, challenger_id = champion.id, challenger.id
    number, evidence = weigh_pair(runtime, state, "challenge", champion_id, challenger_id)
    race = None if challenger_id is None else store.last_race(state.id, challenger_id)
    looked: Sequence[RaceItem] = () if race is None else store.race_items(race.id)
    gate = gate_of(race, looked, challenger_id, champion_id, max_latency_s=router.max_latency_s)
    if router.evidence == "heldout":
        gains = gains_by_turn(looked, challenger_id), gains_by_turn(looked, champion_id)
        route = route_heldout(*gains, gate, ask=router.ask)
    else:
        route = route_challenger(evidence, gate, ask=router.ask)
    if route.action == "ask" and challenger_id is not None and _declined(runtime, state, challenger_id):
        route = Route("stay", f"a person said no to it; {route.reason}")
    return Challenge(challenger.proposer, challenger_id, number, distillation_id, evidence, gate, race, route)


def weigh_pair(
    runtime: Runtime,
    state: CampaignState,
    kind: DuelKind,
    champion_id: int | None,
    challenger_id: int | None,
    *,
    more: Sequence[float] = (),
) -> tuple[int, Evidence]:
    """Return which challenger of the campaign it is, from 1, and what its duels say, with `more` items to come."""
    store, alpha = runtime.store, runtime.campaign.file.router.alpha
    if champion_id is None or challenger_id is None:  # they never met
        met = list(store.challenges(state.id))
        return len(met) + 1, weigh(more, share(alpha, len(met) + 1))
    pair = {"champion_id": champion_id, "challenger_id": challenger_id}
    if kind == "return":
        reign = reigns(_switches(runtime, state))
        after = reign[-1].iteration if reign else 0
        return 1, weigh([*store.items_between(state.id, **pair, kind=kind, after=after), *more], alpha)
    met = list(store.challenges(state.id))
    number = met.index((champion_id, challenger_id)) + 1 if (champion_id, challenger_id) in met else len(met) + 1
    return number, weigh([*store.items_between(state.id, **pair, kind=kind), *more], share(alpha, number))


def gate_now(runtime: Runtime, state: CampaignState, challenger_id: int, champion_id: int) -> Gate:
    """Return whether looking back allows a challenger's promotion."""
    race = runtime.store.last_race(state.id, challenger_id)
    items: Sequence[RaceItem] = () if race is None else runtime.store.race_items(race.id)
    limit = runtime.campaign.file.router.max_latency_s
    return gate_of(race, items, challenger_id, champion_id, max_latency_s=limit)


def _declined(runtime: Runtime, state: CampaignState, challenger_id: int) -> bool:
    said = runtime.store.last_event(state.id, "promotion_declined")
    return said is not None and said[1].get("proposer_id") == challenger_id
