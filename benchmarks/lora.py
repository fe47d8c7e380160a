"""How fast an adapter is trained: plain recipes and ours, side by side in one run on one machine.

    python benchmarks/lora.py                    # a CUDA device: random weights in Qwen2.5-3B's shape, bf16
    python benchmarks/lora.py --device cpu       # the bundled 135M model

Rows have 850 tokens that all share and 336 of their own; `clone` learns the last 36, `outcome` the odds of every
candidate of the menu of `campaigns/gpt354m` instead (a tree of about 400 tokens behind 300 own). Training only, the
model being loaded. Prints one JSON line for each case; plain recipes are measured on fewer rows and scaled. On a CPU
that others share, compare `cpu_s_a_row`, the processor's own seconds, rather than rows a second.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from proposal import bundled, case, random_qwen

from overnight.distill.chat import ChatEncoder
from overnight.distill.encoding import EncodedRow
from overnight.distill.lora import LoraTraining
from overnight.distill.memory import Allowance, bytes_a_token
from overnight.distill.model import Loaded
from overnight.distill.recipe import LoraRecipe
from overnight.distill.shelf import AdapterShelf
from overnight.distill.trie import build_tree

SHARED, OWN, REPLY = 850, 300, 36


class Rows:
    """Rows of the benchmark's shape, of random tokens but for the candidates."""

    def __init__(self, vocabulary: int, candidates: Sequence[tuple[int, ...]]) -> None:
        self._draw = random.Random(0)
        self._vocabulary = vocabulary
        self._shared = self._tokens(SHARED)
        self._candidates = candidates

    def _tokens(self, number: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(self._vocabulary) for _ in range(number))

    def clone(self, number: int) -> list[EncodedRow]:
        """Return rows that learn one reply."""
        return [self._row(build_tree([self._tokens(REPLY)]), replies=((0, 1 / REPLY),)) for _ in range(number)]

    def outcome(self, number: int) -> list[EncodedRow]:
        """Return rows that learn the odds of every candidate."""
        tree, count = build_tree(self._candidates), len(self._candidates)
        choice = tuple((path, 1 / count) for path in range(count))
        return [self._row(tree, choice=choice) for _ in range(number)]

    def _row(self, tree: Any, replies: Any = (), choice: Any = ()) -> EncodedRow:
        prompt = (*self._shared, *self._tokens(OWN))
        empty: dict[str, Any] = {"pairs": (), "epoch": None, "choice_weight": 1.0}
        return EncodedRow(id="row", prompt=prompt, tree=tree, replies=replies, choice=choice, **empty)


@dataclass
class Bench:
    """One model, with what is measured on it."""

    loaded: Loaded
    shelf: AdapterShelf
    rows: Rows

    @property
    def cuda(self) -> bool:
        return self.loaded.device.type == "cuda"

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def ours(self, rows: list[EncodedRow], *, memory_gib: float | None = None, epochs: int = 5) -> dict[str, Any]:
        """Train as the model host does."""
        settings = LoraRecipe(epochs=epochs)
        name = self.shelf.fresh(settings)
        allowance = Allowance(self.loaded.device, memory_gib)
        most = allowance.tokens(bytes_a_token(self.loaded.model))
        with allowance.enforced():
            training = LoraTraining(self.loaded.model, name, settings, most_tokens=most)
            started, used = self.now(), time.process_time()
            done = training.run(rows)
            wall, used = self.now() - started, time.process_time() - used
        found = {"rows": len(rows), "epochs": settings.epochs, "steps": done.steps, "wall_s": round(wall, 2)}
        found |= {"rows_s": round(len(rows) * settings.epochs / wall, 2), "pack_tokens": training.most_tokens}
        found |= {"cpu_s_a_row": round(used / len(rows) / settings.epochs, 2)}
        found |= {"loss": round(done.losses[-1], 3), "peak_gib": round(allowance.peak_gib() or 0, 1) or None}
        del training
        self.shelf.discard(name)
        return found

    def plain(
        self, rows: list[EncodedRow], *, batch: int, accumulation: int, checkpointing: bool, tail: bool, total: int
    ) -> dict[str, Any]:
        """Train as peft's and transformers' documentation does, on `rows`; scale the time to `total` row passes."""
        model = self.loaded.model
        name = self.shelf.fresh(LoraRecipe())
        allowance = Allowance(self.loaded.device, None)
        parameters = [p.requires_grad_() for n, p in model.named_parameters() if f".{name}." in n]
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.01, fused=True)
        ids = torch.tensor([[*row.prompt, *row.tree.tokens, row.tree.edges[-1][1]] for row in rows])
        ids = ids.to(self.loaded.device)
        labels = ids.clone()
        labels[:, :-REPLY] = -100

        def step(at: int) -> None:
            for start in range(at, at + batch * accumulation, batch):
                some = slice(start, start + batch)
                if tail:
                    logits = model(ids[some], use_cache=False, logits_to_keep=REPLY + 1).logits[:, :-1]
                    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[some, -REPLY:].flatten())
                else:
                    loss = model(ids[some], labels=labels[some], use_cache=False).loss
                (loss / accumulation).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if self.cuda:
            step(0)
        started, used = self.now(), time.process_time()
        for at in range(0, len(rows), batch * accumulation):
            step(at)
        wall, used = self.now() - started, time.process_time() - used
        model.gradient_checkpointing_disable()
        model.eval()
        self.shelf.discard(name)
        rate = len(rows) / wall
        found = {"rows": len(rows), "rows_s": round(rate, 2), f"scaled_to_{total}_s": round(total / rate, 1)}
        found["cpu_s_a_row"] = round(used / len(rows), 2)
        return {**found, "peak_gib": round(allowance.peak_gib() or 0, 1) or None}


def cases(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return each case by its name."""
    rows, seed = bench.rows, {"checkpointing": True, "batch": 2, "accumulation": 4, "tail": False}
    tail = {"checkpointing": False, "batch": 8, "accumulation": 1, "tail": True}
    if not bench.cuda:
        return {
            "ours: clone": lambda: bench.ours(rows.clone(8), epochs=1),
            "plain: batch 2 x 4, checkpointing": lambda: bench.plain(rows.clone(8), total=210, **seed),
            "ours: outcome": lambda: bench.ours(rows.outcome(8), epochs=1),
        }
    return {
        "ours: clone, first of the process": lambda: bench.ours(rows.clone(42)),
        "ours: clone 42 x 5": lambda: bench.ours(rows.clone(42)),
        "ours: outcome 42 x 5": lambda: bench.ours(rows.outcome(42)),
        "ours: clone 42 x 5, 20 GiB": lambda: bench.ours(rows.clone(42), memory_gib=20),
        "ours: outcome 42 x 5, 20 GiB": lambda: bench.ours(rows.outcome(42), memory_gib=20),
        "ours: clone 200 x 5": lambda: bench.ours(rows.clone(200)),
        "plain: batch 2 x 4, checkpointing": lambda: bench.plain(rows.clone(24), total=210, **seed),
        "plain: batch 8, logits on the tail": lambda: bench.plain(rows.clone(24), total=210, **tail),
    }


def profile(bench: Bench, rows: list[EncodedRow]) -> None:
    """Print where the time of a step goes."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] * bench.cuda)]
    with torch.profiler.profile(activities=kinds) as found:
        bench.ours(rows, epochs=1)
    key = "self_cuda_time_total" if bench.cuda else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=70), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", help="measure only cases whose name contains one of these")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a step of each objective")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({"hardware": hardware, "torch": torch.__version__}), flush=True)
    model, tokenizer = random_qwen("cuda") if on_gpu else bundled()
    loaded = Loaded(model, tokenizer, torch.device(options.device), "random")
    encoder = ChatEncoder(tokenizer)
    texts = case(encoder, OWN).candidates
    bench = Bench(loaded, AdapterShelf(loaded), Rows(len(tokenizer), encoder.candidates(texts)))
    for name, measure in cases(bench).items():
        if options.only and not any(part in name for part in options.only):
            continue
        try:
            found = measure()
        except Exception as error:  # noqa: BLE001 one case that cannot run here must not hide the others
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({"case": name, **found}), flush=True)
    if options.profile:
        profile(bench, bench.rows.clone(16))
        profile(bench, bench.rows.outcome(16))


if __name__ == "__main__":
    main()
