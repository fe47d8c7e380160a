"""How many tokens the prompt has after 10,000 turns of the full menu, by a real tokenizer that splits every digit.

python benchmarks/prompt_tokens.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from overnight.agent.campaign import load_campaign
from overnight.agent.run import cache_folder
from overnight.distill.base import find_base
from overnight.distill.model import load_base
from overnight.store.prompt import KnobFact, PromptFacts, render_constant, render_prompt
from overnight.store.protocol import Attempt, KnobTotal, PairTotal

TURNS = 10_000


def crowded(knob: str) -> KnobTotal:
    """A knob whose every value was tried often, with long numbers."""
    values = [
        PairTotal(
            knob=knob, new_value=repr(0.000123456 * (i + 1)), proposed=33, kept=1, reverted=30, blocked=0, failed=2,
            trials=41, mean_gain=-0.0123456, failures={"oom": 2},
        )
        for i in range(24)
    ]  # fmt: skip
    return KnobTotal(knob=knob, proposed=TURNS // 13, kept=24, distinct_values=700, values=values)


def recent(iteration: int) -> Attempt:
    told = {
        "iteration": iteration, "knob": "weight_decay", "new_value": "0.123456", "outcome": "reverted", "trials": 5,
        "gain": -0.0123, "reason": "a long reason " * 40, "notes": "a long note " * 40,
    }  # fmt: skip
    return Attempt(**(dict.fromkeys(Attempt.__slots__) | told))  # type: ignore[arg-type]


def main() -> None:
    campaign = load_campaign("gpt354m")
    facts = PromptFacts(
        metric="val_bpb",
        direction="min",
        gain="relative",
        min_gain=0.01,
        knobs=[KnobFact(knob.name, knob.describe(), knob.doc) for knob in campaign.menu.knobs],
        rules=[f"{rule.rule} ({rule.doc})" for rule in campaign.menu.constraints],
        brief=campaign.read_brief() * 10,
        config=campaign.menu.default,
        baseline_metric=2.51234,
        turns=TURNS,
        totals=[crowded(knob.name) for knob in campaign.menu.knobs],
        gain_sd=0.0041,
        recent=[recent(TURNS - i) for i in range(campaign.file.prompt.recent)],
        lineage=True,
    )
    tokenizer = load_base(
        find_base("smollm2-135m", Path()), cache_dir=cache_folder(), device=torch.device("cpu")
    ).tokenizer
    lengths = {
        "turns": TURNS,
        "tokens": len(tokenizer(render_prompt(facts)).input_ids),
        "constant_tokens": len(tokenizer(render_constant(facts)).input_ids),
    }
    print(json.dumps(lengths))


if __name__ == "__main__":
    main()
