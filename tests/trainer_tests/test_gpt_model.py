"""The GPT's arithmetic against independent ones: torch.optim, autograd in float64, a hand-made average."""

from __future__ import annotations

import math

import pytest
import torch

from overnight.trainer import gpt_model

SHAPE = gpt_model.Shape(n_layer=2, n_head=2, d_model=32, d_ff=64, seq_len=24, vocab=50, padded_vocab=50)


def weights_of(shape: gpt_model.Shape, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    flat = torch.empty(gpt_model.buffer_size(shape)[0])
    gpt_model.initialise(shape, flat, seed)
    return flat, gpt_model.views(shape, flat)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (3, 25), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


class TestShape:
    def test_the_defaults_of_the_full_campaign_are_the_354_million_that_they_claim(self) -> None:
        shape = gpt_model.Shape(
            n_layer=24, n_head=16, d_model=1024, d_ff=4096, seq_len=1024, vocab=50257, padded_vocab=50304
        )
        assert round(shape.parameters / 1e6, 1) == 354.6

    def test_views_cover_the_buffer_without_overlap(self) -> None:
        flat, views = weights_of(SHAPE)
        flat.zero_()
        for view in views.values():
            view.add_(1)
        assert bool((flat == 1).all())


class TestInitialWeights:
    def test_a_seed_fixes_them(self) -> None:
        assert torch.equal(weights_of(SHAPE, 3)[0], weights_of(SHAPE, 3)[0])

    def test_another_seed_changes_them(self) -> None:
        assert not torch.equal(weights_of(SHAPE, 3)[0], weights_of(SHAPE, 4)[0])

    def test_padding_changes_no_other_weight_and_stays_zero(self) -> None:
        padded = gpt_model.Shape(n_layer=2, n_head=2, d_model=32, d_ff=64, seq_len=24, vocab=50, padded_vocab=128)
        plain, wide = weights_of(SHAPE)[1], weights_of(padded)[1]
        assert torch.equal(wide["tok"][:50], plain["tok"])
        assert torch.equal(wide["1.down"], plain["1.down"])
        assert not wide["tok"][50:].any()


class TestForward:
    # eps of the format times the roundings on the longest path (about 20 a block) at values of order one; measured
    # differences are a third of these.
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 0.05)])
    def test_it_agrees_with_float64(self, dtype: torch.dtype, bound: float) -> None:
        _, weights = weights_of(SHAPE)
        inputs, targets = batch()
        exact = gpt_model.token_losses(SHAPE, {k: v.double() for k, v in weights.items()}, inputs, targets)
        found = gpt_model.token_losses(SHAPE, {k: v.to(dtype) for k, v in weights.items()}, inputs, targets)
        assert float((found.double() - exact).abs().max()) < bound

    def test_an_untrained_model_is_as_good_as_a_guess(self) -> None:
        losses = gpt_model.token_losses(SHAPE, weights_of(SHAPE)[1], *batch())
        assert float(losses.mean()) == pytest.approx(math.log(50), abs=0.1)

    def test_no_token_sees_the_future(self) -> None:
        weights = weights_of(SHAPE)[1]
        inputs, targets = batch()
        changed = inputs.clone()
        changed[:, 12:] = 7
        before = gpt_model.token_losses(SHAPE, weights, inputs, targets).view(3, 24)[:, :12]
        after = gpt_model.token_losses(SHAPE, weights, changed, targets).view(3, 24)[:, :12]
        assert torch.equal(before, after)

    def test_padded_vocabulary_does_not_change_the_loss(self) -> None:
        padded = gpt_model.Shape(n_layer=2, n_head=2, d_model=32, d_ff=64, seq_len=24, vocab=50, padded_vocab=128)
        plain = gpt_model.token_losses(SHAPE, weights_of(SHAPE)[1], *batch())
        assert torch.equal(gpt_model.token_losses(padded, weights_of(padded)[1], *batch()), plain)


class TestAdamW:
    def test_it_is_torchs_with_clipping(self) -> None:
        flat = torch.randn(60, generator=torch.Generator().manual_seed(1))
        decayed, plain = torch.nn.Parameter(flat[:40].clone()), torch.nn.Parameter(flat[40:].clone())
        reference = torch.optim.AdamW(
            [{"params": [decayed], "weight_decay": 0.2}, {"params": [plain], "weight_decay": 0.0}],
            lr=0.01,
            betas=(0.8, 0.97),
        )
        ours = gpt_model.AdamW(beta1=0.8, beta2=0.97, weight_decay=0.2, clip=0.5, decayed=40)
        mean, square = torch.zeros(60), torch.zeros(60)
        for count in range(1, 6):
            gradient = torch.randn(60, generator=torch.Generator().manual_seed(count))
            decayed.grad, plain.grad = gradient[:40].clone(), gradient[40:].clone()
            torch.nn.utils.clip_grad_norm_([decayed, plain], 0.5)
            reference.step()
            ours.step(flat, gradient.clone(), mean, square, lr=0.01, count=count)
        expected = torch.cat([decayed, plain]).detach()
        assert torch.allclose(flat, expected, rtol=1e-5, atol=1e-7)


class TestSchedule:
    def test_it_rises_then_falls_to_a_tenth(self) -> None:
        rates = [gpt_model.learning_rate(1.0, step=step, warmup=5, done=(step - 5) / 55) for step in range(61)]
        assert rates[:5] == sorted(rates[:5])
        assert rates[5] == max(rates) == 1.0
        assert rates[-1] == pytest.approx(0.1)
