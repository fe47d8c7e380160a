"""One pass over the tree gives what scoring each candidate alone gives, whatever is cached."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.distill.base import find_base
from overnight.distill.chat import ChatEncoder
from overnight.distill.fusing import FusedRMSNorm, fuse_norms
from overnight.distill.model import Loaded, load_base
from overnight.distill.scoring import GROWTH, MenuScorer
from overnight.store.errors import CampaignError

from . import texts

CPU = torch.device("cpu")


@cache
def load(name: str, folder: Path) -> Loaded:
    from overnight.agent.run import cache_folder

    return load_base(find_base(name, folder), cache_dir=cache_folder(), device=CPU)


@pytest.fixture(name="tiny")
def _tiny(tiny_model: Path) -> Loaded:
    return load(tiny_model.name, tiny_model.parent)


@torch.inference_mode()
def alone(model: Any, prompt: list[int], candidate: tuple[int, ...]) -> float:
    """Return a candidate's log-probability from a plain forward pass without cache or mask."""
    output = model(torch.tensor([[*prompt, *candidate]]), logits_to_keep=len(candidate) + 1)
    logits = output.logits[0, :-1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(candidate)[:, None]).sum())


def encoded(loaded: Loaded, brief: str = "") -> tuple[list[int], list[tuple[int, ...]]]:
    encoder = ChatEncoder(loaded.tokenizer)
    return encoder.prompt([{"role": "user", "content": texts.prompt(brief)}]), encoder.candidates(
        texts.candidate_texts()
    )


def test_every_candidate_of_the_full_menu_scores_as_if_alone(tiny):
    prompt, candidates = encoded(tiny)
    found = MenuScorer(tiny.model).score(prompt, candidates).log_probs
    assert found == pytest.approx([alone(tiny.model, prompt, one) for one in candidates], abs=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_candidate_of_every_knob_scores_as_if_alone_on_the_bundled_model(tmp_path):
    loaded = load("smollm2-135m", tmp_path)
    prompt, candidates = encoded(loaded)
    scorer = MenuScorer(loaded.model)
    scorer.score(encoded(loaded, "Another brief.")[0], candidates[:3])
    found = scorer.score(prompt, candidates).log_probs
    menu = texts.full_menu()
    first = {move.knob: number for number, move in reversed(list(enumerate(menu.moves(menu.default))))}
    assert len(first) == len(menu.knobs)
    expected = [alone(loaded.model, prompt, candidates[number]) for number in first.values()]
    assert [found[number] for number in first.values()] == pytest.approx(expected, abs=2e-3)


TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(turns=st.lists(st.tuples(TOKENS, st.lists(TOKENS.map(tuple), min_size=1, max_size=5)), min_size=2, max_size=5))
def test_what_is_cached_from_earlier_prompts_changes_nothing(tiny_model, turns):
    model = load(tiny_model.name, tiny_model.parent).model
    veteran = MenuScorer(model)
    for prompt, candidates in turns:
        fresh = MenuScorer(model).score(prompt, candidates).log_probs
        assert veteran.score(prompt, candidates).log_probs == pytest.approx(fresh, abs=1e-4)


def test_a_prompt_pays_only_for_what_follows_the_common_beginning(tiny):
    scorer = MenuScorer(tiny.model)
    scorer.score([5, 6, 7, 8, 9], [(1, 2)])
    assert scorer.score([5, 6, 7, 1, 1, 1], [(1, 2)]).reused_tokens == 3


def test_the_same_prompt_again_costs_one_token_of_it(tiny):
    scorer = MenuScorer(tiny.model)
    scorer.score([5, 6, 7], [(1, 2)])
    assert scorer.score([5, 6, 7], [(3,)]).reused_tokens == 2


def test_a_prompt_that_outgrows_the_cache_is_scored_right(tiny):
    scorer = MenuScorer(tiny.model)
    start = [number % 300 for number in range(GROWTH - 20)]
    scorer.score(start, [(1, 2)])
    longer = [*start, *range(50)]
    assert scorer.score(longer, [(1, 2)]).log_probs[0] == pytest.approx(alone(tiny.model, longer, (1, 2)), abs=1e-3)


def test_a_failed_pass_does_not_leave_a_cache_that_is_believed(tiny):
    scorer = MenuScorer(tiny.model)
    scorer.score([5, 6, 7], [(1, 2)])
    with pytest.raises(IndexError):
        scorer.score([5, 6, 7, 10**9], [(1, 2)])
    assert scorer.score([5, 6, 7, 8], [(1, 2)]).reused_tokens == 0


def test_a_model_with_a_sliding_window_is_refused():
    from transformers import AutoModelForCausalLM, Qwen2Config

    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config = Qwen2Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, **window
    )
    with pytest.raises(CampaignError, match='mode = "generate"'):
        MenuScorer(AutoModelForCausalLM.from_config(config))


def test_fused_norms_change_no_score(tiny_model):
    loaded = load_base(find_base(tiny_model.name, tiny_model.parent), cache_dir=tiny_model, device=CPU)
    prompt, candidates = encoded(loaded)
    before = MenuScorer(loaded.model).score(prompt, candidates).log_probs
    assert fuse_norms(loaded.model) == 5
    assert MenuScorer(loaded.model).score(prompt, candidates).log_probs == pytest.approx(before, abs=1e-3)


def test_a_norm_that_scales_otherwise_is_left_alone():
    class OnePlusRMSNorm(FusedRMSNorm):
        variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    parent = torch.nn.Sequential(OnePlusRMSNorm(torch.nn.Parameter(torch.ones(8)), 1e-6))
    assert fuse_norms(parent) == 0
