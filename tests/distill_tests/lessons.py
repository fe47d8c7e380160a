"""Training rows, and a plain trainer to compare with: one row and text at a time, as peft and transformers compute."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from overnight.distill.chat import ChatEncoder
from overnight.distill.rows import Pair, Reply, TrainingRow

from . import texts

Tensor = torch.Tensor
REPLY = '{"knob": "lr", "new_value": 0.001, "reason": "a larger step"}'


def prompts(number: int) -> list[str]:
    return [texts.prompt(f"Brief of turn {turn}." + " More." * turn, lr=1e-4 * (turn + 1)) for turn in range(number)]


def clone_rows(number: int = 3) -> list[TrainingRow]:
    return [TrainingRow(id=f"c{n}", prompt=p, replies=(Reply(REPLY),)) for n, p in enumerate(prompts(number))]


def outcome_rows(number: int = 3, most: int = 20) -> list[TrainingRow]:
    """Rows that choose among different numbers of candidates; the first writes too, the second has pairs."""
    rows = []
    for turn, prompt in enumerate(prompts(number)):
        candidates = tuple(texts.candidate_texts()[turn : turn + most - turn])
        weights = [1.0 + (place * 7 + turn) % 5 for place in range(len(candidates))]
        rows.append(
            TrainingRow(
                id=f"o{turn}",
                prompt=prompt,
                candidates=candidates,
                choice=tuple(weight / sum(weights) for weight in weights),
                replies=(Reply(REPLY, weight=0.3),) if turn == 0 else (),
                pairs=(Pair(0, 5, 0.8), Pair(3, 2, weight=0.5)) if turn == 1 else (),
                weight=1.0 + turn,
            )
        )
    return rows


def with_adapter(model: Any, *, r: int = 4, seed: int = 0, spread: float = 0.3) -> Any:
    """Put an adapter that does something into a model's layers; return peft's view of it."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=names, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks transformers by an old name
        peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return peft


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of the adapter and forget them."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain_loss(model: Any, encoder: ChatEncoder, row: TrainingRow) -> Tensor:
    """Return a row's loss from a forward pass for each text, as its definition says."""
    prompt = encoder.prompt([{"role": "user", "content": row.prompt}])

    def total(tokens: Sequence[int]) -> Tensor:
        logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum()

    loss = torch.zeros(())
    for reply in row.replies:
        tokens = [*encoder.candidates([reply.text])[0], *encoder.ending()]
        loss = loss - reply.weight * total(tokens) / len(tokens)
    if row.candidates:
        totals = torch.stack([total(tokens) for tokens in encoder.candidates(row.candidates)])
        loss = loss - row.choice_weight * (totals.log_softmax(0) * torch.tensor(row.choice)).sum()
        for pair in row.pairs:
            chance = (totals[pair.better] - totals[pair.worse]).sigmoid()
            sure = pair.probability
            loss = loss - pair.weight * (sure * chance.log() + (1 - sure) * (1 - chance).log())
    return row.weight * loss
