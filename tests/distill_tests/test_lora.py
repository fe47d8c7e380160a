"""Packed training is row-by-row training: the same loss and gradients, from one pass behind one copy of the prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.distill.base import BaseModel
from overnight.distill.chat import ChatEncoder
from overnight.distill.encoding import EncodedRow, encode_row
from overnight.distill.fused_lora import FusedLora, fastest_products
from overnight.distill.lora import LoraTraining, batches, schedule
from overnight.distill.model import Loaded, load_base
from overnight.distill.recipe import LoraRecipe
from overnight.distill.rows import Reply, TrainingRow
from overnight.distill.shelf import AdapterShelf
from overnight.distill.trie import build_tree
from overnight.store.errors import CampaignError, ProposerError

from . import lessons

CPU = torch.device("cpu")
EXACT = LoraRecipe(dropout=0.0, r=4, alpha=8, max_length=8192)
WHOLE = 10**6
MIXED = [*lessons.clone_rows(2), *lessons.outcome_rows(2)]


@pytest.fixture(name="tiny")
def _tiny(tiny_model: Path, tmp_path: Path) -> Loaded:
    return load_base(BaseModel("folder", str(tiny_model)), cache_dir=tmp_path, device=CPU)


def training(loaded: Loaded, recipe: LoraRecipe = EXACT, most_tokens: int = WHOLE) -> LoraTraining:
    return LoraTraining(loaded.model, "default", recipe, most_tokens=most_tokens, product_dtype=torch.float32)


def encoded(loaded: Loaded, rows: list[TrainingRow]) -> list[EncodedRow]:
    return [encode_row(row, ChatEncoder(loaded.tokenizer)) for row in rows]


def packed(loaded: Loaded, rows: list[TrainingRow], **how: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one batch."""
    one = training(loaded, **how)
    with one._training():
        loss = float(one._gradients(encoded(loaded, rows), 0))
    return loss, lessons.gradients(loaded.model)


def plain(loaded: Loaded, rows: list[TrainingRow]) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for row in rows:
        loss = lessons.plain_loss(loaded.model, ChatEncoder(loaded.tokenizer), row) / len(rows)
        loss.backward()
        total += float(loss.detach())
    return total, lessons.gradients(loaded.model)


def agree(found: tuple[float, dict[str, torch.Tensor]], wanted: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert float((found[1][name] - grad).norm() / grad.norm()) < 1e-4, name


@pytest.mark.parametrize(
    "rows", [lessons.clone_rows(), lessons.outcome_rows(), MIXED], ids=["clone", "outcome", "both"]
)
def test_a_pack_gives_the_loss_and_the_gradients_of_its_rows_one_by_one(tiny, rows):
    lessons.with_adapter(tiny.model)
    wanted = plain(tiny, rows)
    agree(packed(tiny, rows), wanted)


def test_how_a_batch_is_cut_into_packs_changes_nothing(tiny):
    lessons.with_adapter(tiny.model)
    agree(packed(tiny, MIXED, most_tokens=1), packed(tiny, MIXED))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pack_of_the_bundled_model_gives_what_its_rows_give_one_by_one():
    from overnight.agent.run import cache_folder
    from overnight.distill.base import find_base

    base = find_base("smollm2-135m", Path())
    loaded = load_base(base, cache_dir=cache_folder(), device=CPU)
    lessons.with_adapter(loaded.model, spread=0.05)
    rows = [*lessons.clone_rows(1), *lessons.outcome_rows(2, most=8)]
    agree(packed(loaded, rows), plain(loaded, rows))


def test_layers_computed_twice_give_the_same_gradients(tiny):
    lessons.with_adapter(tiny.model)
    wanted = packed(tiny, MIXED)
    one = training(tiny)
    one._shrink(encoded(tiny, MIXED[:1]), "out of memory")
    assert one._checkpointing
    with one._training():
        loss = float(one._gradients(encoded(tiny, MIXED), 0))
    agree((loss, lessons.gradients(tiny.model)), wanted)


def test_dropout_is_the_same_in_both_passes_so_that_the_gradient_is_the_slope_of_the_loss(tiny):
    lessons.with_adapter(tiny.model)
    recipe = LoraRecipe(dropout=0.3, r=4, alpha=8)
    one, rows = training(tiny, recipe), encoded(tiny, lessons.clone_rows(2))
    vector = one._fused.vector
    torch.manual_seed(0)
    way = torch.randn_like(vector) * 2e-4  # short: the loss is curved
    with one._training():
        one._gradients(rows, 0)
        slope = float((vector.grad * way).sum())
        seen = []
        for sign in (1, -1):
            vector.data.add_(sign * way)
            one._fused.refresh()
            seen.append(float(one._gradients(rows, 0)))
            vector.data.sub_(sign * way)
    assert (seen[0] - seen[1]) / 2 == pytest.approx(slope, rel=0.02)


def test_dropout_differs_from_step_to_step_and_is_off_outside_training(tiny):
    lessons.with_adapter(tiny.model)
    one, rows = training(tiny, LoraRecipe(dropout=0.3, r=4, alpha=8)), encoded(tiny, lessons.clone_rows(1))
    with one._training():
        losses = {float(one._gradients(rows, step)) for step in (0, 1)}
    assert len(losses) == 2
    assert one.evaluate(rows) == pytest.approx(packed(tiny, lessons.clone_rows(1))[0], rel=1e-5)


def test_training_lowers_the_loss_that_it_is_measured_by(tiny):
    name = AdapterShelf(tiny).fresh(EXACT)
    one = LoraTraining(tiny.model, name, LoraRecipe(epochs=8, learning_rate=3e-3), most_tokens=WHOLE)
    rows = encoded(tiny, lessons.clone_rows(2))
    before = one.evaluate(rows)
    done = one.run(rows)
    assert done.steps == len(done.losses) == 8
    assert one.evaluate(rows) < 0.95 * before


def test_the_same_seed_trains_the_same_adapter(tiny):
    shelf, rows = AdapterShelf(tiny), encoded(tiny, lessons.clone_rows(3))
    recipe = LoraRecipe(epochs=2, batch=2, seed=5)
    made = []
    for _ in range(2):
        name = shelf.fresh(recipe)
        LoraTraining(tiny.model, name, recipe, most_tokens=WHOLE).run(rows)
        made.append(shelf.weights(name))
        shelf.discard(name)
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_each_step_is_told_with_its_epoch_and_the_time_left(tiny):
    name = AdapterShelf(tiny).fresh(EXACT)
    told: list[Any] = []
    LoraTraining(tiny.model, name, LoraRecipe(epochs=2, batch=2), most_tokens=WHOLE).run(
        encoded(tiny, lessons.clone_rows(3)), told.append
    )
    assert [(news.epoch, news.step, news.steps) for news in told] == [(1, 1, 4), (1, 2, 4), (2, 3, 4), (2, 4, 4)]
    assert told[-1].seconds_left == 0 < told[0].seconds_left


class _Scarce(LoraTraining):
    """Runs out of memory on packs of more than some rows."""

    most_rows = 1

    def _loss(self, pack):
        if pack.rows > self.most_rows or (self.most_rows == 0 and not self._checkpointing):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._loss(pack)


@pytest.mark.parametrize("most_rows", [1, 2])
def test_packs_become_smaller_when_memory_runs_out_and_the_step_is_the_same(tiny, most_rows):
    lessons.with_adapter(tiny.model)
    wanted = packed(tiny, MIXED)
    one = _Scarce(tiny.model, "default", EXACT, most_tokens=WHOLE, product_dtype=torch.float32)
    one.most_rows = most_rows
    taken: list[dict[str, torch.Tensor]] = []
    one._optimizer.step = lambda: taken.append(  # type: ignore[method-assign]  what the optimizer is given
        {name: p.grad.clone() for name, p in tiny.model.named_parameters() if p.grad is not None}
    )
    one._recipe = LoraRecipe(dropout=0.0, r=4, alpha=8, max_grad_norm=1e9)
    with one._training():
        loss = float(one._step(encoded(tiny, MIXED), 0))
    agree((loss, taken[0]), wanted)
    assert one.most_tokens < WHOLE


def test_no_memory_even_for_one_row_is_an_error_that_names_the_key(tiny):
    lessons.with_adapter(tiny.model)
    one = _Scarce(tiny.model, "default", EXACT, most_tokens=WHOLE, product_dtype=torch.float32)
    one.most_rows = 0
    with pytest.raises(ProposerError, match="memory_gib"):
        one.run(encoded(tiny, lessons.clone_rows(2)))


def test_a_loss_that_is_no_number_ends_the_training(tiny):
    lessons.with_adapter(tiny.model)
    with torch.no_grad():
        next(p for name, p in tiny.model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ProposerError, match="learning_rate"):
        training(tiny).run(encoded(tiny, lessons.clone_rows(1)))


def test_after_training_the_model_is_as_it_was(tiny):
    rows = encoded(tiny, lessons.clone_rows(1))
    shelf = AdapterShelf(tiny)
    ids = torch.arange(9)[None]
    before = tiny.model(ids).logits
    name = shelf.fresh(EXACT)
    LoraTraining(tiny.model, name, EXACT, most_tokens=WHOLE).run(rows)
    with shelf.using(None):
        assert torch.equal(tiny.model(ids).logits, before)
    assert not tiny.model.training
    assert tiny.model.config._attn_implementation == "sdpa"


def test_a_model_that_caps_its_logits_is_refused(tiny):
    from transformers import AutoModelForCausalLM, GraniteConfig

    config = GraniteConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=8.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=3.0)
    lessons.with_adapter(model)
    with pytest.raises(CampaignError, match="logits"):
        LoraTraining(model, "default", EXACT, most_tokens=WHOLE)


def test_the_3b_of_the_issue_trains_as_many_parameters_as_it_says():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    name = AdapterShelf(Loaded(model, None, torch.device("meta"), "")).fresh(LoraRecipe())
    fused = FusedLora(model, name, dropout=0.0, dtype=torch.bfloat16)
    assert fused.vector.numel() == 29_933_568
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_115_872_256


def test_a_schedule_rises_to_the_peak_and_falls_towards_zero():
    rates = [schedule(step, 30, 0.1) for step in range(30)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.01


def plain_row(number: int, epoch: int | None = None) -> EncodedRow:
    tree = build_tree([(1,)])
    return EncodedRow(
        id=str(number),
        prompt=(1, number),
        tree=tree,
        replies=((0, 1.0),),
        choice=(),
        choice_weight=1.0,
        pairs=(),
        epoch=epoch,
    )


def test_forty_two_rows_in_eights_for_five_epochs_are_thirty_steps():
    plan = batches([plain_row(n) for n in range(42)], LoraRecipe(epochs=5))
    assert sum(map(len, plan)) == 30
    orders = [[row.id for batch in epoch for row in batch] for epoch in plan]
    assert all(sorted(order, key=int) == [str(n) for n in range(42)] for order in orders)
    assert len({tuple(order) for order in orders}) == 5


def test_a_row_of_one_epoch_is_seen_in_that_epoch_alone():
    rows = [plain_row(0), plain_row(1, epoch=1), plain_row(2, epoch=0)]
    plan = batches(rows, LoraRecipe(epochs=3))
    assert [{row.id for batch in epoch for row in batch} for epoch in plan] == [{"0", "2"}, {"0", "1"}, {"0"}]


def test_a_row_without_a_supervised_token_is_named(tiny):
    with pytest.raises(AssertionError, match="training row `turn 3`"):
        encode_row(TrainingRow(id="turn 3", prompt="x", replies=(Reply(""),)), ChatEncoder(tiny.tokenizer))


def test_layers_that_are_not_adapted_train_in_their_own_precision(tiny):
    recipe = LoraRecipe(targets=("q_proj", "v_proj"), epochs=1)
    name = AdapterShelf(tiny).fresh(recipe)
    one = LoraTraining(tiny.model, name, recipe, most_tokens=WHOLE)
    assert one._dtype == torch.float32
    one.run(encoded(tiny, lessons.clone_rows(1)))


def test_the_precision_follows_from_the_processor_alone(tiny, monkeypatch):
    AdapterShelf(tiny).fresh(LoraRecipe())
    for able, wanted in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert fastest_products(tiny.model) == wanted


def test_bf16_products_come_near_the_gradients_of_float32(tiny):
    lessons.with_adapter(tiny.model, spread=0.05)
    wanted = packed(tiny, MIXED)[1]
    one = LoraTraining(tiny.model, "default", EXACT, most_tokens=WHOLE, product_dtype=torch.bfloat16)
    with one._training():
        one._gradients(encoded(tiny, MIXED), 0)
    found = lessons.gradients(tiny.model)
    error = sum(float((found[name] - grad).square().sum()) for name, grad in wanted.items())
    assert (error / sum(float(grad.square().sum()) for grad in wanted.values())) ** 0.5 < 0.1


def test_rows_are_shuffled_by_the_seed():
    rows = [plain_row(n) for n in range(20)]
    orders = {tuple(row.id for batch in batches(rows, LoraRecipe(seed=s))[0] for row in batch) for s in range(5)}
    assert len(orders) == 5
