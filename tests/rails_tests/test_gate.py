"""The gate names the first rail that blocks, and never raises."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.rails.constraint import Constraint
from overnight.rails.gate import MAX_REASON_CHARS, NoveltyRail, Verdict, check_reply
from overnight.rails.menu import Knob, Menu
from overnight.store.records import Config

MENU = Menu(
    (
        Knob(name="lr", type="float", low=1e-5, high=1e-2, scale="log", default=3e-4),
        Knob(name="n_head", type="int", choices=(4, 8, 16), default=8),
        Knob(name="d_model", type="int", choices=(96, 128, 100), default=128),
        Knob(name="precision", type="str", choices=("bf16", "fp8"), default="bf16"),
    ),
    (Constraint("heads", "d_model % n_head == 0", "heads divide the width"),),
)


def earlier(config: Config) -> str | None:
    return "reverted, gain -1.0%" if config["n_head"] == 4 else None


def judge(reply: str) -> Verdict:
    return check_reply(reply, menu=MENU, baseline=MENU.default, rails=[NoveltyRail(earlier)])


def reply(knob: object = "lr", new_value: object = 1e-3, reason: object = "why not") -> str:
    return json.dumps({"knob": knob, "new_value": new_value, "reason": reason})


@pytest.mark.parametrize(
    ("text", "rail"),
    [
        ("raise the learning rate", "R1_schema"),
        ("", "R1_schema"),
        ("[1]", "R1_schema"),
        (reply() + " ok?", "R1_schema"),
        ('{"knob": "lr", "new_value": NaN, "reason": ""}', "R1_schema"),
        ('{"knob": "lr", "knob": "lr", "new_value": 1, "reason": ""}', "R1_schema"),
        ('{"knob": "lr", "new_value": 0.001}', "R1_schema"),
        ('{"knob": "lr", "new_value": 0.001, "reason": "", "extra": 1}', "R1_schema"),
        (reply(reason="x" * (MAX_REASON_CHARS + 1)), "R1_schema"),
        (reply(reason="\ud800"), "R1_schema"),
        (reply(reason="a\0b"), "R1_schema"),
        (reply() + " " * 70_000, "R1_schema"),
        ("[" * 20_000, "R1_schema"),
        ('{"knob": "lr", "new_value": ' + "9" * 5000 + ', "reason": ""}', "R1_schema"),
        (reply(knob="LR"), "R2_menu"),
        (reply(knob="\u0456r"), "R2_menu"),
        (reply(new_value=0.5), "R3_range"),
        (reply(new_value=True), "R3_range"),
        (reply(new_value="0.001"), "R3_range"),
        (reply(new_value=None), "R3_range"),
        (reply(new_value={"a": [1]}), "R3_range"),
        (reply("n_head", 12), "R3_range"),
        (reply("n_head", 10**30), "R3_range"),
        (reply("precision", "int4"), "R3_range"),
        (reply("d_model", 100), "R4_cross"),
        (reply("n_head", 8), "R6_novelty"),
        (reply("n_head", 4), "R6_novelty"),
    ],
)
def test_the_first_rail_that_blocks_is_named(text: str, rail: str) -> None:
    verdict = judge(text)
    assert (verdict.rail, bool(verdict.reason)) == (rail, True)


def test_a_passed_proposal_carries_its_one_knob_diff() -> None:
    verdict = judge(reply("n_head", 16.0))
    assert verdict.passed
    assert verdict.diff == {"n_head": (8, 16)}
    assert verdict.config == {**MENU.default, "n_head": 16}


def test_a_baseline_with_a_knob_that_is_not_on_the_menu_is_more_than_one_change() -> None:
    assert check_reply(reply(), menu=MENU, baseline={**MENU.default, "extra": 1}, rails=[]).rail == "R5_diff"


def test_novelty_tells_the_earlier_result() -> None:
    assert "gain -1.0%" in judge(reply("n_head", 4)).reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.one_of(st.text(), JSON.map(json.dumps), st.builds(reply, st.sampled_from(list(MENU.by_name)), JSON, JSON)))
def test_no_reply_raises_and_a_pass_is_on_the_menu(text: str) -> None:
    verdict = judge(text)
    if verdict.passed:
        assert verdict.proposal is not None
        assert verdict.config is not None
        assert verdict.diff is not None
        assert list(verdict.diff) == [verdict.proposal.knob]
        assert MENU.by_name[verdict.proposal.knob].problem(verdict.config[verdict.proposal.knob]) is None
        assert MENU.broken_constraint(verdict.config) is None
