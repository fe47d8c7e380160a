"""The model host, as a real process around a real tiny model."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from overnight.distill.base import BaseModel, find_base
from overnight.distill.chat import ChatEncoder
from overnight.distill.host import ModelHost
from overnight.distill.host_main import _error
from overnight.distill.model import load_base
from overnight.distill.resident import Resident
from overnight.distill.scoring import MenuScorer
from overnight.distill.wire import unpack
from overnight.store.errors import CampaignError, ProposerError
from overnight.trainer.wire import WireError

CANDIDATES = ['{"knob": "lr", "new_value": 0.001,', '{"knob": "lr", "new_value": 0.01,', '{"knob": "beta1",']
DEADLINE_S = 60.0


@pytest.fixture(scope="module", name="host")
def _host(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelHost]:
    base = find_base(tiny_model.name, tiny_model.parent)
    host = ModelHost(base, tmp_path_factory.mktemp("cache"), device="cpu")
    yield host
    host.close()


@pytest.fixture(scope="module", name="adapter")
def _adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose weights are not the ones that change nothing."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    loaded = load_base(BaseModel("folder", str(tiny_model)), cache_dir=folder, device=torch.device("cpu"))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks transformers by an old name
        model = get_peft_model(loaded.model, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def scores(host: ModelHost, adapter: Path | None = None) -> list[float]:
    return host.score("Propose one change.", CANDIDATES, deadline_s=DEADLINE_S, adapter=adapter).log_probs


def test_it_scores_as_the_scorer_does(host, tiny_model):
    loaded = load_base(BaseModel("folder", str(tiny_model)), cache_dir=tiny_model, device=torch.device("cpu"))
    encoder = ChatEncoder(loaded.tokenizer)
    prompt = encoder.prompt([{"role": "user", "content": "Propose one change."}])
    here = MenuScorer(loaded.model).score(prompt, encoder.candidates(CANDIDATES)).log_probs
    assert scores(host) == pytest.approx(here, abs=1e-4)


def test_an_adapter_changes_the_scores(host, adapter):
    assert scores(host, adapter) != pytest.approx(scores(host), abs=0.01)


def test_the_base_model_is_itself_again_after_an_adapter(host, adapter):
    before = scores(host)
    scores(host, adapter)
    assert scores(host) == pytest.approx(before, abs=1e-4)


def test_a_pickled_adapter_is_refused(host, adapter, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CampaignError, match=r"no `adapter_model\.safetensors`"):
        scores(host, tmp_path)


def test_the_same_seed_writes_the_same_reply(host):
    how = {"temperature": 1.0, "max_new_tokens": 12, "seed": 5, "deadline_s": DEADLINE_S}
    first, second = (host.generate([{"role": "user", "content": "Say something."}], **how) for _ in range(2))
    assert first.text == second.text


def test_a_reply_is_no_longer_than_asked_for(host):
    messages = [{"role": "user", "content": "Say something."}]
    found = host.generate(messages, temperature=0.0, max_new_tokens=3, seed=0, deadline_s=DEADLINE_S)
    assert 1 <= found.completion_tokens <= 3


def test_a_reply_ends_where_the_template_ends_a_turn(tiny_model, tmp_path):
    """Also where the model's own settings name no such token: students are taught the template's."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    loaded = load_base(BaseModel("folder", str(folder)), cache_dir=tmp_path, device=torch.device("cpu"))
    (end,) = ChatEncoder(loaded.tokenizer).ending()
    loaded.model.lm_head.register_forward_hook(lambda _layer, _in, out: out.index_fill(-1, torch.tensor([end]), 1e4))
    messages = [{"role": "user", "content": "Say something."}]
    _, _, tokens = Resident(loaded).generate(messages, None, temperature=0.0, max_new_tokens=9, seed=0)
    assert tokens == 1


def test_it_says_what_memory_it_holds(host, tiny_model):
    host.load()
    assert host.held_bytes() >= (tiny_model / "model.safetensors").stat().st_size * 0.9


def test_released_it_holds_nothing_and_answers_again(host):
    before = scores(host)
    host.release()
    assert host.held_bytes() == 0
    assert scores(host) == pytest.approx(before, abs=1e-4)


def test_past_its_deadline_it_is_killed_and_the_next_question_finds_a_fresh_one(host):
    host.load()
    old = host.pid
    with pytest.raises(ProposerError, match="deadline_s") as raised:
        host.score("x " * 400, CANDIDATES, deadline_s=1e-4)
    assert raised.value.failure == "llm_timeout"
    assert not psutil.pid_exists(old)
    assert len(scores(host)) == len(CANDIDATES)


def test_a_host_that_was_killed_is_an_error_once(host):
    host.load()
    (process,) = psutil.Process(host.pid).children()
    process.kill()
    with pytest.raises(ProposerError, match="killed by SIGKILL") as raised:
        scores(host)
    assert raised.value.failure == "llm_error"
    assert len(scores(host)) == len(CANDIDATES)


def test_what_idle_raises_ends_the_process_and_is_passed_on(tiny_model, tmp_path):
    def lapsed() -> None:
        raise LookupError("the lease is gone")

    host = ModelHost(BaseModel("folder", str(tiny_model)), tmp_path, device="cpu", idle=lapsed)
    with pytest.raises(LookupError, match="lease"):
        host.load()
    assert host.pid is None


def test_memory_that_runs_out_is_told_apart():
    class OutOfMemoryError(RuntimeError):
        """Torch's own has this name."""

    assert _error(1, OutOfMemoryError("CUDA out of memory")).error == "MemoryError"


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"kind":"scored","call":1}', b'{"kind":"memory","call":"1","held_bytes":0}']
)
def test_what_is_not_in_the_protocol_is_refused(body):
    with pytest.raises(WireError):
        unpack(body)


def test_a_score_that_is_not_a_number_is_refused():
    body = b'{"kind":"scored","call":1,"log_probs":[NaN],"prompt_tokens":1,"reused_tokens":0,"tree_tokens":1}'
    with pytest.raises(WireError):
        unpack(body)


def test_the_control_process_loads_no_torch():
    code = "import sys, overnight.distill.host, overnight.agent.proposers.student; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_closing_ends_the_process(host):
    host.load()
    pid = host.pid
    host.close()
    assert not psutil.pid_exists(pid)
