"""What every test folder may use: a real `transformers serve` on a tiny model that is made on the spot."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the worker: tests that train share the cores

import numpy as np
import pytest

from .agent_tests.servers import ChatServer

START_DEADLINE_S = 120.0
TINY_MODEL = "tests/tiny-llama"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_configure() -> None:
    """Answer signals: a run that `nohup` or a background job started ignores them, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def write_tiny_model(folder: Path) -> None:
    """Write a 2-layer Llama with random weights and a byte-pair tokenizer trained on this file."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True)
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    special = ["<|end|>", *roles]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    width, inner, layers, vocabulary = 32, 64, 2, tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|end|>"),
        "pad_token_id": tokenizer.token_to_id("<|end|>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0.0, 0.3, (rows, columns)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(vocabulary, width),
        "model.norm.weight": np.ones(width, np.float32),
        "lm_head.weight": matrix(vocabulary, width),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}"
        weights |= {f"{name}.self_attn.{part}_proj.weight": matrix(width, width) for part in "qkvo"}
        weights |= {f"{name}.mlp.{part}_proj.weight": matrix(inner, width) for part in ("gate", "up")}
        weights[f"{name}.mlp.down_proj.weight"] = matrix(width, inner)
        weights |= {
            f"{name}.{norm}.weight": np.ones(width, np.float32)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session", autouse=True)
def users_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what tests allow out of the user's own permissions."""
    os.environ["OVERNIGHT_DATA"] = str(tmp_path_factory.mktemp("user-data"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    """A running `transformers serve` whose only model is the tiny one, found as a hub id in a cache of its own."""
    home = tmp_path_factory.mktemp("hf-home")
    revision = "0" * 40
    cached = home / "hub" / f"models--{TINY_MODEL.replace('/', '--')}"
    write_tiny_model(cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(sys.executable).with_name("transformers")
    command = [str(script), "serve", TINY_MODEL, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(home / "hub")}
    log = home / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            _wait_for_models(f"http://127.0.0.1:{port}/v1/models", server, log)
            yield ChatServer(f"http://127.0.0.1:{port}/v1", TINY_MODEL)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(10)


def _wait_for_models(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                assert [model["id"] for model in json.load(response)["data"]] == [TINY_MODEL]
                return
        except (urllib.error.URLError, ConnectionError):
            late = time.monotonic() > ends
            if late or server.poll() is not None:
                pytest.fail(f"`transformers serve` did not start; its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)  # nothing to wait on but the port itself
