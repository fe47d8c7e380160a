"""R7 blocks what the machine cannot run, and says how much is missing."""

import json

import pytest

from overnight.rails.capability import GIB, CapabilityRail
from overnight.rails.gate import check_reply
from overnight.rails.menu import Knob, Menu
from overnight.store.records import Config

MENU = Menu(
    (
        Knob(name="d_model", type="int", choices=(256, 2048), default=256),
        Knob(name="precision", type="str", choices=("bf16", "fp8"), default="bf16"),
    )
)


def rail(*, free: int | None = 10 * GIB, known: bool = True) -> CapabilityRail:
    def estimate(config: Config) -> int | None:
        return (int(config["d_model"]) // 128 * GIB) if known else None

    return CapabilityRail(
        unsupported=lambda config: "fp8 needs compute capability 8.9" if config["precision"] == "fp8" else None,
        estimate_memory=estimate,
        free_memory=lambda: free,
    )


def test_what_fits_passes() -> None:
    assert rail().problem({"d_model": 256, "precision": "bf16"}) is None


def test_an_unsupported_choice_is_blocked_in_the_trainer_s_words() -> None:
    problem = rail().problem({"d_model": 256, "precision": "fp8"})
    assert problem is not None
    assert "fp8 needs compute capability 8.9" in problem


def test_too_much_memory_is_blocked_with_both_figures() -> None:
    problem = rail().problem({"d_model": 2048, "precision": "bf16"})
    assert problem is not None
    assert "16.0 GiB" in problem
    assert "10.0 GiB" in problem


@pytest.mark.parametrize(("free", "blocked"), [(16 * GIB, False), (16 * GIB - 1, True), (0, True), (None, False)])
def test_exactly_what_is_free_is_the_limit(free: int | None, blocked: bool) -> None:
    assert (rail(free=free).problem({"d_model": 2048, "precision": "bf16"}) is not None) == blocked


def test_a_trainer_that_cannot_estimate_is_not_held_to_memory() -> None:
    assert rail(free=0, known=False).problem({"d_model": 2048, "precision": "bf16"}) is None


def test_the_gate_records_the_rail_and_the_change() -> None:
    reply = json.dumps({"knob": "d_model", "new_value": 2048, "reason": "wider"})
    verdict = check_reply(reply, menu=MENU, baseline=MENU.default, rails=[rail()])
    assert verdict.rail == "R7_capability"
    assert verdict.reason.startswith("d_model = 2048: a trial would need about 16.0 GiB")
