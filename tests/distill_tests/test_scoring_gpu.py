"""On a GPU the pass is a CUDA graph over padded lengths: it must give what a plain forward pass gives."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from overnight.distill.scoring import GROWTH, MenuScorer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CANDIDATES = [(1, 2, 3), (1, 2, 4, 5), (6,), (1, 2), (7, 8, 9, 1, 2, 3)]


@pytest.fixture(scope="module", name="model")
def _model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).cuda().eval().requires_grad_(False)


@torch.inference_mode()
def alone(model: Qwen2ForCausalLM, prompt: list[int], candidate: tuple[int, ...]) -> float:
    logits = model(torch.tensor([[*prompt, *candidate]], device="cuda")).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(candidate, device="cuda")[:, None]).sum())


@pytest.mark.parametrize("lengths", [[5], [100, 101, 40], [600, 700, 650], [GROWTH - 100, GROWTH + 30, 70]])
def test_scores_are_those_of_each_candidate_alone_whatever_the_lengths(model, lengths):
    scorer = MenuScorer(model)
    for turn, length in enumerate(lengths):
        prompt = [number % 60 for number in range(length // 2)] + [
            (number + turn) % 60 for number in range(length // 2)
        ]
        expected = [alone(model, prompt, candidate) for candidate in CANDIDATES]
        assert scorer.score(prompt, CANDIDATES).log_probs == pytest.approx(expected, abs=2e-3)


def test_a_graph_that_is_used_again_gives_the_new_prompt_s_scores(model):
    scorer = MenuScorer(model)
    for shift in range(4):
        prompt = [(number + shift) % 60 for number in range(50)]
        expected = [alone(model, prompt, candidate) for candidate in CANDIDATES]
        assert scorer.score(prompt, CANDIDATES).log_probs == pytest.approx(expected, abs=2e-3)
