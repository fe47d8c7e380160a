from pathlib import Path

import pytest

from overnight.agent.proposers.protocol import ProposerContext
from overnight.agent.proposers.registry import build_proposer, build_proposers, installed_kinds
from overnight.agent.proposers.sampler import OptunaProposer
from overnight.agent.proposers.testing import example_menu
from overnight.agent.proposers.uniform import RandomProposer
from overnight.store.errors import CampaignError


@pytest.fixture
def context(tmp_path: Path) -> ProposerContext:
    return ProposerContext(campaign_dir=tmp_path, cache_dir=tmp_path, menu=example_menu())


def test_built_ins_come_through_the_entry_points_that_plugins_use():
    assert {"openai", "random", "optuna", "scripted"} <= {kind.kind for kind in installed_kinds()}


def test_an_installed_kind_says_which_distribution_brings_it():
    random = next(kind for kind in installed_kinds() if kind.kind == "random")
    assert random.distribution.startswith("overnight ")


def test_proposers_are_built_in_the_order_of_the_file(context: ProposerContext):
    built = build_proposers({"tpe": {"kind": "optuna", "sampler": "tpe"}, "luck": {"kind": "random"}}, context)
    assert [(name, type(proposer)) for name, proposer in built.items()] == [
        ("tpe", OptunaProposer),
        ("luck", RandomProposer),
    ]


def test_a_proposer_is_named_after_its_table(context: ProposerContext):
    assert build_proposer("luck", {"kind": "random"}, context).name == "luck"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"`\[proposers.x\]` needs `kind`, one of .*`random`"),
        ({"kind": "magic"}, r"no proposer of kind `magic` is installed; there are .*`openai`.*`random`"),
        ({"kind": "random", "speed": 3}, r"`\[proposers.x\]` key `speed`.*the keys are: kind"),
        ({"kind": "optuna", "sampler": "grid"}, r"`\[proposers.x\]` key `sampler`.*'tpe', 'gp' or 'cmaes'"),
        ({"kind": "scripted", "replies": []}, r"key `replies`.*at least 1"),
    ],
)
def test_a_table_that_cannot_be_built_is_a_campaign_error(context: ProposerContext, table: dict, message: str):
    with pytest.raises(CampaignError, match=message):
        build_proposer("x", table, context)
