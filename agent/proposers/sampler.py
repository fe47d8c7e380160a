"""Optuna as a control: its own samplers, told of the campaign's past, rank the legal one-knob moves.

The study lives in memory and is rebuilt from the store's history: each ask replays what was decided since the last
one, a restart replays all. Draws are seeded by the ask alone, so the answer depends on history and seed only. One
instance serves one campaign. Optuna is imported at the first ask.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from overnight.agent.proposers.protocol import (
    Answer,
    Ask,
    Observation,
    ProposerContext,
    ProposerSettings,
    change_key,
    reply_text,
)
from overnight.rails.menu import Change, Knob, Menu
from overnight.store.errors import CampaignError, ProposerError
from overnight.store.hashing import JsonValue
from overnight.store.records import Config, FailureClass, KnobValue

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    from overnight.agent.proposers.acquisition import Scores, ScoringSampler

SamplerName = Literal["tpe", "gp", "cmaes"]
CONFIG_FAILURES: frozenset[FailureClass] = frozenset({"oom", "nan", "timeout", "crash", "unsupported"})
"""Failures that say something about the configuration: told to Optuna as pruned, so that TPE steers away from them."""
GP_WINDOW = 300
"""Measured trials that the Gaussian process fits: its cost grows with their cube."""
FREE_DRAWS = 100


class OptunaProposer:
    """Answers with the legal move that Optuna's sampler scores highest, the other knobs held at the baseline.

    `tpe` and `gp` take the best score; `cmaes` draws from its Gaussian restricted to the legal moves, as CMA-ES draws
    rather than maximises. Before a sampler has its start-up trials (10 for `tpe` and `gp`, 1 for `cmaes`) it draws
    uniformly, as Optuna does.
    """

    class Settings(ProposerSettings):
        """The keys of a `[proposers.<name>]` table of kind `optuna`."""

        sampler: SamplerName = "tpe"
        """Tree-structured Parzen estimator, Gaussian process, or CMA-ES."""
        moves: Literal["onestep", "free"] = Field(default="onestep")
        """`free` is for benchmarks, which call `suggest_config`: no rail lets a whole configuration through."""

    def __init__(self, name: str, settings: Settings | None = None) -> None:
        self.name = name
        self._settings = settings or self.Settings()
        self._replica: _Replica | None = None

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, object], context: ProposerContext) -> Self:  # noqa: ARG003
        """Build it from `[proposers.<name>]`.

        Raises:
            CampaignError: a key is unknown or its value impossible.
        """
        return cls(name, cls.Settings.parse(name, settings))

    def propose(self, ask: Ask) -> Answer:
        """Answer with the best-ranked legal move.

        Raises:
            CampaignError: `moves = "free"` cannot answer with one change.
        """
        if self._settings.moves == "free":
            raise CampaignError(
                f'`[proposers.{self.name}]`: `moves = "free"` suggests whole configurations, which only benchmarks '
                'can use; set `moves = "onestep"`'
            )
        started = time.perf_counter()
        replica = self._caught_up(ask)
        scores = replica.score(ask)
        chances: dict[str, float] = {}
        rng = random.Random(ask.seed)
        sampler = self._settings.sampler
        if scores is None:
            change, why = rng.choice(ask.moves), "start-up draw"
        else:
            change, chances = self._pick(ask.moves, scores, rng)
            why = "drawn from its Gaussian" if sampler == "cmaes" else "ranked first by its model"
        reason = f"{sampler}: {why} after {replica.measured} measured, of {len(ask.moves)} legal changes"
        return Answer(
            reply=reply_text(change.knob, change.value, reason),
            latency_s=time.perf_counter() - started,
            settings={"sampler": sampler, "seed": ask.seed, "startup": scores is None},
            probabilities=chances,
        )

    def _pick(
        self, moves: Sequence[Change], scores: Sequence[float], rng: random.Random
    ) -> tuple[Change, dict[str, float]]:
        best = max(scores)
        if self._settings.sampler == "cmaes":
            weights = [math.exp(score - best) for score in scores]
            chances = {change_key(move): w / sum(weights) for move, w in zip(moves, weights, strict=True)}
            return rng.choices(moves, weights)[0], chances
        ties = [move for move, score in zip(moves, scores, strict=True) if score == best]
        return rng.choice(ties), {}

    def suggest_config(self, ask: Ask) -> dict[str, KnobValue]:
        """Return a whole configuration as Optuna would draw it, any number of knobs away from the baseline.

        Raises:
            ProposerError: none of 100 draws keeps the menu's constraints (`llm_error`).
        """
        replica = self._caught_up(ask)
        rng = random.Random(ask.seed)
        for _ in range(FREE_DRAWS):
            config = replica.draw(rng.getrandbits(32))
            if not ask.menu.broken_constraint(config):
                return config
        raise ProposerError(
            f"proposer `{self.name}`: none of {FREE_DRAWS} draws of `{self._settings.sampler}` keeps the constraints",
            failure="llm_error",
        )

    def _caught_up(self, ask: Ask) -> _Replica:
        if self._replica is None:
            self._replica = _Replica(self._settings.sampler, ask.menu, ask.direction)
        for observation in ask.history.since(self._replica.last_attempt):
            self._replica.tell(observation)
        return self._replica

    def describe(self) -> Mapping[str, JsonValue]:
        """Return the kind and the sampler."""
        return {"kind": "optuna", "sampler": self._settings.sampler, "moves": self._settings.moves}

    def rewound(self) -> OptunaProposer:
        """Return one that has seen no history yet."""
        return type(self)(self.name, self._settings)

    def close(self) -> None:
        """Drop the study; the next ask rebuilds it."""
        self._replica = None


class _Replica:
    """An Optuna study in memory that mirrors a campaign's decided attempts."""

    def __init__(self, sampler: SamplerName, menu: Menu, direction: Literal["min", "max"]) -> None:
        self.last_attempt = 0
        self.measured = 0
        self._sampler: SamplerName = sampler
        self._axes = [_Axis(knob, ordinal=sampler == "cmaes") for knob in sorted(menu.knobs, key=lambda k: k.name)]
        self._menu = menu
        self._direction: Literal["minimize", "maximize"] = "minimize" if direction == "min" else "maximize"
        self._space = {axis.knob.name: axis.distribution() for axis in self._axes}
        self._window: list[optuna.trial.FrozenTrial] = []
        self._study = self._new_study()
        self._replayer = self._make_sampler(seed=0)

    def _new_study(self) -> optuna.Study:
        import optuna

        with _quiet():
            return optuna.create_study(direction=self._direction)

    def tell(self, observation: Observation) -> None:
        """Add one attempt; a configuration that is not on this menu (imported) has no place in the space."""
        from optuna.trial import TrialState, create_trial

        self.last_attempt = max(self.last_attempt, observation.attempt_id)
        config = observation.config
        if set(config) != set(self._menu.by_name) or any(axis.knob.problem(config[axis.name]) for axis in self._axes):
            return
        if observation.metric is not None:
            state = TrialState.COMPLETE
            self.measured += 1
        else:
            state = TrialState.PRUNED if observation.failure in CONFIG_FAILURES else TrialState.FAIL
        params = self._params(config)
        if self._sampler == "cmaes":
            self._tell_in_turn(params, observation.metric, state)
            return
        trial = create_trial(params=params, distributions=self._space, value=observation.metric, state=state)
        if self._sampler == "gp":
            self._window = [*self._window, trial][-GP_WINDOW:]
        else:
            self._study.add_trial(trial)

    def _tell_in_turn(self, params: dict[str, Any], metric: float | None, state: optuna.trial.TrialState) -> None:
        """Replay a trial as CMA-ES lived it: asked (which moves its generations on), overruled, told."""
        with _quiet():
            self._study.sampler = self._replayer  # one for all: a new one reads the whole study anew
            self._study.enqueue_trial(params)
            trial = self._study.ask(fixed_distributions=self._space)
            assert trial.relative_params is not None  # drawn when first read, and the draw moves the generations on
            self._study.tell(trial, metric, state=state)

    def score(self, ask: Ask) -> list[float] | None:
        """Return a finite score for each move, or None when the sampler is still drawing its start-up trials."""
        sampler, _ = self._ask(ask.seed, search=False)
        scores: Scores | None = sampler.score([self._params(ask.menu.apply(ask.baseline, m)) for m in ask.moves])
        if scores is None:
            return None
        return [float(score) if math.isfinite(score) else -1e300 for score in scores]

    def draw(self, seed: int) -> dict[str, KnobValue]:
        """Return one configuration drawn by the sampler."""
        _, params = self._ask(seed, search=True)
        values = {axis.name: axis.value(params[axis.name]) for axis in self._axes}
        return {name: values[name] for name in self._menu.by_name}

    def _ask(self, seed: int, *, search: bool) -> tuple[ScoringSampler, dict[str, Any]]:
        from optuna.trial import TrialState

        with _quiet():
            study = self._study
            if self._sampler == "gp":
                study = self._new_study()
                study.add_trials(self._window)
            sampler = self._make_sampler(seed, search=search)
            study.sampler = sampler
            trial = study.ask(fixed_distributions=self._space)
            # Samplers pass over a failed trial: the question leaves no trace in the model.
            study.tell(trial, state=TrialState.FAIL)
        return sampler, trial.params

    def _make_sampler(self, seed: int, *, search: bool = False) -> ScoringSampler:
        from overnight.agent.proposers.acquisition import make_sampler

        return make_sampler(self._sampler, self._space, seed, search=search)

    def _params(self, config: Config) -> dict[str, Any]:
        return {axis.name: axis.param(config[axis.name]) for axis in self._axes}


class _Axis:
    """How one knob lies in Optuna's space: numeric choices keep their order, as positions in a sorted list.

    `ordinal` places text choices by position too: CMA-ES knows no categories.
    """

    def __init__(self, knob: Knob, *, ordinal: bool) -> None:
        self.knob = knob
        self.name = knob.name
        self._choices = list(knob.choices) if knob.type == "str" else sorted(knob.choices, key=float)
        self._by_position = bool(knob.choices) and (ordinal or knob.type != "str")

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        knob = self.knob
        if self._by_position:
            return IntDistribution(0, len(self._choices) - 1)
        if self._choices:
            return CategoricalDistribution(self._choices)
        assert knob.low is not None
        assert knob.high is not None
        log = knob.scale == "log"
        if knob.type == "int":
            return IntDistribution(math.ceil(knob.low), math.floor(knob.high), log=log)
        return FloatDistribution(knob.low, knob.high, log=log)

    def param(self, value: KnobValue) -> int | float | str:
        return self._choices.index(value) if self._by_position else value

    def value(self, param: int | float | str) -> KnobValue:
        return self.knob.coerce(self._choices[int(param)] if self._by_position else param)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's log lines off the campaign's terminal; whoever embeds us gets their own level back."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
