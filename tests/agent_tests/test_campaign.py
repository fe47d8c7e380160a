"""A campaign file is read strictly; what is wrong is said in one line with file, key and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from overnight.agent.campaign import bundled_campaigns, load_campaign, parse_campaign
from overnight.store.errors import CampaignError

from .campaigns import campaign, data

FILE = Path("/somewhere/campaign.toml")
KNOB = {"type": "float", "range": [0.0, 1.0], "default": 0.5}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"campaign": {"name": None}}, "`campaign.name` is missing"),
        ({"budget": {"iterations": None}}, "`budget.iterations` is missing"),
        ({"budget": {"iteration": 3}}, "`budget.iteration` is not a key; did you mean `iterations`"),
        ({"budget": {"iterations": 0}}, "`budget.iterations`"),
        ({"budget": {"iterations": "9"}}, "`budget.iterations`"),
        ({"budget": {"until": "25:00"}}, "`budget.until`"),
        ({"knobs": {"a": {**KNOB, "default": 2.0}}}, "knob `a`: `default` 2.0 is outside 0..1"),
        ({"knobs": {"a": {**KNOB, "rnage": 1}}}, "`knobs.a.rnage` is not a key; did you mean `range`"),
        ({"knobs": {"b": {"type": "int", "choices": [1], "default": 1}}}, "knob `b`: `choices` needs at least two"),
        ({"knobs": {"b": {"type": "int", "choices": [1, "x"], "default": 1}}}, "knob `b`"),
        ({"constraints": [{"id": "k", "rule": "a <"}]}, "constraint `k`: `a <` does not parse"),
        ({"constraints": [{"id": "k", "rule": "a < zzz"}]}, "constraint `k` uses `zzz`"),
        ({"rails": {"skip": ["R3_range"]}}, "`rails`: `R3_range` cannot be skipped"),
        ({"router": {"champion": "nobody"}}, "`router.champion`: no proposer `nobody`"),
        ({"proposers": {"tpe": {"kind": "optuna"}}}, "`router.champion` is missing"),
        ({"trainer": {"a": 3}}, "`trainer.a` is also a knob"),
        ({"surprise": {"x": 1}}, "`surprise` is not a key; known here: campaign"),
        ({"metric": {"direction": "down"}}, "`metric.direction`"),
        ({"decision": {"calibration_trials": 1}}, "`decision`"),
    ],
)
def test_what_is_wrong_is_named(sections: dict[str, Any], named: str) -> None:
    tables = data(**{k: v for k, v in sections.items() if isinstance(v, Mapping)})
    tables |= {k: v for k, v in sections.items() if not isinstance(v, Mapping)}
    with pytest.raises(CampaignError) as error:
        parse_campaign(tables, FILE)
    message = str(error.value)
    assert message.startswith(str(FILE))
    assert named in message
    assert "\n" not in message


def test_text_that_is_not_toml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "campaign.toml").write_text("[campaign\nname = 1")
    with pytest.raises(CampaignError, match=r"campaign\.toml: not valid TOML: .*line 1"):
        load_campaign(tmp_path)


def test_a_folder_without_a_campaign_lists_the_bundled_ones(tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match="quickstart"):
        load_campaign(tmp_path)


def test_a_brief_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match=r"`campaign\.brief`.*gone\.md"):
        campaign(tmp_path, campaign={"brief": "gone.md"}).read_brief()


@pytest.mark.parametrize("name", list(bundled_campaigns()))
def test_a_bundled_campaign_reads_and_has_first_moves(name: str) -> None:
    loaded = load_campaign(name)
    assert list(loaded.menu.moves(loaded.menu.default))
    assert loaded.read_brief()


@pytest.mark.parametrize(
    ("sections", "same"),
    [
        ({"budget": {"iterations": 99}}, True),
        ({"router": {"explore": 0.5}}, True),
        ({"decision": {"alpha": 0.02}}, False),
        ({"campaign": {"seed": 8}}, False),
        ({"trainer": {"noise_sd": 0.5}}, False),
    ],
)
def test_only_what_may_not_change_is_in_the_frozen_hash(sections: dict[str, Any], same: bool) -> None:
    assert (parse_campaign(data(**sections), FILE).frozen_hash() == parse_campaign(data(), FILE).frozen_hash()) is same
