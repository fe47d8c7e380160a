"""Prompts and candidates as a campaign has them, for tests."""

from __future__ import annotations

from overnight.agent.campaign import load_campaign
from overnight.agent.proposers.candidates import candidate_text
from overnight.rails.menu import Menu
from overnight.store.prompt import KnobFact, PromptFacts, render_constant, render_prompt
from overnight.store.records import KnobValue


def full_menu() -> Menu:
    return load_campaign("gpt354m").menu


def facts(brief: str = "A GPT is trained for 60 steps.", **config: KnobValue) -> PromptFacts:
    menu = full_menu()
    return PromptFacts(
        metric="val_bpb",
        direction="min",
        gain="relative",
        min_gain=0.005,
        knobs=[KnobFact(knob.name, knob.describe(), knob.doc) for knob in menu.knobs],
        rules=[rule.rule for rule in menu.constraints],
        brief=brief,
        config={**menu.default, **config},
        baseline_metric=1.5,
        turns=3,
        totals=[],
        gain_sd=None,
        recent=[],
        lineage=True,
    )


def prompt(brief: str = "A GPT is trained for 60 steps.", **config: KnobValue) -> str:
    return render_prompt(facts(brief, **config))


def constant() -> str:
    return render_constant(facts())


def candidate_texts() -> list[str]:
    menu = full_menu()
    return [candidate_text(move) for move in menu.moves(menu.default)]
