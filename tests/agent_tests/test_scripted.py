from pathlib import Path

import pytest

from overnight.agent.proposers.protocol import Ask, ProposerContext, reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.proposers.testing import ProposerConformance, example_ask, example_menu
from overnight.store.errors import ProposerError


def first_move(ask: Ask) -> str:
    return reply_text(ask.moves[0].knob, ask.moves[0].value, "the first")


class TestScriptedProposerConforms(ProposerConformance):
    def make(self) -> ScriptedProposer:
        return ScriptedProposer("scripted", first_move)


def test_replies_come_in_order_and_start_again():
    proposer = ScriptedProposer("scripted", ["a", "b"])
    assert [proposer.propose(example_ask()).reply for _ in range(5)] == ["a", "b", "a", "b", "a"]


def test_an_error_in_the_script_is_raised():
    proposer = ScriptedProposer("scripted", [ProposerError("too slow", failure="llm_timeout")])
    with pytest.raises(ProposerError) as caught:
        proposer.propose(example_ask())
    assert caught.value.failure == "llm_timeout"


def test_a_script_goes_on_after_an_error():
    proposer = ScriptedProposer("scripted", [ProposerError("down", failure="llm_error"), "up"])
    with pytest.raises(ProposerError):
        proposer.propose(example_ask())
    assert proposer.propose(example_ask()).reply == "up"


def test_a_function_sees_the_ask():
    proposer = ScriptedProposer("scripted", lambda ask: f"seed {ask.seed}")
    assert proposer.propose(example_ask(seed=5)).reply == "seed 5"


def test_asks_are_kept_for_the_test_to_look_at():
    proposer = ScriptedProposer("scripted", ["a"])
    proposer.propose(example_ask(seed=5))
    assert [ask.seed for ask in proposer.asks] == [5]


def test_a_drawn_reply_depends_on_the_ask_alone():
    settings = {"replies": [str(number) for number in range(100)], "order": "drawn"}
    context = ProposerContext(campaign_dir=Path(), cache_dir=Path(), menu=example_menu())
    first, resumed = (ScriptedProposer.from_settings("s", settings, context) for _ in range(2))
    first.propose(example_ask(seed=3))
    assert first.propose(example_ask(seed=4)).reply == resumed.propose(example_ask(seed=4)).reply
