"""Does a student propose better for having learned from a history? Objectives side by side.

Takes a stored campaign as it stood after `--turns` turns, holds out its newest fifth, trains the bundled 135M model on
the rest with each objective and seed, and lets every model weigh the changes that were open at the held-out turns. What
such a change really gained is read from the WHOLE campaign, whose later turns no model has seen: the mean gain measured
on that very configuration. Reported for each model: the cross-entropy of the held-out targets, the expected gain (each
open change's gain times its probability, over those that were measured), the share of probability that the measured
ones have, the entropy of the distribution, the distinct first choices over the held-out turns, and the largest share of
one of them. One JSON line a model to standard output; `--summary FILE` prints a table of such lines.

    python benchmarks/distill.py q.db q200 campaigns/quickstart --turns 60 --seeds 5
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overnight.agent.campaign import Campaign, load_campaign, renamed
from overnight.agent.distilling import corpus_settings, facts_of, recipe_of
from overnight.agent.proposers.candidates import probabilities
from overnight.agent.run import cache_folder
from overnight.agent.turns import prompt_frame
from overnight.distill.base import find_base
from overnight.distill.corpus import Corpus, build_corpus, reconstruct_prompts
from overnight.distill.host import ModelHost
from overnight.distill.knowledge import Knowledge
from overnight.distill.lessons import read_lessons
from overnight.rails.menu import Change
from overnight.rails.reply import candidate_text
from overnight.store.sql_store import SqlStore


@dataclass(frozen=True)
class HeldOut:
    """A held-out turn: what was open, what a target says of it, and what it gained."""

    prompt: str
    changes: Sequence[Change]
    target: Sequence[float]
    gains: Sequence[float | None]


def held_out(corpus: Corpus, truth: Knowledge) -> list[HeldOut]:
    """Return the held-out turns with what the whole campaign measured of their open changes."""
    found = []
    for item in corpus.held_out:
        changes = corpus.now.open_changes(item)
        row = corpus.now.stored(item)
        assert row is not None
        assert row.candidates == tuple(candidate_text(change) for change in changes)
        gains = [truth.measured(item.lesson.baseline, change) for change in changes]
        found.append(HeldOut(item.prompt, changes, row.choice, gains))
    return found


def judge(chances: Sequence[Sequence[float]], turns: Sequence[HeldOut]) -> dict[str, float]:
    """Return the figures of one model's distributions over the held-out turns."""
    gains, coverage, losses, firsts = [], [], [], Counter[Change]()
    for p, turn in zip(chances, turns, strict=True):
        firsts[turn.changes[max(range(len(p)), key=p.__getitem__)]] += 1
        known = [(chance, gain) for chance, gain in zip(p, turn.gains, strict=True) if gain is not None]
        covered = math.fsum(chance for chance, _ in known)
        coverage.append(covered)
        if covered:
            gains.append(math.fsum(chance * gain for chance, gain in known) / covered)
        losses.append(-math.fsum(t * math.log(max(chance, 1e-30)) for t, chance in zip(turn.target, p, strict=True)))
    return {
        "cross_entropy": statistics.fmean(losses),
        "expected_gain": statistics.fmean(gains) if gains else math.nan,
        "coverage": statistics.fmean(coverage),
        "entropy": statistics.fmean(-math.fsum(c * math.log(c) for c in p if c > 0) for p in chances),
        "distinct": len(firsts),
        "top_share": max(firsts.values()) / len(turns),
    }


def asked(host: ModelHost, turns: Sequence[HeldOut], adapter: Path | None) -> list[list[float]]:
    """Return a model's probability of each open change, at each held-out turn."""
    found = []
    for turn in turns:
        texts = [candidate_text(change) for change in turn.changes]
        scores = host.score(turn.prompt, texts, deadline_s=3600.0, adapter=adapter)
        found.append(probabilities(scores.log_probs, 1.0))
    return found


def with_distill(campaign: Campaign, **changed: object) -> Campaign:
    """Return a campaign with other `[distill]` settings."""
    section = campaign.file.distill.model_copy(update=changed)
    return replace(campaign, file=campaign.file.model_copy(update={"distill": section}))


def tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def run(options: argparse.Namespace) -> None:
    store = SqlStore.open(options.db)
    campaign = renamed(load_campaign(options.folder), options.campaign)
    floors = {"min_rows": 1, "min_knobs": 1, "min_pairs": 1, "epochs": options.epochs, "holdout": options.holdout}
    floors |= {"augment": options.augment.split(",") if options.augment else [], "batch": options.batch}
    floors |= {key: value for key in ("temperature", "floor") if (value := getattr(options, key)) is not None}
    campaign = with_distill(campaign, **floors, learning_rate=options.learning_rate, max_share=1.0, write=options.write)
    frame, state = prompt_frame(campaign), store.campaign(options.campaign)
    assert state is not None
    if store.unprompted(state.id):  # an imported trajectory; its prompts are rendered into the database once
        with store.writing(store.acquire(state.id)) as writer:
            reconstruct_prompts(store, state, frame, writer)
    everything, _ = read_lessons(store, state.id, campaign.menu)
    truth = Knowledge(everything, store.screening_sums(state.id), campaign.menu)
    judged = with_distill(campaign, objective="outcome")
    turns = held_out(build_corpus(store, state, frame, corpus_settings(judged), through=options.turns), truth)
    common = {"campaign": options.campaign, "turns": options.turns, "held_out": len(turns)}
    uniform = [[1 / len(turn.changes)] * len(turn.changes) for turn in turns]
    tell(**common, objective="uniform", seed=None, **judge(uniform, turns))
    tell(**common, objective="target", seed=None, **judge([turn.target for turn in turns], turns))
    if options.no_model:
        return
    host = ModelHost(find_base("smollm2-135m", Path()), cache_folder(), device=options.device)
    tell(**common, objective="zero-shot", seed=None, **judge(asked(host, turns, None), turns))
    with tempfile.TemporaryDirectory() as place:
        for seed in range(options.seeds):
            for objective in options.objectives:
                learner = with_distill(campaign, objective=objective, seed=seed)
                corpus = build_corpus(store, state, frame, corpus_settings(learner), through=options.turns)
                folder = Path(place) / f"{objective}-{seed}"
                started = time.perf_counter()
                trained = host.train(
                    corpus.rows,
                    recipe=recipe_of(learner.file.distill),
                    facts=facts_of(campaign.name, corpus, learner.file.distill, "v1"),
                    folder=folder,
                    progress=lambda news: print(news.step, news.steps, news.loss, file=sys.stderr, flush=True),
                )
                took = time.perf_counter() - started
                figures = judge(asked(host, turns, folder), turns)
                rows = {"rows": corpus.report.trained, "losses": trained.losses, "steps": trained.steps}
                tell(**common, objective=objective, seed=seed, **figures, **rows, wall_s=took)
    host.close()
    store.close()


def summary(file: Path) -> None:
    """Print a table of the lines in a file: the mean over seeds, with the smallest and largest."""
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]
    names = ("cross_entropy", "expected_gain", "coverage", "entropy", "distinct", "top_share")
    print(f"| history | model | seeds | {' | '.join(names)} |\n|{'---|' * (len(names) + 3)}")
    for campaign, objective in dict.fromkeys((line["campaign"], line["objective"]) for line in lines):
        own = [line for line in lines if (line["campaign"], line["objective"]) == (campaign, objective)]
        cells = [_cell(name, [line[name] for line in own]) for name in names]
        print(f"| {campaign} | {objective} | {len(own)} | {' | '.join(cells)} |")
    print(f"\n{platform.machine()}, {platform.system()}")


def _cell(name: str, values: Sequence[float]) -> str:
    form = "+.3%" if name == "expected_gain" else ".0%" if name in ("coverage", "top_share") else ".3g"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("db", nargs="?")
    parser.add_argument("campaign", nargs="?")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--write", type=float, default=0.1)
    parser.add_argument("--holdout", type=int)
    parser.add_argument("--temperature", type=float, help="of the target; without it, as the campaign has it")
    parser.add_argument("--floor", type=float, help="least share of the untried; without it, as the campaign has it")
    parser.add_argument("--augment", default="permute,subsample,synthetic")
    parser.add_argument("--objectives", nargs="+", default=["outcome", "clone"])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--no-model", action="store_true", help="only what the targets themselves are worth")
    parser.add_argument("--summary", type=Path)
    options = parser.parse_args()
    if options.summary is not None:
        summary(options.summary)
    else:
        run(options)


if __name__ == "__main__":
    main()
