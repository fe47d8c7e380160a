"""Distilling through the real model host: what it tells, what it writes, and what is left when it is stopped."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from overnight.distill.adapter import CONFIG, WEIGHTS, AdapterFacts, read_record
from overnight.distill.base import find_base
from overnight.distill.host import ModelHost
from overnight.distill.recipe import LoraRecipe
from overnight.distill.wire import TrainedReply, TrainingReply
from overnight.store.errors import CampaignError, ProposerError

from . import lessons

RECIPE = LoraRecipe(epochs=2, batch=2, r=4, alpha=8, learning_rate=3e-3, max_length=8192)
FACTS = AdapterFacts(campaign="night", version="v1", objective="outcome", corpus_sha256="c" * 64, cut=3)
ROWS = lessons.clone_rows(3)
CANDIDATES = ['{"knob": "lr", "new_value": 0.001,', '{"knob": "lr", "new_value": 0.01,', '{"knob": "beta1",']


@pytest.fixture(scope="module", name="host")
def _host(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelHost]:
    host = ModelHost(find_base(tiny_model.name, tiny_model.parent), tmp_path_factory.mktemp("cache"), device="cpu")
    yield host
    host.close()


def train(host: ModelHost, folder: Path, **how: object) -> TrainedReply:
    settings = {"recipe": RECIPE, "facts": FACTS, "folder": folder, **how}
    return host.train(settings.pop("rows", ROWS), **settings)  # type: ignore[arg-type]


def scores(host: ModelHost, adapter: Path | None = None) -> list[float]:
    return host.score("Propose one change.", CANDIDATES, deadline_s=60, adapter=adapter).log_probs


def left(folder: Path) -> list[Path]:
    return list(folder.parent.iterdir()) if folder.parent.is_dir() else []


def test_a_new_adapter_answers_at_once_as_it_does_after_a_restart_and_the_base_as_before(host, tmp_path):
    folder, before = tmp_path / "night" / "v1", scores(host)
    pid = host.load() and host.pid
    train(host, folder)
    fresh = scores(host, folder)
    assert scores(host) == pytest.approx(before, abs=1e-4)
    assert fresh != pytest.approx(before, abs=0.01)
    assert host.pid == pid
    host.close()
    assert scores(host, folder) == pytest.approx(fresh, abs=1e-4)


def test_what_is_told_agrees_with_what_is_recorded(host, tmp_path):
    told: list[TrainingReply] = []
    folder = tmp_path / "night" / "v1"
    done = train(host, folder, held_out=lessons.clone_rows(1), progress=told.append)
    record = read_record(folder)
    assert (record.sha256, record.losses, record.steps) == (done.sha256, done.losses, done.steps)
    assert (record.facts["corpus_sha256"], record.facts["cut"]) == ("c" * 64, 3)
    assert record.held_out_after is not None
    assert record.held_out_before is not None
    assert record.held_out_after < record.held_out_before
    assert (told[-1].step, told[-1].steps, told[-1].epoch, told[-1].epochs) == (4, 4, 2, 2)


def test_the_files_are_in_the_format_of_peft(host, tmp_path):
    folder = tmp_path / "v1"
    train(host, folder)
    with safe_open(folder / WEIGHTS, "pt") as weights:
        names = set(weights.keys())
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names
    assert len(names) == 2 * 2 * 7
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")


def test_peft_itself_computes_with_the_adapter_what_the_host_does(host, tmp_path, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from overnight.distill.chat import ChatEncoder

    folder = tmp_path / "v1"
    train(host, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.warns(FutureWarning):  # peft asks transformers by an old name
        model = PeftModel.from_pretrained(model, folder).eval()
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_model))
    prompt = encoder.prompt([{"role": "user", "content": "Propose one change."}])
    (tokens,) = encoder.candidates(CANDIDATES[:1])
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    alone = float(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum())
    assert scores(host, folder)[0] == pytest.approx(alone, abs=1e-3)


def test_rows_that_are_too_long_are_left_out_and_named(host, tmp_path):
    lengths = LoraRecipe(epochs=1, max_length=1200)
    short = lessons.TrainingRow(id="short", prompt="Propose.", replies=ROWS[0].replies)
    done = train(host, tmp_path / "v1", rows=[ROWS[0], short], recipe=lengths)
    assert (done.rows, done.too_long) == (1, ["c0"])


@pytest.mark.slow
def test_no_row_that_is_short_enough_is_an_error_that_names_the_key(host, tmp_path):
    with pytest.raises(CampaignError, match="max_length = 10"):
        train(host, tmp_path / "v1", recipe=LoraRecipe(max_length=10))
    assert left(tmp_path / "v1") == []


def test_a_row_that_teaches_nothing_never_reaches_the_host(host, tmp_path):
    with pytest.raises(AssertionError, match="training row `empty`"):
        train(host, tmp_path / "v1", rows=[lessons.TrainingRow(id="empty", prompt="p")])


def test_a_folder_that_is_there_is_refused_before_anything_is_trained(host, tmp_path):
    folder = tmp_path / "v1"
    train(host, folder)
    before = (folder / WEIGHTS).read_bytes()
    told: list[TrainingReply] = []
    with pytest.raises(CampaignError, match="never overwritten"):
        train(host, folder, progress=told.append)
    assert not told
    assert (folder / WEIGHTS).read_bytes() == before


def test_what_progress_raises_stops_the_training_and_leaves_nothing(host, tmp_path):
    def stop(_news: TrainingReply) -> None:
        raise LookupError("the lease is gone")

    with pytest.raises(LookupError, match="lease"):
        train(host, tmp_path / "night" / "v1", progress=stop)
    assert host.pid is None
    assert left(tmp_path / "night" / "v1") == []


def test_a_killed_host_leaves_no_half_adapter_and_the_next_training_is_whole(host, tmp_path):
    folder = tmp_path / "night" / "v1"

    def kill(_news: TrainingReply) -> None:
        for process in psutil.Process(host.pid).children():
            process.kill()

    with pytest.raises(ProposerError, match="killed by SIGKILL"):
        train(host, folder, progress=kill)
    assert left(folder) == []
    train(host, folder)
    assert read_record(folder).rows == 3


def test_a_tampered_adapter_is_refused_where_it_is_used(host, tmp_path):
    folder = tmp_path / "v1"
    train(host, folder)
    copy = shutil.copytree(folder, tmp_path / "v2")
    (copy / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b"\1")
    with pytest.raises(CampaignError, match=f"`{WEIGHTS}` was changed"):
        scores(host, copy)


def test_more_adapters_than_are_kept_in_memory_still_answer(host, tmp_path):
    first = None
    for number in range(6):
        train(host, tmp_path / f"v{number}", recipe=LoraRecipe(epochs=1, r=2, seed=number, max_length=8192))
        first = first or scores(host, tmp_path / "v0")
    assert scores(host, tmp_path / "v0") == pytest.approx(first, abs=1e-4)
