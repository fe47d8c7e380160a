import json
from collections import Counter
from dataclasses import replace

import optuna
import pytest

from overnight.agent.proposers.protocol import Observation, ProposerContext, change_key
from overnight.agent.proposers.sampler import OptunaProposer, SamplerName
from overnight.agent.proposers.testing import (
    ListHistory,
    ProposerConformance,
    example_ask,
    example_menu,
    example_observations,
)
from overnight.rails.menu import Change
from overnight.store.errors import CampaignError
from overnight.store.records import Direction

SAMPLERS: tuple[SamplerName, ...] = ("tpe", "gp", "cmaes")
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def make(sampler: SamplerName, moves: str = "onestep") -> OptunaProposer:
    return OptunaProposer(sampler, OptunaProposer.Settings.parse(sampler, {"sampler": sampler, "moves": moves}))


class TestTpeConforms(ProposerConformance):
    def make(self) -> OptunaProposer:
        return make("tpe")


class TestGpConforms(ProposerConformance):
    def make(self) -> OptunaProposer:
        return make("gp")


class TestCmaEsConforms(ProposerConformance):
    def make(self) -> OptunaProposer:
        return make("cmaes")


def measured_warmups(direction: Direction, count: int = 60) -> list[Observation]:
    """Only `warmup` matters, and 44 is the best of it."""
    menu = example_menu()
    sign = 1.0 if direction == "min" else -1.0
    configs = [menu.apply(menu.default, Change("warmup", number * 13 % 51)) for number in range(count)]
    return [
        Observation(number + 1, config, sign * abs(int(config["warmup"]) - 44) / 10, None)
        for number, config in enumerate(configs)
    ]


@each_sampler
@pytest.mark.parametrize("direction", ["min", "max"])
def test_moves_towards_what_measured_well(sampler: SamplerName, direction: Direction):
    ask = example_ask(direction=direction, observations=measured_warmups(direction))
    near_or_far = (Change("warmup", 44), Change("warmup", 12))
    proposer = make(sampler)
    drawn = [json.loads(proposer.propose(replace(ask, moves=near_or_far, seed=seed)).reply) for seed in range(20)]
    assert Counter(reply["new_value"] for reply in drawn)[44] >= 15


@each_sampler
def test_an_optuna_that_changed_inside_is_noticed(sampler: SamplerName):
    """The acquisition is read from inside Optuna; were it not captured, every answer would be a start-up draw."""
    answer = make(sampler).propose(example_ask(observations=example_observations(30)))
    assert answer.settings["startup"] is False


def test_scores_of_the_gaussian_process_are_below_its_own_optimum():
    from overnight.agent.proposers.sampler import _Replica

    ask = example_ask(observations=example_observations(40))
    replica = _Replica("gp", ask.menu, ask.direction)
    for observation in ask.history.since(0):
        replica.tell(observation)
    sampler, best = replica._ask(0, search=True)
    moves = [replica._params(ask.menu.apply(ask.baseline, move)) for move in ask.moves]
    assert sampler.score([best])[0] >= max(sampler.score(moves)) - 1e-9


def test_scores_of_cma_es_agree_with_how_often_it_draws():
    from overnight.agent.proposers.sampler import _Replica

    ask = example_ask()
    replica = _Replica("cmaes", ask.menu, ask.direction)
    for observation in measured_warmups("min", 200):
        replica.tell(observation)
    near, far = ({**ask.menu.default, "warmup": value} for value in (44, 10))
    sampler, _ = replica._ask(0, search=True)
    scores = sampler.score([replica._params(near), replica._params(far)])
    drawn = [replica.draw(seed)["warmup"] for seed in range(100)]
    closer_to_near = sum(abs(value - 44) < abs(value - 10) for value in drawn)
    assert (scores[0] > scores[1]) == (closer_to_near > 50)


def test_before_its_start_up_trials_it_draws_uniformly():
    replies = {make("tpe").propose(example_ask(seed=seed)).reply for seed in range(60)}
    assert len(replies) > 20


def test_cma_es_records_the_chance_of_each_move():
    ask = example_ask(observations=example_observations(30))
    assert set(make("cmaes").propose(ask).probabilities) == {change_key(move) for move in ask.moves}


def test_failures_of_a_configuration_steer_tpe_away_from_it():
    menu = example_menu()
    seen = [
        Observation(
            number + 1,
            menu.apply(menu.default, Change("precision", "bf16" if number % 2 else "fp32")),
            None if number % 2 else 1.0,
            "oom" if number % 2 else None,
        )
        for number in range(40)
    ]
    ask = replace(example_ask(observations=seen), moves=(Change("precision", "bf16"), Change("warmup", 6)))
    assert json.loads(make("tpe").propose(ask).reply)["knob"] == "warmup"


def test_a_failure_outside_the_configuration_is_not_held_against_it():
    """The same history with and without harness failures ranks alike."""
    seen = example_observations(30)
    menu = example_menu()
    broken = Observation(31, menu.apply(menu.default, Change("lr", 1e-3)), None, "harness")
    ask = example_ask(seed=1, observations=seen)
    assert (
        make("tpe").propose(ask).reply == make("tpe").propose(replace(ask, history=ListHistory([*seen, broken]))).reply
    )


def test_a_configuration_that_is_not_on_the_menu_is_passed_over():
    stranger = Observation(1, {"width": 7}, 1.0, None)
    make("tpe").propose(example_ask(observations=[stranger]))


@each_sampler
def test_free_configurations_keep_the_constraints(sampler: SamplerName):
    proposer = make(sampler, moves="free")
    menu = example_menu()
    for seed in range(5):
        config = proposer.suggest_config(example_ask(seed=seed, observations=example_observations(20)))
        assert not menu.broken_constraint(config)
        assert not any(menu.by_name[name].problem(value) for name, value in config.items())


def test_free_moves_cannot_take_a_turn_of_a_campaign():
    with pytest.raises(CampaignError, match='set `moves = "onestep"`'):
        make("tpe", moves="free").propose(example_ask())


def test_the_hosts_own_optuna_log_level_is_left_alone():
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        make("tpe").propose(example_ask(observations=example_observations(20)))
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)


def test_nothing_is_logged(capfd: pytest.CaptureFixture[str]):
    for sampler in SAMPLERS:
        make(sampler).propose(example_ask(observations=example_observations(30)))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_built_from_a_campaign_table(tmp_path):
    context = ProposerContext(campaign_dir=tmp_path, cache_dir=tmp_path, menu=example_menu())
    proposer = OptunaProposer.from_settings("gp", {"sampler": "gp"}, context)
    assert proposer.describe() == {"kind": "optuna", "sampler": "gp", "moves": "onestep"}
