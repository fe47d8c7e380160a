"""Would more rows have saved the first attempt's student, which copied what was tried? Free text of students, counted.

Takes a stored campaign, trains the bundled 135M model with the old recipe (`clone`, r 16, alpha 32, learning rate 3e-4,
five epochs, no augmentation) on the first rows of its history, as many as `--rows` says, and lets every student write
free text for the same later prompts: those of all turns after the largest number of rows, byte for byte as stored.
`greedy` takes the likeliest token, `sampled` draws once at `--temperature`; `scored` is no text but the product's way
of asking, the likeliest of the changes that were open at the turn, and `scored_all` the likeliest of the whole grid.

Prints one JSON line a student, after one of the base model as it is (`rows` 0). Of each way of answering: the share of
replies that are well-formed (`parsed`), that are a legal change or the baseline itself (`legal`), and that the rails up
to `R6_novelty` let through (`new`); and of the well-formed ones the share of the most frequent answer, the number of
distinct answers, the share that proposes the value which the baseline has (`no_op`), and the share whose configuration
was measured before (`repeat`). `taught_` says it of what the rows tried. `--summary FILE` prints a table.

    python -P benchmarks/old_recipe.py q.db q200 campaigns/quickstart --rows 42 100 160 --objectives clone outcome
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overnight.agent.campaign import Campaign, load_campaign, renamed
from overnight.agent.distilling import corpus_settings, facts_of, recipe_of
from overnight.agent.run import cache_folder
from overnight.agent.turns import prompt_frame
from overnight.distill.base import find_base
from overnight.distill.chat import ChatEncoder
from overnight.distill.corpus import Corpus, build_corpus
from overnight.distill.histories import OpenChanges
from overnight.distill.host import ModelHost
from overnight.distill.lessons import ConfigKey, Lesson, changed_key, read_lessons
from overnight.distill.model import load_base, pick_device
from overnight.distill.shelf import AdapterShelf
from overnight.distill.wire import TrainingReply
from overnight.rails.gate import check_reply
from overnight.rails.menu import Change, Menu
from overnight.rails.reply import candidate_text, reply_text
from overnight.store.records import Config
from overnight.store.sql_store import SqlStore

sys.path.insert(0, str(Path(__file__).parent))
from distill import with_distill

WAYS = ("greedy", "sampled", "scored", "scored_all")


@dataclass(frozen=True)
class Asked:
    """A later turn: its stored prompt and what stood when it was asked."""

    prompt: str
    baseline: Config
    open_changes: Sequence[Change]
    all_changes: Sequence[Change]
    is_measured: Callable[[ConfigKey], bool]


class Models:
    """The base model twice: in the product's host, to train and score, and here, to write in batches.

    A reply ends where the model ends it, as in the mode `generate`, or after `--tokens`: cutting at the first brace
    would accept what the rails refuse.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        base = find_base(options.base, Path())
        self.host = ModelHost(base, cache_folder(), device=options.device)
        self._loaded = load_base(base, cache_dir=cache_folder(), device=pick_device(options.device))
        self._shelf = AdapterShelf(self._loaded)
        self._encoder = ChatEncoder(self._loaded.tokenizer)
        self._options = options

    def answered(self, menu: Menu, turns: Sequence[Asked], adapter: Path | None) -> dict[str, Any]:
        """Return the figures of one student, or of the base model, for each way of answering."""
        started, heat = time.perf_counter(), self._options.temperature
        replies = {
            "greedy": self.write([turn.prompt for turn in turns], adapter, temperature=0.0),
            "sampled": self.write([turn.prompt for turn in turns], adapter, temperature=heat),
            "scored": [self.likeliest(turn.prompt, turn.open_changes, adapter) for turn in turns],
            "scored_all": [self.likeliest(turn.prompt, turn.all_changes, adapter) for turn in turns],
        }
        found: dict[str, Any] = {way: figures(menu, turns, replies[way]) for way in WAYS}
        return found | {"answering_s": time.perf_counter() - started}

    def likeliest(self, prompt: str, changes: Sequence[Change], adapter: Path | None) -> str:
        """Return the reply with the likeliest of some changes."""
        texts = [candidate_text(change) for change in changes]
        scores = self.host.score(prompt, texts, deadline_s=3600.0, adapter=adapter).log_probs
        best = changes[scores.index(max(scores))]
        return reply_text(best.knob, best.value, "")

    @torch.inference_mode()
    def write(self, prompts: Sequence[str], adapter: Path | None, *, temperature: float) -> list[str]:
        """Return a reply to each prompt; at temperature 0 the likeliest tokens."""
        torch.manual_seed(self._options.seed)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        how = drawn if temperature > 0 else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        size, replies = self._options.write_batch, list[str]()
        with self._shelf.using(None if adapter is None else str(adapter)):
            for first in range(0, len(prompts), size):
                replies += self._replies(prompts[first : first + size], how)
        return replies

    def _replies(self, prompts: Sequence[str], how: Mapping[str, Any]) -> Iterator[str]:
        tokenizer, device = self._loaded.tokenizer, self._loaded.device
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids = [self._encoder.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
        longest = max(map(len, ids))
        inputs = torch.tensor([[filler] * (longest - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        how = {**how, "attention_mask": mask, "max_new_tokens": self._options.tokens, "pad_token_id": filler}
        how["eos_token_id"] = self._encoder.stops()
        output = self._loaded.model.generate(inputs, **how)
        return map(self._encoder.decode, output[:, longest:].tolist())


def corpus_of(store: SqlStore, campaign: Campaign, *, holdout: int, through: int | None = None) -> Corpus:
    state, settings = store.campaign(campaign.name), corpus_settings(with_distill(campaign, holdout=holdout))
    assert state is not None
    return build_corpus(store, state, prompt_frame(campaign), settings, through=through)


def asked_after(store: SqlStore, campaign: Campaign, lessons: Sequence[Lesson], rows: int) -> list[Asked]:
    """Return the turns after the first `rows` lessons."""
    menu, corpus, found = campaign.menu, corpus_of(store, campaign, holdout=len(lessons) - rows), []
    opened = OpenChanges(prompt_frame(campaign), lessons)
    for item in corpus.held_out:
        baseline = item.lesson.baseline
        grid = list(menu.moves(baseline, refinement=item.lesson.refinement))
        found.append(Asked(item.prompt, baseline, corpus.now.open_changes(item), grid, opened.before(item.asked)))
    return found


def figures(menu: Menu, turns: Sequence[Asked], replies: Sequence[str]) -> dict[str, Any]:
    """Return what is counted of the replies to the turns."""
    answers, counts = Counter[str](), Counter[str]()
    for turn, reply in zip(turns, replies, strict=True):
        verdict = check_reply(reply, menu=menu, baseline=turn.baseline, rails=())
        if verdict.proposal is None:
            continue
        knob, value = verdict.proposal.knob, verdict.value
        answers[f"{knob}={json.dumps(verdict.proposal.new_value if value is None else value)}"] += 1
        if value is not None:
            same = value == turn.baseline[knob]
            repeat = not same and turn.is_measured(changed_key(menu, turn.baseline, Change(knob, value)))
            counts.update(no_op=same, repeat=repeat, legal=verdict.passed, new=verdict.passed and not (same or repeat))
    parsed = answers.total()
    counts.update(parsed=parsed, top_share=max(answers.values(), default=0))
    shares: dict[str, Any] = {name: counts[name] / len(turns) for name in ("parsed", "legal", "new")}
    shares |= {name: counts[name] / parsed if parsed else None for name in ("top_share", "no_op", "repeat")}
    top = max(answers, key=answers.__getitem__, default=None)
    return {"prompts": len(turns), **shares, "distinct": len(answers), "top": top, "example": replies[0][:200]}


def run(options: argparse.Namespace) -> None:
    store = SqlStore.open(options.db)
    campaign = renamed(load_campaign(options.folder), options.campaign)
    plain: dict[str, Any] = {"min_rows": 1, "min_knobs": 1, "min_pairs": 1, "max_share": 1.0, "augment": []}
    plain |= {name: getattr(options, name) for name in ("r", "alpha", "learning_rate", "epochs", "batch", "seed")}
    campaign, state = with_distill(campaign, **plain, accumulation=1), store.campaign(options.campaign)
    assert state is not None
    (lessons, _), after = read_lessons(store, state.id, campaign.menu), options.after or max(options.rows)
    if not max(options.rows) <= after < len(lessons):
        sys.exit(f"`--rows` up to {max(options.rows)}, `--after` {after}: the store has {len(lessons)} rows")
    turns, models = asked_after(store, campaign, lessons, after)[: options.limit], Models(options)
    line: dict[str, Any] = {"campaign": options.campaign, "base": options.base, "device": models.host.load().device}
    line |= {"after": after, "turns": len(turns), "open": statistics.fmean(len(turn.open_changes) for turn in turns)}
    tell(**line, objective="zero-shot", rows=0, **models.answered(campaign.menu, turns, None))
    with tempfile.TemporaryDirectory() as place:
        for objective, rows in itertools.product(options.objectives, options.rows):
            learner, folder = with_distill(campaign, objective=objective), Path(place) / f"{objective}-{rows}"
            # As the campaign stood after these rows; a corpus holds at least one turn out, so the next one is that.
            corpus = corpus_of(store, learner, holdout=1, through=lessons[rows].attempt.iteration)
            section, report = learner.file.distill, corpus.report
            facts, how = facts_of(campaign.name, corpus, section, "v1"), recipe_of(section)
            trained = models.host.train(corpus.rows, recipe=how, facts=facts, folder=folder, progress=show)
            line |= {"rows": trained.rows, "too_long": len(trained.too_long), "epochs": how.epochs}
            line |= {"steps": trained.steps, "seconds": trained.wall_s, "losses": trained.losses}
            line |= {"taught_share": report.top_share, "taught_top": report.top_pair, "taught_distinct": report.pairs}
            tell(**line | models.answered(campaign.menu, turns, folder), objective=objective)
    models.host.close()
    store.close()


def show(news: TrainingReply) -> None:
    print(news.step, news.steps, news.loss, file=sys.stderr, flush=True)


def tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def summary(file: Path) -> None:
    """Print a table of the lines in a file: one row for each model and way of answering."""
    shares = ("parsed", "legal", "new", "top_share", "no_op", "repeat")
    names = ("model", "rows", "steps", "s", "loss", "answers", *shares, "distinct", "most frequent")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]
    for line in lines:
        losses = line.get("losses", [])
        cells = [line["objective"], line["rows"], line.get("steps", ""), f"{line['seconds']:.0f}" if losses else ""]
        cells.append(f"{losses[0]:.2f} to {losses[-1]:.2f}" if losses else "")
        for way in WAYS:
            own = line[way]
            percents = ["" if own[name] is None else f"{own[name]:.0%}" for name in shares]
            print("|", " | ".join(map(str, [*cells, way, *percents, own["distinct"], own["top"] or ""])), "|")
    if lines:
        print(f"\n{lines[0]['turns']} prompts, {lines[0]['open']:.1f} open changes each; {lines[0]['device']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for place in ("db", "campaign", "folder"):
        parser.add_argument(place, nargs="?")
    parser.add_argument("--rows", type=int, nargs="+", default=[42, 100, 160])
    parser.add_argument("--after", type=int, help="ask for the turns after this row; by default the largest of --rows")
    parser.add_argument("--limit", type=int, help="ask for so many turns only")
    parser.add_argument("--objectives", nargs="+", default=["clone"])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    for name, count in {"r": 16, "epochs": 5, "batch": 8, "seed": 0, "tokens": 64, "write-batch": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    for name, number in {"alpha": 32.0, "learning-rate": 3e-4, "temperature": 0.7}.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--summary", type=Path)
    options = parser.parse_args()
    if options.summary is not None:
        summary(options.summary)
    else:
        run(options)


if __name__ == "__main__":
    main()
