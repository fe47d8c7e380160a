import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.agent.proposers.structured import moves_schema, probe_passed
from overnight.agent.proposers.testing import example_ask, example_menu
from overnight.rails.menu import Change, Knob, Menu

MENU = example_menu()


def allows(knob: str, value: object, moves: tuple[Change, ...] | None = None, **more: object) -> bool:
    ask = example_ask(moves=moves)
    validator = jsonschema.Draft202012Validator(moves_schema(ask.menu, ask.baseline, ask.moves))
    return bool(validator.is_valid({"knob": knob, "new_value": value, "reason": "because", **more}))


@pytest.mark.parametrize("move", example_ask().moves, ids=str)
def test_every_legal_move_is_allowed(move: Change):
    assert allows(move.knob, move.value)


@given(st.floats(1e-5, 1e-2))
def test_any_value_of_a_continuous_range_is_allowed(value: float):
    assert allows("lr", value)


@given(st.floats(allow_nan=False, allow_infinity=False).filter(lambda value: not 1e-5 <= value <= 1e-2))
def test_no_value_outside_a_range_is_allowed(value: float):
    assert not allows("lr", value)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("n_head", 16),
        ("n_head", "8"),
        ("precision", "fp8"),
        ("warmup", 51),
        ("warmup", 2.5),
        ("beta1", "0.9"),
        ("lr", True),
        ("width", 1),
    ],
)
def test_what_the_menu_does_not_offer_is_not_allowed(knob: str, value: object):
    assert not allows(knob, value)


def test_the_current_value_of_a_choice_is_not_allowed():
    assert not allows("n_head", MENU.default["n_head"])


def test_an_integer_between_the_grid_points_is_allowed():
    assert 7 not in MENU.by_name["warmup"].grid()
    assert allows("warmup", 7)


def test_an_integer_that_was_measured_is_not_allowed():
    moves = tuple(move for move in example_ask().moves if move != Change("warmup", 25))
    assert not allows("warmup", 25, moves)


def test_a_knob_with_nothing_left_to_try_is_not_allowed():
    moves = tuple(move for move in example_ask().moves if move.knob != "beta1")
    assert not allows("beta1", 0.7, moves)


def test_no_other_keys_are_allowed():
    assert not allows("lr", 1e-3, confidence=1)


def test_a_wide_range_of_integers_is_given_by_its_ends():
    menu = Menu(knobs=(Knob(name="n", type="int", default=5, low=1, high=10_000),))
    moves = tuple(menu.moves(menu.default))
    validator = jsonschema.Draft202012Validator(moves_schema(menu, menu.default, moves))
    assert [validator.is_valid({"knob": "n", "new_value": n, "reason": ""}) for n in (0, 1, 7777, 10_000, 10_001)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_the_schema_of_the_full_example_stays_small():
    ask = example_ask()
    assert len(json.dumps(moves_schema(ask.menu, ask.baseline, ask.moves))) < 4_000


@pytest.mark.parametrize(
    ("reply", "passed"),
    [
        ('{"ready": true}', True),
        (' {"ready": false}\n', True),
        ("Hello!", False),
        ('{"greeting": "hello"}', False),
        ('{"ready": "yes"}', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_a_probe_passes_only_when_the_schema_was_enforced(reply: str, passed: bool):
    assert probe_passed("json_schema", reply) is passed
