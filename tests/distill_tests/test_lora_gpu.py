"""On a GPU packs go through FlashAttention in bf16: gradients must be those of exact attention in float32."""

import copy
import random

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from overnight.distill import packed_attention
from overnight.distill.encoding import EncodedRow
from overnight.distill.lora import LoraTraining
from overnight.distill.model import Loaded
from overnight.distill.recipe import LoraRecipe
from overnight.distill.shelf import AdapterShelf
from overnight.distill.trie import build_tree

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
RECIPE = LoraRecipe(dropout=0.0, r=4, alpha=8)


@pytest.fixture(scope="module", name="model")
def _model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
    )
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    AdapterShelf(Loaded(model, None, torch.device("cpu"), "")).fresh(RECIPE)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.cuda()


def row(draw: random.Random, own: int, *, tree: bool) -> EncodedRow:
    def tokens(number: int) -> tuple[int, ...]:
        return tuple(draw.randrange(512) for _ in range(number))

    start = tokens(4)
    paths = [start + tokens(draw.randrange(1, 9)) for _ in range(60)] if tree else [tokens(20)]
    grown = build_tree(paths)
    prompt = (*range(200), *tokens(own))
    choice = tuple((path, (path + 1) / 1830) for path in range(60)) if tree else ()
    replies = () if tree else ((0, 0.05),)
    return EncodedRow(
        id="r", prompt=prompt, tree=grown, replies=replies, choice=choice, choice_weight=1.0, pairs=(), epoch=None
    )


def gradient(model: Qwen2ForCausalLM, rows: list[EncodedRow], most_tokens: int = 10**6) -> tuple[float, torch.Tensor]:
    """Return the loss, and the gradient of all of the adapter as one vector."""
    training = LoraTraining(model, "adapter1", RECIPE, most_tokens=most_tokens)
    with training._training():
        loss = float(training._gradients(rows, 0))
    found = [p.grad.float().flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss, torch.cat(found)


@pytest.mark.parametrize("kinds", [[False] * 5, [True] * 3, [True, False, True, False]])
def test_flash_attention_is_as_near_to_float32_as_exact_attention_in_bf16(model, kinds, monkeypatch):
    draw = random.Random(1)
    rows = [row(draw, 30 + 17 * number, tree=tree) for number, tree in enumerate(kinds)]
    wanted_loss, wanted = gradient(model, rows)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for name, parameter in half.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()

    def error(most_tokens: int) -> float:
        loss, found = gradient(half, rows, most_tokens)
        assert loss == pytest.approx(wanted_loss, rel=0.01)
        return float((found - wanted).norm() / wanted.norm())

    flash = [error(10**6), error(1)]  # one pack, and a pack for each row
    monkeypatch.setattr(packed_attention, "FLASH_WIDTHS", frozenset())
    exact = error(10**6)
    print(flash, exact)
    assert max(flash) < 1.3 * exact


def test_dropout_keeps_its_share_and_the_backward_pass_finds_the_same_elements():
    from overnight.distill.kernels import lora_down, lora_down_backward

    width, rate, seed = 64, 0.25, 7
    ones, identity = torch.ones(4000, width, device="cuda"), torch.eye(width, device="cuda")
    kept = lora_down(ones, identity, rate, seed, 1.0, width) * (1 - rate)  # what is kept of each element, 0 or 1
    x_grad, down_grad = torch.zeros_like(ones), torch.zeros_like(identity)
    lora_down_backward(ones, ones, identity, x_grad, down_grad, rate, seed, 1.0, width)
    assert float(kept.mean()) == pytest.approx(1 - rate, abs=0.005)
    assert torch.allclose(x_grad, kept / (1 - rate))
    assert torch.allclose(down_grad, (kept.sum(0) / (1 - rate)).expand(width, width))


def test_each_seed_drops_other_elements():
    from overnight.distill.kernels import lora_down

    ones, identity = torch.ones(4000, 64, device="cuda"), torch.eye(64, device="cuda")
    one, other = (lora_down(ones, identity, 0.5, seed, 1.0, 64) > 0 for seed in (1, 2))
    assert float((one == other).float().mean()) == pytest.approx(0.5, abs=0.01)
