"""How long one proposal takes: writing a reply, scoring candidates one by one, and our one pass, side by side.

    python benchmarks/proposal.py                       # a CUDA device: random weights in Qwen2.5-3B's shape, bf16
    python benchmarks/proposal.py --device cpu          # the bundled 135M model, float32

Prints one JSON line for each case. Everything is measured in one run on one machine: the menu and prompt of
`campaigns/gpt354m`, its constant part behind a cache where a method has one, and 300 and 700 tokens after it that are
new with each proposal. A latency is the median over repetitions, from text to log-probabilities or text.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overnight.distill.chat import ChatEncoder
from overnight.distill.fusing import fuse_norms
from overnight.distill.scoring import MenuScorer
from overnight.rails.menu import Knob, Menu
from overnight.store.prompt import KnobFact, PromptFacts, render_constant, render_variable

QWEN_3B = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
"""https://huggingface.co/Qwen/Qwen2.5-3B-Instruct, config.json"""
REPLY_TOKENS = 36
"""A short reply in JSON; the shortest that a model may give is worth comparing with, so no reply is longer here."""
LINEAGES = (300, 700)
CAMPAIGN = Path(__file__).parents[1] / "campaigns" / "gpt354m"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """The texts of one proposal."""

    constant: str
    variable: str
    candidates: list[str]

    def prompt(self, turn: int) -> str:
        """Return the prompt of a turn: what follows the constant part differs from the first token on."""
        return f"{self.constant}\n{turn} {self.variable}"


def gpt354m_menu() -> Menu:
    """Read the menu without the campaign's own models, so that this file runs where only torch is installed."""
    knobs = []
    for name, section in tomllib.loads((CAMPAIGN / "campaign.toml").read_text())["knobs"].items():
        low, high = section.pop("range", (None, None))
        knobs.append(Knob(name=name, choices=tuple(section.pop("choices", ())), low=low, high=high, **section))
    return Menu(tuple(knobs))


def case(encoder: ChatEncoder, lineage: int) -> Case:
    """Return the texts with `lineage` tokens after the constant part."""
    menu = gpt354m_menu()
    facts = PromptFacts(
        metric="val_bpb",
        direction="min",
        gain="relative",
        min_gain=0.005,
        knobs=[KnobFact(knob.name, knob.describe(), knob.doc) for knob in menu.knobs],
        rules=["d_model % n_head == 0 (attention heads must divide the width)", "lr_warmup + 5 <= steps"],
        brief=(CAMPAIGN / "brief.md").read_text(),
        config=menu.default,
        baseline_metric=1.5,
        turns=0,
        totals=[],
        gain_sd=None,
        recent=[],
        lineage=True,
    )
    filler = "\n".join(
        f"- turn {n}: {m.knob} = {m.value}: reverted -0.{n % 97}%" for n, m in enumerate(menu.moves(menu.default))
    )
    ids = encoder.candidates([render_variable(facts) + filler])[0]
    moves = menu.moves(menu.default)
    texts = [f'{{"knob": {json.dumps(move.knob)}, "new_value": {json.dumps(move.value)},' for move in moves]
    return Case(render_constant(facts), encoder.decode(ids[: lineage - 8]), texts)


def prompt_ids(encoder: ChatEncoder, text: str) -> list[int]:
    return encoder.prompt([{"role": "user", "content": text}])


def random_qwen(device: str) -> tuple[Any, Any]:
    """Return a model of Qwen2.5-3B's shape with random weights, and a tokenizer trained on Python's own library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)  # as Qwen2.5 does
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [source.read_text(errors="replace") for source in sources]
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, eos_token="<|im_end|>")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(Qwen2Config(**QWEN_3B), attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    fuse_norms(model)  # as `load_base` does on a GPU
    return model.eval().requires_grad_(False), fast


def bundled() -> tuple[Any, Any]:
    """Return the bundled 135M model, from the user's cache."""
    from overnight.agent.run import cache_folder
    from overnight.distill.base import find_base
    from overnight.distill.model import load_base

    loaded = load_base(find_base("smollm2-135m", Path()), cache_dir=cache_folder(), device=torch.device("cpu"))
    return loaded.model, loaded.tokenizer


def timed(call: Callable[[int], object], repeats: int, warm: int) -> dict[str, float]:
    """Return latencies in milliseconds of `call(turn)`, after `warm` calls that are not counted."""
    seconds = []
    for turn in range(warm + repeats):
        started = time.perf_counter()
        call(turn)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    kept = seconds[warm:]
    return {
        "ms": round(statistics.median(kept) * 1e3, 1),
        "ms_min": round(min(kept) * 1e3, 1),
        "ms_max": round(max(kept) * 1e3, 1),
        "first_ms": round(seconds[0] * 1e3, 1),
    }


class Methods:
    """Every way to a proposal that is compared here, on one model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.encoder = model, ChatEncoder(tokenizer)
        self.device = next(model.parameters()).device
        self.scorer = MenuScorer(model)

    def tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.device)

    @torch.inference_mode()
    def generate(self, ids: list[int], **how: Any) -> object:
        settings = {"max_new_tokens": REPLY_TOKENS, "min_new_tokens": REPLY_TOKENS, "do_sample": False}
        inputs = self.tensor(ids)
        mask = torch.ones_like(inputs)
        return self.model.generate(inputs, attention_mask=mask, pad_token_id=0, **settings, **how)

    @torch.inference_mode()
    def prefilled(self, ids: list[int], cache: Any = None) -> Any:
        """Return the cache of `ids` (after those of `cache`, which is left as it was)."""
        from transformers import DynamicCache

        cache = DynamicCache() if cache is None else copy.deepcopy(cache)
        self.model(self.tensor(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def alone(self, prefix: Any, first: torch.Tensor, candidate: tuple[int, ...]) -> float:
        """Return one candidate's log-probability behind the cache of the whole prompt."""
        cache = copy.deepcopy(prefix)
        logits = self.model(self.tensor(list(candidate[:-1])), past_key_values=cache, use_cache=True).logits[0]
        rows = torch.cat([first, logits]).float().log_softmax(-1)
        return float(rows.gather(1, torch.tensor(candidate, device=self.device)[:, None]).sum())


def cases(methods: Methods, lineage: int, repeats: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield each method's name and what measures it."""
    texts = case(methods.encoder, lineage)
    encoder, model = methods.encoder, methods.model
    candidates = encoder.candidates(texts.candidates)
    constant = encoder.prompt([{"role": "user", "content": texts.constant}])
    shared = next(
        n for n, (a, b) in enumerate(zip(constant, prompt_ids(encoder, texts.prompt(0)), strict=False)) if a != b
    )
    prefix = methods.prefilled(constant[:shared])

    def ours(turn: int) -> object:
        ids = prompt_ids(encoder, texts.prompt(turn))
        return methods.scorer.score(ids, encoder.candidates(texts.candidates))

    def ours_ms() -> dict[str, Any]:
        found = timed(ours, repeats * 4, 3)
        scores = methods.scorer.score(prompt_ids(encoder, texts.prompt(999)), candidates)
        sizes = {
            "candidates": len(candidates),
            "tree_tokens": scores.tree_tokens,
            "cached_tokens": scores.reused_tokens,
        }
        return {**found, **sizes, "prompt_tokens": scores.prompt_tokens}

    def whole(turn: int) -> object:
        return methods.generate(prompt_ids(encoder, texts.prompt(turn)))

    def cached(turn: int) -> object:
        ids = prompt_ids(encoder, texts.prompt(turn))
        return methods.generate(ids, past_key_values=copy.deepcopy(prefix))

    def static(turn: int) -> object:
        return methods.generate(prompt_ids(encoder, texts.prompt(turn)), cache_implementation="static")

    @torch.inference_mode()
    def one_by_one(turn: int) -> object:
        ids = prompt_ids(encoder, texts.prompt(turn))
        behind = methods.prefilled(ids[shared:], prefix)
        first = model(methods.tensor(ids[-1:]), use_cache=False).logits[0, -1:]
        return [methods.alone(behind, first, candidate) for candidate in candidates]

    @torch.inference_mode()
    def each_with_lineage(turn: int) -> object:
        ids = prompt_ids(encoder, texts.prompt(turn))
        candidate = candidates[turn % len(candidates)]
        new = methods.tensor([*ids[shared:], *candidate[:-1]])
        logits = model(new, past_key_values=copy.deepcopy(prefix), use_cache=True, logits_to_keep=len(candidate)).logits
        chosen = logits[0].float().log_softmax(-1).gather(1, torch.tensor(candidate, device=new.device)[:, None])
        return float(chosen.sum())

    def each_ms() -> dict[str, Any]:
        one = timed(each_with_lineage, 6, 2)
        return {"ms": round(one["ms"] * len(candidates), 1), "ms_each": one["ms"], "scaled_from": 6}

    yield "ours", ours_ms
    yield "one by one behind the prompt's cache", lambda: timed(one_by_one, max(1, repeats // 3), 1)
    yield "one by one behind the constant part's cache", each_ms
    yield "eager generate", lambda: timed(whole, repeats, 1)
    yield "eager generate behind the constant part's cache", lambda: timed(cached, repeats, 1)
    yield "static cache and compile", lambda: timed(static, repeats, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--only", nargs="*", help="measure only methods whose name contains one of these")
    parser.add_argument("--lineages", type=int, nargs="*", default=LINEAGES)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({"hardware": hardware, "torch": torch.__version__, "reply_tokens": REPLY_TOKENS}), flush=True)
    methods = Methods(*(random_qwen("cuda") if on_gpu else bundled()))
    for lineage in options.lineages:
        for name, measure in cases(methods, lineage, options.repeats):
            if options.only and not any(part in name for part in options.only):
                continue
            try:
                found = measure()
            except Exception as error:  # noqa: BLE001 one method that cannot run here must not hide the others
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps({"lineage": lineage, "method": name, **found}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
