"""What every node of one running campaign shares: the store under its lease, the trainer, the proposers, the events.

A runtime belongs to one process and is not shared between threads that write. It holds no history: what it caches is
either fixed for the life of the process (the trainer's answers about a configuration) or keyed by the attempt it
belongs to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from overnight.agent.campaign import Campaign
from overnight.agent.events import Event, EventBuffer, EventStream, Hooks
from overnight.agent.faults import FaultLog
from overnight.agent.proposers.protocol import Proposer
from overnight.agent.seeds import decision_seeds
from overnight.agent.signals import PauseRequested, PauseSwitch
from overnight.agent.state import BudgetSpent
from overnight.rails.capability import CapabilityRail
from overnight.rails.gate import NoveltyRail, Rail
from overnight.rails.menu import Menu
from overnight.store import clock
from overnight.store.errors import CampaignError, StorageFaultError
from overnight.store.hashing import JsonValue, digest
from overnight.store.protocol import Attempt, CampaignState, Lease, StoreWriter, SumOfSquares, TrajectoryStore, Trial
from overnight.store.records import Config, Split, TrainerInfo
from overnight.store.writer import trainer_hash
from overnight.trainer.noise import Noise, Spread, paired_noise, trial_noise
from overnight.trainer.protocol import Trainer

if TYPE_CHECKING:
    from overnight.agent.contest import Stood

T = TypeVar("T")
NOTHING_KNOWN = Spread(0.0, 0)
RENEW_EVERY_S = 20.0
"""How often a long trial renews the lease: six times before another machine takes its holder for dead."""


@dataclass(kw_only=True)
class Runtime:
    """One campaign being run by this process."""

    campaign: Campaign
    store: TrajectoryStore
    trainer: Trainer
    proposers: Mapping[str, Proposer]
    extra_rails: Sequence[Rail] = ()
    hooks: Sequence[Hooks] = ()
    free_memory: Callable[[], int | None] = lambda: None
    """Bytes that a trial may take now, or None where nobody can tell."""
    pause_wanted: Callable[[], str | None] = lambda: None
    """Why the campaign should pause before its next trial, or None."""
    switch: PauseSwitch = field(default_factory=PauseSwitch)
    """Hears signals, where the process that runs the campaign listens for them."""
    clock: Callable[[], float] = clock.time
    deadline: float | None = None
    """When `budget.until` comes, in seconds since the epoch."""
    iterations: int | None = None
    """Pause after this many turns in all, if that is before the budget's end."""
    until: float | None = None
    """Pause at this time, in seconds since the epoch."""
    trial_ends_by: float | None = None
    """When the trial under way is dropped, so that what has to follow fits before the deadline."""
    has_measured: bool = False
    """Whether a trial of this process measured something: what fails later than that is waited out."""
    waits_out_faults: bool = True
    """False: somebody sits and waits for the result, so a fault is raised at once."""
    answered: set[str] = field(default_factory=set)
    """The proposers that have answered in this process."""
    info: TrainerInfo | None = None
    """The prepared trainer; None before `run_campaign` or a host's first turn."""
    lease: Lease | None = None
    _buffer: EventBuffer = field(default_factory=EventBuffer)
    _renewed_at: float = 0.0
    trials: dict[tuple[str, Split], Sequence[Trial]] = field(default_factory=dict)
    """The baseline's trials as last read; the one writer of a campaign knows when they change."""
    own_trials: dict[int, Sequence[Trial]] = field(default_factory=dict)
    """The candidate's trials as last read, by attempt."""
    stood: Stood | None = None
    """Who stands where, as last read (`overnight.agent.contest`)."""
    versions: dict[tuple[str, str], Proposer] = field(default_factory=dict)
    """Students with their adapters, by name and version."""
    deferred: set[int] = field(default_factory=set)
    """Challengers about whom this process asked a person without getting an answer."""
    ask_person: Callable[[Mapping[str, JsonValue]], str] = lambda _question: "later"
    """Puts a question of the graph to a person: `yes`, `no` or `later`."""
    _state: CampaignState | None = None
    _noise: Noise | None = None
    _noise_known: bool = False
    _audits: tuple[Mapping[str, str], int, Spread] | None = None
    """Where audits were measured, the newest of them, and their spread."""
    _unsupported: dict[str, str | None] = field(default_factory=dict)
    _memory: dict[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.events = EventStream(self._buffer, self.hooks)
        self.faults = FaultLog(self)

    @property
    def name(self) -> str:
        """The campaign's name."""
        return self.campaign.name

    def emit(self, event: Event) -> None:
        """Send an event to everyone who watches."""
        self.events.emit(event)

    def state(self) -> CampaignState:
        """Return where the campaign stands, made in the store if it is new."""
        state = self._state or self.store.campaign(self.name) or self.record_file()
        # Nobody else writes while the lease is held, so what was read stays true until this process writes.
        self._state = state if self.lease is not None else None
        return state

    def record_file(self) -> CampaignState:
        """Have the store know the campaign, with its file as it is now."""
        file = self.campaign
        return self.store.open_campaign(
            name=file.name,
            path=str(file.path),
            spec=file.spec(),
            frozen_hash=file.frozen_hash(),
            knobs_on_menu=len(file.menu.knobs),
        )

    @contextmanager
    def writing(self, *, changes_campaign: bool = False, changes_noise: bool = False) -> Iterator[StoreWriter]:
        """One transaction under the lease, taken if this process has not got it; waiting events go with it.

        An event emitted inside is committed with what it says and told after that, or neither.

        `changes_campaign` and `changes_noise` say what has to be read again after it.
        """
        lease = self.lease or self._acquire()
        self.renew()  # trials may be so short that nobody waits for one, and `idle` is not called
        with self.events.transaction():
            with self.store.writing(lease) as writer:
                yield writer
                self.faults.tell_over("storage")  # committed with the write that shows it, be it the last one
                for event in self._buffer.waiting():
                    writer.event(event.kind, event.payload, iteration=event.iteration, at=event.at)
            self.faults.forget("storage")
            if changes_campaign:
                self._state = None
            if changes_noise:
                self._noise_known = False

    def _acquire(self) -> Lease:
        self.lease = self.store.acquire(self.state().id)
        self._renewed_at = clock.time()
        return self.lease

    def waiting(self) -> AbstractContextManager[None]:
        """Around a trial, an answer or a hold: SIGTERM ends it at once.

        Raises:
            PauseRequested: it did.
        """
        return self.switch.waiting()

    def idle(self) -> None:
        """Called about every second while a trial runs: shows that this writer is alive, and ends what must end.

        Raises:
            PauseRequested: SIGTERM came.
            BudgetSpent: the trial under way would take the time that the end of the campaign needs.
            LeaseLostError: another process took the lease.
        """
        if self.switch.urgent:
            raise PauseRequested
        if self.trial_ends_by is not None and self.clock() >= self.trial_ends_by:
            raise BudgetSpent("until")
        self.renew()

    def renew(self) -> None:
        """Show that this writer is alive, every 20 s; a disk that refuses it is the next write's concern."""
        now = clock.time()
        if self.lease is None or 0 <= now - self._renewed_at <= RENEW_EVERY_S:
            return
        with suppress(StorageFaultError):
            self.store.renew(self.lease)
        self._renewed_at = now

    def rest(self) -> None:
        """Give the lease back between turns, and forget what only its holder may rely on."""
        lease, self.lease = self.lease, None
        self._state, self._noise_known = None, False
        self.trials.clear()
        self.own_trials.clear()
        if lease is not None:
            self.store.release(lease)

    def close(self) -> None:
        """Give the lease back and close what was opened."""
        try:
            if self.lease is not None:
                with suppress(StorageFaultError):  # the lease of a process that ended is free all the same
                    self.store.release(self.lease)
                self.lease = None
        finally:
            self.trainer.close()
            for proposer in self.proposers.values():
                proposer.close()

    def draw_seed(self, purpose: str, iteration: int, try_no: int = 0) -> int:
        """Return the seed of one random draw: fixed by the campaign's seed, the turn, the try and what it is for."""
        key = f"{self.campaign.file.campaign.seed}/{iteration}/{try_no}/{purpose}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")

    def draw_unit(self, purpose: str, iteration: int) -> float:
        """Return a number in [0, 1) drawn as `draw_seed` says."""
        return self.draw_seed(purpose, iteration) / 2**48

    @property
    def decision_seeds(self) -> range:
        """The seeds that the campaign's decisions may use."""
        return decision_seeds(self.campaign.file.campaign.seed)

    @property
    def trainer_hash(self) -> str:
        """Content address of the prepared trainer with its data."""
        return trainer_hash(self._prepared())

    @property
    def environment_hash(self) -> str:
        """Content address of the environment that trials run in."""
        return digest(self._prepared().environment)

    def _prepared(self) -> TrainerInfo:
        if self.info is None:
            raise CampaignError(f"campaign `{self.name}`: the trainer is not prepared; `run_campaign` does")
        return self.info

    def noise(self, state: CampaignState) -> Noise | None:
        """Return the noise that decisions work with: calibration and the audits decided so far."""
        if not self._noise_known:
            self._noise, self._noise_known = self._estimate_noise(state), True
        return self._noise

    def noise_before(self, state: CampaignState, attempt_id: int) -> Noise | None:
        """Return the noise as it was known when an attempt began: its own audit, and later ones, say nothing yet."""
        spreads = partial(
            self.store.audit_spreads, state.id, trainer_hash=self.trainer_hash, environment_hash=self.environment_hash
        )
        if not spreads(since=attempt_id - 1):
            return self.noise(state)
        earlier = spreads().items()
        return self._estimate_noise(state, _pooled(one for of, one in earlier if of < attempt_id))

    def _estimate_noise(self, state: CampaignState, audits: Spread | None = None) -> Noise | None:
        where = {"trainer_hash": self.trainer_hash, "environment_hash": self.environment_hash}
        seeds = self.store.seed_spread(state.id, **where)
        if seeds.df < 1:
            return None
        calibration = Spread(seeds.ss, seeds.df)
        if state.trainer_kind == "unseeded":
            return trial_noise(calibration)
        return paired_noise(calibration, self._audits_so_far(state, **where) if audits is None else audits)

    def _audits_so_far(self, state: CampaignState, **where: str) -> Spread:
        """Pool the audits, adding those decided since the last time, in the order that a new process would."""
        if self._audits is None or self._audits[0] != where:
            self._audits = (where, 0, NOTHING_KNOWN)
        _, last, pooled = self._audits
        added = self.store.audit_spreads(state.id, **where, since=last)
        pooled = _pooled(added.values(), pooled)
        self._audits = (where, max(added, default=last), pooled)
        return pooled

    def rails(self, state: CampaignState) -> list[Rail]:
        """Return the rails after `R5_diff`, in order, less those that the campaign skips."""
        rails: list[Rail] = [NoveltyRail(lambda config: self.earlier(state, [config])[0]), self.capability()]
        skipped = set(self.campaign.file.rails.skip)
        return [rail for rail in (*rails, *self.extra_rails) if rail.id not in skipped]

    def capability(self, *, memory: bool = True) -> CapabilityRail:
        """Return rail `R7_capability` over this trainer; its answers about a configuration are remembered.

        Without `memory` it asks only what the machine can run at all, which is as true of the past.
        """
        return CapabilityRail(
            unsupported=lambda config: _remember(self._unsupported, config, self.trainer.unsupported),
            estimate_memory=lambda config: _remember(self._memory, config, self.trainer.estimate_memory),
            free_memory=self.free_memory if memory else lambda: None,
        )

    def earlier(
        self, state: CampaignState, configs: Sequence[Config], *, before: int | None = None
    ) -> list[str | None]:
        """Say for each configuration what became of it, or None where the decision rule is not done with it.

        `before` looks at the turns before that one only.
        """
        return results_in_words(self.store, state, self.campaign.menu, configs, before=before)


def _pooled(sums: Iterable[SumOfSquares], before: Spread = NOTHING_KNOWN) -> Spread:
    return sum((Spread(one.ss, one.df) for one in sums), before)


def results_in_words(
    store: TrajectoryStore,
    state: CampaignState,
    menu: Menu,
    configs: Sequence[Config],
    *,
    before: int | None = None,
) -> list[str | None]:
    """Say for each configuration what became of it, or None where the decision rule is not done with it."""
    ids = [digest(config) for config in configs]
    found = store.earlier(state.id, ids, before=before)
    first = digest(menu.default)
    return [
        _in_words(found[config_id])
        if config_id in found
        else "it was the first baseline"
        if config_id == first and state.baseline_config_id not in (None, first)
        else None
        for config_id in ids
    ]


def _remember(cache: dict[str, T], config: Config, ask: Callable[[Config], T]) -> T:
    key = digest(config)
    if key not in cache:
        cache[key] = ask(config)
    return cache[key]


def _in_words(attempt: Attempt) -> str:
    if attempt.outcome == "failed":
        return f"it failed in turn {attempt.iteration} ({attempt.failure})"
    gain = "" if attempt.gain is None else f" with a gain of {attempt.gain:+.4g}"
    return f"it was {attempt.outcome} in turn {attempt.iteration}{gain} over {attempt.trials} trials"
