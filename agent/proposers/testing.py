"""What a plugin author tests a proposer with: a conformance class to subclass, and asks to feed it.

Nothing here imports pytest; any runner that collects `test_` methods of classes can run it::

    class TestMine(ProposerConformance):
        def make(self) -> Proposer:
            return MyProposer("mine")
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from overnight.agent.proposers.protocol import Answer, Ask, Observation, Proposer, Rejection, change_key
from overnight.rails.constraint import Constraint
from overnight.rails.menu import Change, Knob, Menu
from overnight.store.records import Config, Direction


@dataclass(frozen=True, slots=True)
class ListHistory:
    """A history held in a list, oldest first."""

    observations: Sequence[Observation] = ()

    def since(self, attempt_id: int) -> Iterator[Observation]:
        """Yield the observations after `attempt_id`."""
        return (seen for seen in self.observations if seen.attempt_id > attempt_id)


def example_menu() -> Menu:
    """Return a menu with every kind of knob: ranges (float log and linear, int) and choices (numbers and text)."""
    return Menu(
        knobs=(
            Knob(name="lr", type="float", default=3e-4, low=1e-5, high=1e-2, scale="log"),
            Knob(name="beta1", type="float", default=0.9, low=0.5, high=0.99, levels=5),
            Knob(name="warmup", type="int", default=5, low=0, high=50),
            Knob(name="n_head", type="int", default=4, choices=(2, 4, 8)),
            Knob(name="d_model", type="int", default=64, choices=(32, 64, 96)),
            Knob(name="precision", type="str", default="fp32", choices=("fp32", "bf16")),
        ),
        constraints=(Constraint("head_divides_model", "d_model % n_head == 0"),),
    )


def example_ask(
    *,
    seed: int = 0,
    observations: Sequence[Observation] = (),
    baseline: Config | None = None,
    direction: Direction = "min",
    moves: tuple[Change, ...] | None = None,
    neighbours: tuple[Change, ...] = (),
    rejections: tuple[Rejection, ...] = (),
) -> Ask:
    """Return an ask about `example_menu`, with whatever a test cares about set."""
    menu = example_menu()
    baseline = menu.default if baseline is None else baseline
    return Ask(
        iteration=len(observations) + 1,
        prompt="Propose one change as a JSON object with the keys knob, new_value and reason.",
        menu=menu,
        direction=direction,
        baseline=baseline,
        baseline_metric=None,
        moves=tuple(menu.moves(baseline)) if moves is None else moves,
        neighbours=neighbours,
        rejections=rejections,
        history=ListHistory(observations),
        seed=seed,
    )


def example_observations(count: int) -> list[Observation]:
    """Return `count` decided one-knob attempts: best near `lr` = 1e-3, one in seven failed."""
    menu = example_menu()
    moves = tuple(menu.moves(menu.default))
    seen = []
    for number in range(count):
        config = menu.apply(menu.default, moves[(number * 7) % len(moves)])
        failed = number % 7 == 6
        metric = None if failed else 2.0 + abs(float(config["lr"]) - 1e-3) + float(config["beta1"]) / 10
        seen.append(Observation(number + 1, config, metric, "oom" if failed else None))
    return seen


class ProposerConformance(ABC):
    """Every claim that the graph relies on; subclass it and give `make`."""

    deterministic = True
    """Whether the same ask to a new instance gives the same reply (not so for a remote model)."""
    always_legal = True
    """Whether every reply is one of `ask.moves` (not so for a model that writes free text)."""

    @abstractmethod
    def make(self) -> Proposer:
        """Return a new instance."""

    def answer(self, ask: Ask) -> Answer:
        """Answer `ask` with a new instance, and close it."""
        proposer = self.make()
        try:
            return proposer.propose(ask)
        finally:
            proposer.close()

    def test_is_a_proposer_with_a_name(self) -> None:
        """It has the protocol's shape."""
        proposer = self.make()
        assert isinstance(proposer, Proposer)
        assert proposer.name
        proposer.close()

    def test_description_is_json_and_says_the_kind(self) -> None:
        """What the store keeps of it can be kept."""
        proposer = self.make()
        assert json.loads(json.dumps(dict(proposer.describe())))["kind"]
        proposer.close()

    def test_description_does_not_change_with_use(self) -> None:
        """One proposer stays one row in the store."""
        proposer = self.make()
        before = dict(proposer.describe())
        proposer.propose(example_ask())
        assert dict(proposer.describe()) == before
        proposer.close()

    def test_answers_with_text_settings_that_are_json_and_a_latency(self) -> None:
        """An answer can be stored."""
        answer = self.answer(example_ask())
        assert isinstance(answer.reply, str)
        assert json.loads(json.dumps(dict(answer.settings))) == dict(answer.settings)
        assert answer.latency_s >= 0

    def test_answers_with_a_long_history_that_has_failures(self) -> None:
        """Failures have no metric, and break nothing."""
        self._check_legal(example_ask(observations=example_observations(40)))

    def test_answers_when_one_move_is_left(self) -> None:
        """The end of a menu is an ordinary turn."""
        last = example_ask().moves[-1:]
        self._check_legal(example_ask(moves=last, observations=example_observations(40)))

    def test_answers_after_a_rejection(self) -> None:
        """A blocked reply is followed by another."""
        self._check_legal(example_ask(rejections=(Rejection("I think so.", "R1_schema", "not a JSON object"),)))

    def test_answers_about_a_baseline_that_moved(self) -> None:
        """A keep changes what the moves start from."""
        menu = example_menu()
        moved = menu.apply(menu.default, Change("lr", 1e-3))
        self._check_legal(example_ask(baseline=moved, observations=example_observations(20)))

    def test_same_ask_same_reply(self) -> None:
        """A resumed campaign draws what an undisturbed one would."""
        if self.deterministic:
            ask = example_ask(seed=7, observations=example_observations(30))
            assert self.answer(ask).reply == self.answer(ask).reply

    def test_an_instance_that_saw_it_all_answers_as_one_that_starts_now(self) -> None:
        """Nothing but the ask and its history counts."""
        if not self.deterministic:
            return
        seen = example_observations(30)
        veteran = self.make()
        for count in (0, 5, 12, 29):
            veteran.propose(example_ask(seed=count, observations=seen[:count]))
        ask = example_ask(seed=7, observations=seen)
        assert veteran.propose(ask).reply == self.answer(ask).reply
        veteran.close()

    def test_probabilities_are_of_moves_and_sum_to_one(self) -> None:
        """Propensities are probabilities of changes that were open, and what was proposed is one of them."""
        ask = example_ask(observations=example_observations(30))
        answer = self.answer(ask)
        chances = answer.probabilities
        if chances:
            said = json.loads(answer.reply)
            assert abs(sum(chances.values()) - 1.0) < 1e-6
            assert min(chances.values()) >= 0
            assert set(chances) <= {change_key(change) for change in (*ask.moves, *ask.neighbours)}
            assert chances[change_key(Change(said["knob"], said["new_value"]))] > 0

    def test_closing_twice_is_fine(self) -> None:
        """A campaign that ends twice ends once."""
        proposer = self.make()
        proposer.propose(replace(example_ask(), seed=3))
        proposer.close()
        proposer.close()

    def _check_legal(self, ask: Ask) -> None:
        reply = self.answer(ask).reply
        if self.always_legal:
            said = json.loads(reply)
            assert Change(said["knob"], said["new_value"]) in ask.moves, reply
