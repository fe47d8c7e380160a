"""The page on trust names every dependency, and no file or key that is not there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from overnight.agent.campaign_file import CampaignFile
from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.student import StudentProposer
from overnight.trainer.command_settings import CommandSettings
from overnight.trainer.function import FunctionSettings
from overnight.trainer.gpt_settings import GptSettings

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert match is not None
    return match[0]


def test_every_dependency_has_its_reason() -> None:
    table = PAGE.split("## Dependencies")[1]
    reasons = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", table, re.MULTILINE))
    assert sorted(reasons) == sorted(map(name, PROJECT["dependencies"]))
    assert all(len(reason) > 10 for reason in reasons.values())


def test_every_optional_dependency_is_named_with_its_extra() -> None:
    optional = PAGE.split("Optional: ")[1]
    for extra, (requirement,) in PROJECT["optional-dependencies"].items():
        assert re.search(rf"`{name(requirement)}`\s\(`{extra}`\)", optional), extra


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:rails|agent|distill|trainer|store|report)/[\w/.]*)`", PAGE)))
)
def test_every_file_that_the_page_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`((?:trainer|campaign|notify)\.\w+)`", PAGE))))
def test_every_key_that_the_page_names_is_there(key: str) -> None:
    section, _, field = key.partition(".")
    of_trainer = {*CommandSettings.model_fields, *FunctionSettings.model_fields, *GptSettings.model_fields}
    tables = CampaignFile.model_fields[section].annotation
    known = of_trainer if section == "trainer" else set(getattr(tables, "model_fields", {}))
    assert field in known
    assert {"base_url", "api_key_env"} <= set(OpenAIProposer.Settings.model_fields)
    assert {"base_model", "adapter"} <= set(StudentProposer.Settings.model_fields)
