"""Log-probabilities computed piece by piece are those of whole logits, and so are their gradients."""

import pytest
import torch

from overnight.distill import losses
from overnight.distill.losses import edge_log_probs

SOURCES = torch.tensor([0, 0, 1, 2, 2, 2, 4])
TOKENS = torch.tensor([5, 6, 5, 0, 1, 10, 3])


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.randn(len(TOKENS))


@pytest.mark.parametrize("at_once", [1, 11, 22, 1000])
def test_in_pieces_of_any_size_they_are_those_of_whole_logits(monkeypatch, at_once):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    hidden, head, grad = drawn()
    found = edge_log_probs(hidden, head, SOURCES, TOKENS)
    found.backward(grad)
    pieces, hidden.grad = hidden.grad, None
    whole = (hidden @ head.T).log_softmax(-1)[SOURCES, TOKENS]
    whole.backward(grad)
    assert torch.allclose(found, whole, atol=1e-5)
    assert torch.allclose(pieces, hidden.grad, atol=1e-5)
