"""Train students on tasks of other kinds of text and let them propose on a kind they never saw.

    python -P benchmarks/flywheel/students.py --kind python [--objective outcome] [--seeds 20] [--turns 50]

Appends one JSON line a campaign to results/students-KIND.jsonl and skips what is there, so that a run that was stopped
goes on. The model (the bundled SmolLM2-135M, unless `--base` names another) is trained and asked with the product's
own code: `overnight.distill` packs the rows, trains the adapter and scores the menu. Meant for a GPU: five minutes of
training and one of proposals for each kind of text on an H100 that all four share.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from arms import Proposal, applied, play
from lessons import prompt_of, taught
from resumed import stored
from tasks import KINDS, TASKS
from world import Campaign, table

from overnight.agent.proposers.candidates import probabilities
from overnight.agent.run import cache_folder
from overnight.distill import bundled
from overnight.distill.base import find_base
from overnight.distill.chat import ChatEncoder
from overnight.distill.encoding import encode_row
from overnight.distill.lora import LoraTraining
from overnight.distill.model import load_base, pick_device
from overnight.distill.recipe import LoraRecipe
from overnight.distill.scoring import MenuScorer
from overnight.rails.reply import candidate_text

ADAPTERS = Path(__file__).parents[2] / "build" / "flywheel"


class Student:
    """Scores the legal changes with a model and draws one, or takes the best at temperature 0."""

    def __init__(self, scorer: MenuScorer, encoder: ChatEncoder, temperature: float, seed: int) -> None:
        self._scorer, self._encoder, self._temperature = scorer, encoder, temperature
        self._rng = random.Random(f"student/{seed}")
        self.seconds = 0.0

    def propose(self, campaign: Campaign) -> Proposal | None:
        """Return the drawn change."""
        moves = campaign.moves()
        if not moves:
            return None
        started = time.perf_counter()
        prompt = self._encoder.prompt([{"role": "user", "content": prompt_of(campaign)}])
        texts = self._encoder.candidates([candidate_text(move) for move in moves])
        found = self._scorer.score(prompt, texts).log_probs
        self.seconds += time.perf_counter() - started
        return applied(campaign, self._rng.choices(moves, probabilities(found, self._temperature))[0])


def train(model: Any, encoder: ChatEncoder, lessons: Sequence[Any], recipe: LoraRecipe) -> Any:
    """Put an adapter into the model and train it; return peft's model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=recipe.r,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=[*recipe.targets],
            task_type="CAUSAL_LM",
        ),
    )
    encoded = [encode_row(row, encoder) for row in lessons]
    started = time.perf_counter()

    def told(news: Any) -> None:
        if news.step % 25 == 0 or news.step == news.steps:
            print(f"  step {news.step}/{news.steps} loss {news.loss:.3f} {news.seconds_left:.0f} s left", flush=True)

    training = LoraTraining(adapted.get_base_model(), "default", recipe, most_tokens=60_000)
    done = training.run(encoded, told)
    print(f"trained {done.steps} steps in {time.perf_counter() - started:.1f} s, losses {done.losses}", flush=True)
    return adapted


def main() -> None:
    """Train and measure what is missing for one kind of text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=bundled.NAME, help="a bundled model, a hub id or a folder of safetensors")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="where the outcome student's adapter is put")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--objective", choices=["outcome", "clone", "shuffled"], default="outcome")
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--processes", type=int, default=max((os.cpu_count() or 2) // 4, 1), help="that make its rows")
    parser.add_argument("--trained", action="store_true", help="ask the adapter that is there instead of training one")
    parser.add_argument("--zero-shot", action="store_true", help="measure the model as it comes, too")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"students-{given.kind}.jsonl"
    done = {(result["arm"], result["task"], result["seed"]) for result in stored(file)}
    base = find_base(given.base, Path.cwd())
    loaded = load_base(base, cache_dir=cache_folder(), device=pick_device(given.device))
    encoder = ChatEncoder(loaded.tokenizer)
    tasks = [task for task in TASKS if task.kind == given.kind]

    def measure(name: str, temperature: float, scorer: MenuScorer) -> None:
        with file.open("a") as stream:
            for task in tasks:
                for seed in range(given.seeds):
                    if (name, task.name, seed) in done:
                        continue
                    student = Student(scorer, encoder, temperature, seed)
                    result = play(student, Campaign(table(task.name), seed), given.turns)
                    spent = round(student.seconds, 3)
                    stream.write(json.dumps({"arm": name, **result, "model_seconds": spent}) + "\n")
                    stream.flush()
        print(f"{given.kind} {name} measured", flush=True)

    if given.zero_shot:
        scorer = MenuScorer(loaded.model)
        measure("zero-shot", 1.0, scorer)
        measure("zero-shot-greedy", 0.0, scorer)
    wanted = [(f"{given.objective}-greedy", 0.0), (given.objective, 1.0)]
    if all((name, task.name, seed) in done for name, _ in wanted for task in tasks for seed in range(given.seeds)):
        return
    if given.trained:
        from peft import PeftModel

        adapted: Any = PeftModel.from_pretrained(loaded.model, given.adapters / given.kind)
    else:
        lessons = taught(given.kind, given.rows, given.objective, given.processes)
        recipe = LoraRecipe(epochs=1, batch=given.batch, learning_rate=given.learning_rate, dropout=0.0)
        adapted = train(loaded.model, encoder, lessons, recipe)
        if given.objective == "outcome":
            adapted.save_pretrained(given.adapters / given.kind)
    adapted.merge_adapter()
    scorer = MenuScorer(adapted.get_base_model())
    for name, temperature in wanted:
        measure(name, temperature, scorer)


if __name__ == "__main__":
    main()
