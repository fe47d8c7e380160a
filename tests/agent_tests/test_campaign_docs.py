"""The documented campaign file is the one that is read."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from overnight.agent.campaign_docs import TABLES, campaign_markdown, campaign_schema
from overnight.agent.event_docs import events_markdown

DOCS = Path(__file__).parents[2] / "docs"
REMEDY = "run `make docs`"


def test_the_page_is_what_the_models_say() -> None:
    assert (DOCS / "campaign.md").read_text() == campaign_markdown(), REMEDY


def test_the_schema_is_what_the_models_say() -> None:
    assert (DOCS / "campaign.schema.json").read_text() == campaign_schema(), REMEDY


def test_the_page_of_events_is_what_their_classes_say() -> None:
    assert (DOCS / "events.md").read_text() == events_markdown(), REMEDY


@pytest.mark.parametrize(("title", "model"), [table[:2] for table in TABLES], ids=[table[0] for table in TABLES])
def test_every_key_says_what_it_is(title: str, model: type[BaseModel]) -> None:
    page = campaign_markdown()
    section = page.split(f"## {title}" if "`" in title else f"## `{title}`")[1].split("\n## ")[0]
    undocumented = [line for line in section.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert undocumented == []
