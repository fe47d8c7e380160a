"""A real vLLM loads adapters of the bundled model while it runs: the contract that `LoraServer` imitates.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve FOLDER --enable-lora --max-lora-rank 16 ...
    OVERNIGHT_TEST_VLLM=http://127.0.0.1:8011/v1 pytest -m server -s tests/agent_tests/test_served_vllm.py

FOLDER holds the bundled model as safetensors; server and test see the same disk.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.protocol import Answer, reply_text
from overnight.agent.proposers.testing import example_ask
from overnight.distill.adapter import AdapterFacts
from overnight.distill.base import find_base
from overnight.distill.host import ModelHost
from overnight.distill.recipe import LoraRecipe
from overnight.distill.rows import Reply, TrainingRow
from overnight.store.errors import ProposerError

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]
TAUGHT = {1: reply_text("warmup", 17, "version one says so"), 2: reply_text("n_head", 8, "version two knows better")}


@pytest.fixture(scope="module")
def url() -> str:
    found = os.environ.get("OVERNIGHT_TEST_VLLM")
    if not found:
        pytest.skip("set OVERNIGHT_TEST_VLLM to the URL of a vLLM that serves the bundled model with LoRA updating")
    return found


def train(host: ModelHost, folder: Path, text: str, *, r: int = 16, epochs: int = 40) -> Path:
    """Teach an adapter to answer the example prompt with `text`."""
    facts = AdapterFacts(campaign=folder.parent.name, version=folder.name, objective="clone", corpus_sha256="", cut=1)
    recipe = LoraRecipe(r=r, alpha=2 * r, dropout=0.0, epochs=epochs, learning_rate=1e-3, batch=1)
    row = TrainingRow(id="only", prompt=example_ask().prompt, replies=(Reply(text),))
    done = host.train([row], recipe=recipe, facts=facts, folder=folder)
    print(f"trained {folder.name}: {done.steps} steps, loss {done.losses[0]:.2f} to {done.losses[-1]:.4f}")
    return folder


@pytest.fixture(scope="module")
def versions(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """Adapters of the bundled model: two that were taught different answers, and one of a higher rank."""
    home = tmp_path_factory.mktemp("home")
    host = ModelHost(find_base("smollm2-135m", home), home / "cache", device="cpu")
    campaign = home / "adapters" / f"vllm-test-{os.getpid()}"
    try:
        made = {version: train(host, campaign / f"v{version}", text) for version, text in TAUGHT.items()}
        made[3] = train(host, campaign / "v3", TAUGHT[1], r=32, epochs=1)
        yield made
    finally:
        host.close()


def plain(url: str, **settings: object) -> OpenAIProposer:
    fixed = {"deadline_s": 600.0, "temperature": 0.0, "structured": "none", "max_tokens": 60, "adapter": "promoted"}
    return OpenAIProposer("vllm", OpenAIProposer.Settings.parse("vllm", {"base_url": url, **fixed, **settings}))


def asked(proposer: OpenAIProposer) -> Answer:
    started = time.monotonic()
    answer = proposer.propose(example_ask())
    whole = time.monotonic() - started
    print(f"{answer.settings['model']}: answer {answer.latency_s:.2f} s, whole {whole:.2f} s: {answer.reply}")
    return answer


def folders_at(url: str, campaign: str) -> list[str]:
    """Return where the server has the adapters of a campaign from."""
    with urllib.request.urlopen(f"{url}/models", timeout=60) as response:
        listed: list[dict[str, Any]] = json.load(response)["data"]
    return [model["root"] for model in listed if model["id"].startswith(f"{campaign}-v")]


def test_versions_are_loaded_answer_and_go(url: str, versions: dict[int, Path]) -> None:
    base = plain(url)
    first, second = (base.with_adapter(f"v{version}", versions[version]) for version in (1, 2))
    unadapted = asked(base)
    assert unadapted.reply not in TAUGHT.values()
    assert asked(first).reply == TAUGHT[1]
    assert folders_at(url, versions[1].parent.name) == [str(versions[1])]
    assert asked(second).reply == TAUGHT[2]
    assert folders_at(url, versions[1].parent.name) == [str(versions[2])]
    assert asked(base).reply == unadapted.reply
    assert asked(second).reply == TAUGHT[2]


def test_an_adapter_answers_in_the_schema_too(url: str, versions: dict[int, Path]) -> None:
    served = plain(url, structured="json_schema", max_tokens=200).with_adapter("v1", versions[1])
    said = json.loads(asked(served).reply)
    assert (said["knob"], said["new_value"]) == ("warmup", 17)


def test_a_rank_above_the_servers_is_refused_with_the_remedy(url: str, versions: dict[int, Path]) -> None:
    with pytest.raises(ProposerError, match=r"rank 32.*--max-lora-rank 32") as caught:
        plain(url).with_adapter("v3", versions[3]).propose(example_ask())
    print(caught.value)


def test_a_folder_that_the_server_does_not_see_is_refused_with_the_remedy(url: str, versions: dict[int, Path]) -> None:
    hidden = plain(url, adapter_root="/not/there").with_adapter("v3", versions[3])
    with pytest.raises(ProposerError, match="adapter_root") as caught:
        hidden.propose(example_ask())
    print(caught.value)
