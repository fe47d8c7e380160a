"""Packed training is row-by-row training: the same loss and gradients, from one pass behind one copy of the prompt."""

from pathlib import Path

import pytest
import torch

from overnight.distill.base import BaseModel
from overnight.distill.chat import ChatEncoder
from overnight.distill.encoding import encode_row
from overnight.distill.lora import LoraTraining
from overnight.distill.model import Loaded, load_base
from overnight.distill.recipe import LoraRecipe
from overnight.distill.rows import TrainingRow

from . import lessons

CPU = torch.device("cpu")


@pytest.fixture(name="tiny")
def _tiny(tiny_model: Path, tmp_path: Path) -> Loaded:
    return load_base(BaseModel("folder", str(tiny_model)), cache_dir=tmp_path, device=CPU)


def packed(loaded: Loaded, rows: list[TrainingRow], most_tokens: int = 10**6):
    encoder = ChatEncoder(loaded.tokenizer)
    recipe = LoraRecipe(dropout=0.0, r=4, alpha=8)
    training = LoraTraining(loaded.model, "default", recipe, most_tokens=most_tokens, product_dtype=torch.float32)
    with training._training():
        loss = training._gradients([encode_row(row, encoder) for row in rows], 0)
    return float(loss), lessons.gradients(loaded.model)


def plain(loaded: Loaded, rows: list[TrainingRow]):
    encoder = ChatEncoder(loaded.tokenizer)
    total = 0.0
    for row in rows:
        loss = lessons.plain_loss(loaded.model, encoder, row) / len(rows)
        loss.backward()
        total += float(loss.detach())
    return total, lessons.gradients(loaded.model)


@pytest.mark.parametrize(
    "rows", [lessons.clone_rows(), lessons.outcome_rows(), [*lessons.clone_rows(2), *lessons.outcome_rows(2)]]
)
def test_a_pack_gives_the_loss_and_the_gradients_of_its_rows_one_by_one(tiny, rows):
    lessons.with_adapter(tiny.model)
    wanted_loss, wanted = plain(tiny, rows)
    loss, found = packed(tiny, rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() < 1e-4 * wanted[name].norm(), (
            name,
            float((found[name] - wanted[name]).norm() / wanted[name].norm()),
        )
