"""The menu keeps values canonical and enumerates legal one-knob moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.rails.constraint import Constraint
from overnight.rails.menu import Change, Knob, Menu
from overnight.store.errors import MenuError

LR = Knob(name="lr", type="float", low=1e-5, high=1e-2, scale="log", levels=7, default=3e-4)
HEADS = Knob(name="n_head", type="int", choices=(4, 8, 16), default=8)
WIDTH = Knob(name="d_model", type="int", choices=(96, 128, 256), default=128)
MENU = Menu((LR, HEADS, WIDTH), (Constraint("heads", "d_model % n_head == 0"),))


@pytest.mark.parametrize(
    ("knob", "value"), [(HEADS, True), (HEADS, "8"), (HEADS, 8.5), (LR, "0.1"), (LR, False), (LR, None), (LR, [1])]
)
def test_another_type_is_a_problem(knob: Knob, value: object) -> None:
    assert knob.problem(value)


def test_a_whole_float_is_the_same_int() -> None:
    value = HEADS.coerce(8.0)
    assert (value, type(value)) == (8, int)


def test_an_int_for_a_float_knob_becomes_a_float() -> None:
    value = Knob(name="x", type="float", low=0, high=2, default=0.5).coerce(1)
    assert (value, type(value)) == (1.0, float)


@given(st.integers(0, 3), st.integers(2, 12), st.sampled_from(["linear", "log"]))
def test_every_grid_value_is_on_the_menu(refinement: int, levels: int, scale: str) -> None:
    knob = Knob(name="x", type="float", low=1e-5, high=0.37, scale=scale, levels=levels, default=1e-3)  # type: ignore[arg-type]
    assert [value for value in knob.grid(refinement) if knob.problem(value)] == []


def test_a_log_grid_has_its_ends_and_even_ratios() -> None:
    assert LR.grid() == (1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2)


def test_refining_keeps_the_old_points() -> None:
    assert set(LR.grid()) <= set(LR.grid(1))


def test_moves_skip_no_ops_and_broken_constraints() -> None:
    moves = list(MENU.moves(MENU.default))
    assert Change("n_head", 8) not in moves
    assert Change("d_model", 96) in moves
    assert all(MENU.broken_constraint(MENU.apply(MENU.default, move)) is None for move in moves)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"choices": (8,)}, "at least two"),
        ({"low": 1, "high": 1}, "smaller to a larger"),
        ({"low": 1, "high": 4, "default": 8}, "outside"),
        ({"choices": (1, 2), "low": 1, "high": 2}, "exactly one"),
        ({"low": 0, "high": 9, "scale": "log"}, "log"),
    ],
)
def test_a_senseless_knob_is_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(MenuError, match=f"`n`.*{named}"):
        Knob(**{"name": "n", "type": "int", "default": 8, **options})  # type: ignore[arg-type]


def test_a_constraint_over_an_unknown_name_is_refused() -> None:
    with pytest.raises(MenuError, match="`stesp`"):
        Menu((LR,), (Constraint("c", "lr < stesp"),))


def test_a_default_that_breaks_a_constraint_is_refused() -> None:
    with pytest.raises(MenuError, match="broken by the default"):
        Menu((LR, HEADS), (Constraint("c", "n_head > 8"),))
