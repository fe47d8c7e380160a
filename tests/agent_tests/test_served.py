"""A vLLM loads a campaign's adapter while it runs: what is asked of it, in which order, and what it refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.protocol import ProposerContext
from overnight.agent.proposers.testing import example_ask, example_menu
from overnight.distill.adapter import WEIGHTS, read_record
from overnight.store.errors import CampaignError, ProposerError

from .adapters import make_adapter
from .servers import LoopbackServer, LoraServer, wait_until

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def vllm() -> LoraServer:
    return LoraServer()


@pytest.fixture
def server(vllm: LoraServer) -> Iterator[LoopbackServer]:
    with LoopbackServer(vllm) as server:
        yield server


def plain(server: LoopbackServer, name: str = "vllm", **settings: object) -> OpenAIProposer:
    table = {"base_url": server.url, "deadline_s": 10.0, "structured": "none", "adapter": "promoted", **settings}
    return OpenAIProposer(name, OpenAIProposer.Settings.parse(name, table))


def name_of(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}-{read_record(folder).sha256[:8]}"


def test_without_an_adapter_the_base_model_answers(server: LoopbackServer, vllm: LoraServer) -> None:
    answer = plain(server).propose(example_ask())
    assert vllm.did == ["ask base"]
    assert answer.settings["model"] == "base"


def test_it_is_loaded_at_the_first_question_and_answers_under_its_versioned_name(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path, "night", 3)
    served = plain(server).with_adapter("v3", folder)
    answer = served.propose(example_ask())
    served.propose(example_ask())
    name = name_of(folder)
    assert name.startswith("night-v3-")
    assert vllm.did == [f"load {name}", f"ask {name}", f"ask {name}"]
    assert vllm.adapters == {name: str(folder)}
    assert (answer.settings["model"], answer.settings["base_model"]) == (name, "base")


def test_the_old_one_is_unloaded_after_the_new_one_answered(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    base = plain(server)
    old, new = (make_adapter(tmp_path, "night", version) for version in (3, 10))
    base.with_adapter("v3", old).propose(example_ask())
    vllm.did.clear()
    base.with_adapter("v10", new).propose(example_ask())
    assert vllm.did == [f"load {name_of(new)}", f"ask {name_of(new)}", f"unload {name_of(old)}"]
    assert list(vllm.adapters) == [name_of(new)]


def test_the_old_one_stays_where_the_new_one_does_not_answer(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    base = plain(server)
    old, new = (make_adapter(tmp_path, "night", version) for version in (3, 4))
    base.with_adapter("v3", old).propose(example_ask())
    vllm.refuses["v4"] = 500, "out of memory"
    with pytest.raises(ProposerError, match="out of memory"):
        base.with_adapter("v4", new).propose(example_ask())
    assert list(vllm.adapters) == [name_of(old)]


def test_what_an_earlier_process_loaded_is_used_and_cleared_away(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    old, new = (make_adapter(tmp_path, "night", version) for version in (3, 4))
    vllm.adapters = {name_of(old): str(old), name_of(new): str(new)}
    plain(server).with_adapter("v4", new).propose(example_ask())
    assert vllm.did == [f"ask {name_of(new)}", f"unload {name_of(old)}"]


def test_adapters_of_others_are_left_alone(server: LoopbackServer, vllm: LoraServer, tmp_path: Path) -> None:
    here, elsewhere = make_adapter(tmp_path / "a", "night", 3), make_adapter(tmp_path / "b", "night", 2)
    campaign = make_adapter(tmp_path / "a", "day", 1)
    others = {name_of(elsewhere): str(elsewhere), name_of(campaign): str(campaign), "night-v2": str(here.parent / "v2")}
    vllm.adapters = dict(others)
    plain(server).with_adapter("v3", here).propose(example_ask())
    assert vllm.adapters == {**others, name_of(here): str(here)}


def test_what_another_proposer_answers_with_stays_loaded(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    context = ProposerContext(campaign_dir=tmp_path, cache_dir=tmp_path, menu=example_menu())
    table = {"base_url": server.url, "structured": "none", "adapter": "promoted"}
    one, other = (OpenAIProposer.from_settings(name, table, context) for name in ("one", "other"))
    old, new = (make_adapter(tmp_path, "night", version) for version in (3, 4))
    one.with_adapter("v3", old).propose(example_ask())
    other.with_adapter("v4", new).propose(example_ask())
    assert set(vllm.adapters) == {name_of(old), name_of(new)}


def test_a_server_that_was_restarted_loads_it_again(server: LoopbackServer, vllm: LoraServer, tmp_path: Path) -> None:
    served = plain(server).with_adapter("v3", make_adapter(tmp_path, "night", 3))
    served.propose(example_ask())
    vllm.adapters.clear()
    assert served.propose(example_ask()).reply == "hello"


def test_other_weights_of_the_same_version_have_another_name(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    first, second = (make_adapter(tmp_path / home, "night", 3, weights=home) for home in ("a", "b"))
    plain(server).with_adapter("v3", first).propose(example_ask())
    plain(server).with_adapter("v3", second).propose(example_ask())
    assert vllm.did[-1] == f"ask {name_of(second)}" != f"ask {name_of(first)}"


def test_adapter_root_is_where_the_server_sees_the_folder(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    folders = [make_adapter(tmp_path, "night", version) for version in (3, 4)]
    base = plain(server, adapter_root="/adapters/")
    for folder in folders:
        base.with_adapter(folder.name, folder).propose(example_ask())
    assert vllm.adapters == {name_of(folders[1]): "/adapters/night/v4"}


@pytest.mark.parametrize(
    ("status", "text"),
    [(500, "LoRA rank 32 is greater than max_lora_rank 16."), (500, "LoRA is not enabled."), (404, "No adapter found")],
)
def test_a_refusal_says_how_the_server_must_be_started(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path, status: int, text: str
) -> None:
    vllm.refuses[""] = status, text
    folder = make_adapter(tmp_path, "night", 3, r=32)
    started = time.monotonic()
    with pytest.raises(ProposerError) as caught:
        plain(server).with_adapter("v3", folder).propose(example_ask())
    assert time.monotonic() - started < 5.0  # a refusal is not tried again until the deadline
    assert caught.value.failure == "llm_error"
    for part in (
        text,
        str(folder),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "--enable-lora",
        "--max-lora-rank 32",
        "adapter_root",
    ):
        assert part in str(caught.value)


def test_a_server_without_the_two_requests_is_told_from_its_answer(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    vllm.updating = False
    with pytest.raises(ProposerError, match=r"status 404.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        plain(server).with_adapter("v3", make_adapter(tmp_path, "night", 3)).propose(example_ask())


def test_loading_keeps_to_the_deadline_and_is_found_done_at_the_next_question(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    vllm.load_s = 1.0
    folder = make_adapter(tmp_path, "night", 3)
    served = plain(server, deadline_s=0.5).with_adapter("v3", folder)
    started = time.monotonic()
    with pytest.raises(ProposerError) as caught:
        served.propose(example_ask())
    assert (caught.value.failure, time.monotonic() - started < 1.5) == ("llm_timeout", True)
    wait_until(lambda: name_of(folder) in vllm.adapters, what="the load that went on")
    assert plain(server).with_adapter("v3", folder).propose(example_ask()).reply == "hello"


def test_failed_loads_open_the_endpoints_breaker(server: LoopbackServer, vllm: LoraServer, tmp_path: Path) -> None:
    vllm.refuses[""] = 500, "out of memory"
    base = plain(server)
    served = base.with_adapter("v3", make_adapter(tmp_path, "night", 3))
    for _ in range(3):
        with pytest.raises(ProposerError, match="out of memory"):
            served.propose(example_ask())
    asked = len(server.requests)
    with pytest.raises(ProposerError, match="failed 3 times in a row"):
        base.propose(example_ask())
    assert len(server.requests) == asked


def test_an_unload_that_fails_costs_no_answer_and_is_tried_again(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    old, new = (make_adapter(tmp_path, "night", version) for version in (3, 4))
    vllm.adapters[name_of(old)] = str(old)
    vllm.updating = False
    vllm.adapters[name_of(new)] = str(new)
    served = plain(server).with_adapter("v4", new)
    assert served.propose(example_ask()).reply == "hello"
    assert name_of(old) in vllm.adapters
    vllm.updating = True
    served.propose(example_ask())
    assert list(vllm.adapters) == [name_of(new)]


def test_changed_weights_are_not_handed_over(server: LoopbackServer, vllm: LoraServer, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, "night", 3)
    served = plain(server).with_adapter("v3", folder)
    (folder / WEIGHTS).write_text("something else")
    with pytest.raises(CampaignError, match="changed after it was written"):
        served.propose(example_ask())
    assert vllm.did == []


def test_a_base_model_that_the_server_does_not_have_is_no_base(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path
) -> None:
    served = plain(server, model="other").with_adapter("v3", make_adapter(tmp_path, "night", 3))
    with pytest.raises(CampaignError, match="lists no model `other` but `base`"):
        served.propose(example_ask())
    assert vllm.did == []


def test_adapters_are_not_counted_among_an_endpoints_models(server: LoopbackServer, vllm: LoraServer) -> None:
    vllm.adapters = {"somebodys": "/x", "elses": "/y"}
    assert plain(server).propose(example_ask()).settings["model"] == "base"


def test_the_key_goes_with_every_request_and_into_no_message(
    server: LoopbackServer, vllm: LoraServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_KEY", KEY)
    folders = [make_adapter(tmp_path, "night", version) for version in (3, 4)]
    base = plain(server, api_key_env="VLLM_KEY")
    for folder in folders:
        base.with_adapter(folder.name, folder).propose(example_ask())
    assert {wire.path for wire in server.requests} >= {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    assert {wire.headers.get("authorization") for wire in server.requests} == {f"Bearer {KEY}"}
    vllm.refuses[""] = 500, f"who is {KEY}?"
    with pytest.raises(ProposerError) as caught:
        base.with_adapter("v5", make_adapter(tmp_path, "night", 5)).propose(example_ask())
    assert KEY not in str(caught.value)
    assert "who is ***?" in str(caught.value)


def test_each_version_is_described_as_one_of_its_own(server: LoopbackServer, tmp_path: Path) -> None:
    base = plain(server)
    folders = [make_adapter(tmp_path, "night", version) for version in (3, 4)]
    described = [base.with_adapter(folder.name, folder).describe() for folder in folders]
    assert base.describe()["adapter"] is None
    assert [each["adapter"] for each in described] == [
        {"version": folder.name, "sha256": read_record(folder).sha256} for folder in folders
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "3"}, "adapter"),
        ({"adapter": "v0"}, "adapter"),
        ({"adapter": "/some/folder"}, "adapter"),
        ({"adapter": None, "adapter_root": "/adapters"}, "says nothing without `adapter`"),
        ({"adapter_root": "adapters"}, "adapter_root"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    server: LoopbackServer, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(CampaignError, match=message):
        plain(server, **settings)
