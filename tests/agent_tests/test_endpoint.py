"""The contract with a well-behaved endpoint: what is sent, what is handed on, what is recorded."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from overnight.agent.proposers.chat import MAX_ERROR_CHARS
from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.protocol import Answer, ProposerContext, Rejection, reply_text
from overnight.agent.proposers.structured import PROBE_PROMPT
from overnight.agent.proposers.testing import ProposerConformance, example_ask, example_menu
from overnight.store.errors import CampaignError, ProposerError

from .adapters import make_adapter
from .servers import LoopbackServer, Wire

KEY = "sk-very-secret-0123456789"


def proposer_for(url: str = "http://127.0.0.1:1/v1", **settings: object) -> OpenAIProposer:
    table = {"base_url": url, "model": "m", "deadline_s": 10.0, "structured": "none", **settings}
    return OpenAIProposer("nim", OpenAIProposer.Settings.parse("nim", table))


async def greets(wire: Wire) -> None:
    if wire.path == "/v1/models":
        await wire.answer(200, {"data": [{"id": "meta/llama-3.1-8b-instruct"}]})
    else:
        await wire.say("hello")


def ask_once(**settings: object) -> tuple[Answer, dict[str, Any]]:
    """Return the answer of a friendly endpoint and the request that it saw."""
    with LoopbackServer(greets) as server:
        answer = proposer_for(server.url, **settings).propose(example_ask(seed=2**40 + 3))
        return answer, server.bodies[-1]


class TestOpenAIProposerConforms(ProposerConformance):
    always_legal = False
    deterministic = False

    @pytest.fixture(autouse=True)
    def _server(self):
        async def proposes(wire: Wire) -> None:
            await wire.say(reply_text("lr", 1e-3, "a guess"))

        with LoopbackServer(proposes) as self.server:
            yield

    def make(self) -> OpenAIProposer:
        return proposer_for(self.server.url)


def test_the_stored_prompt_is_sent_byte_for_byte():
    _, body = ask_once()
    assert body["messages"] == [{"role": "user", "content": example_ask().prompt}]


@pytest.mark.parametrize("reply", ['{"knob": "lr"}', "I would raise it.", " \n", "", "naïve \u2028 \x00 𝄞", "{" * 1000])
def test_the_reply_is_handed_on_unchanged(reply: str):
    async def says(wire: Wire) -> None:
        await wire.say(reply)

    with LoopbackServer(says) as server:
        assert proposer_for(server.url).propose(example_ask()).reply == reply


def test_a_model_that_says_nothing_is_an_empty_reply():
    async def says_nothing(wire: Wire) -> None:
        await wire.say(None)

    with LoopbackServer(says_nothing) as server:
        assert proposer_for(server.url).propose(example_ask()).reply == ""


def test_how_it_was_asked_is_recorded():
    answer, _ = ask_once(temperature=0.7, max_tokens=99)
    assert answer.settings == {
        "model": "m",
        "temperature": 0.7,
        "max_tokens": 99,
        "seed": 3,
        "structured": "none",
    }


def test_what_is_recorded_is_what_was_sent():
    answer, body = ask_once(temperature=0.7, max_tokens=99)
    assert {key: body[key] for key in ("model", "temperature", "max_tokens", "seed")} == {
        key: answer.settings[key] for key in ("model", "temperature", "max_tokens", "seed")
    }


def test_a_fixed_seed_is_sent():
    assert ask_once(seed=11)[1]["seed"] == 11


def test_tokens_are_recorded():
    assert ask_once()[0].usage == {"prompt_tokens": 11, "completion_tokens": 7}


def test_odd_token_counts_are_left_out():
    async def brags(wire: Wire) -> None:
        usage = {"prompt_tokens": -1, "completion_tokens": "many"}
        await wire.answer(200, {"choices": [{"message": {"content": "hi"}}], "usage": usage})

    with LoopbackServer(brags) as server:
        assert proposer_for(server.url).propose(example_ask()).usage == {}


def test_a_rejection_follows_the_prompt():
    ask = example_ask(rejections=(Rejection("Higher!", "R1_schema", "not a JSON object"),))
    with LoopbackServer(greets) as server:
        proposer_for(server.url).propose(ask)
        said = server.bodies[0]["messages"][1:]
    assert [message["role"] for message in said] == ["assistant", "user"]
    assert said[0]["content"] == "Higher!"
    assert said[1]["content"].startswith("Blocked by R1_schema: not a JSON object")


def test_a_long_rejected_reply_is_cut():
    ask = example_ask(rejections=(Rejection("x" * 60_000, "R1_schema", "y" * 60_000),))
    with LoopbackServer(greets) as server:
        proposer_for(server.url).propose(ask)
        assert len(json.dumps(server.bodies[0])) < 5_000


# -- the model's name


def test_the_model_defaults_to_the_only_one_there():
    with LoopbackServer(greets) as server:
        answer = proposer_for(server.url, model=None).propose(example_ask())
    assert answer.settings["model"] == "meta/llama-3.1-8b-instruct"


def test_the_only_model_is_looked_up_once():
    with LoopbackServer(greets) as server:
        proposer = proposer_for(server.url, model=None)
        for _ in range(3):
            proposer.propose(example_ask())
        assert [wire.path for wire in server.requests].count("/v1/models") == 1


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_without_a_name_and_without_just_one_model_the_key_is_asked_for(names: list[str]):
    async def lists(wire: Wire) -> None:
        await wire.answer(200, {"data": [{"id": name} for name in names]})

    with LoopbackServer(lists) as server, pytest.raises(CampaignError, match=rf"lists {len(names)} models.*`model`"):
        proposer_for(server.url, model=None).prepare()


# -- structured output


def enforcing(*modes: str, log: list[str]) -> Any:
    """Return an endpoint that enforces these modes and refuses the others."""

    async def handle(wire: Wire) -> None:
        asked = wire.body.get("response_format", {}).get("type") or ("nvext" if "nvext" in wire.body else "none")
        asked = {"json_object": "json"}.get(asked, asked)
        log.append(asked)
        if asked not in (*modes, "none"):
            await wire.answer(400, {"error": f"{asked} is not supported"})
        else:
            await wire.say("Hello there." if asked == "none" else '{"ready": true}')

    return handle


@pytest.mark.parametrize("mode", ["json_schema", "nvext", "json", "none"])
def test_the_strictest_mode_that_is_enforced_is_used(mode: str):
    with LoopbackServer(enforcing(mode, log=[])) as server:
        answer = proposer_for(server.url, structured="auto").propose(example_ask())
    assert answer.settings["structured"] == mode


def test_the_mode_is_probed_once():
    log: list[str] = []
    with LoopbackServer(enforcing("json", log=log)) as server:
        proposer = proposer_for(server.url, structured="auto")
        for _ in range(3):
            proposer.propose(example_ask())
    assert log == ["json_schema", "nvext", "json", "json", "json", "json"]


def test_a_mode_that_is_accepted_but_ignored_is_not_used():
    """An older server may take `response_format` and write prose all the same."""
    with LoopbackServer(greets) as server:
        assert proposer_for(server.url, structured="auto").propose(example_ask()).settings["structured"] == "none"


def test_a_server_that_falls_over_a_schema_is_asked_without():
    async def falls_over(wire: Wire) -> None:
        await (wire.answer(500, {}) if "response_format" in wire.body else wire.say("hello"))

    with LoopbackServer(falls_over) as server:
        assert proposer_for(server.url, structured="auto").propose(example_ask()).settings["structured"] == "none"


def refuses_the_menu(log: list[str]) -> Any:
    """Return an endpoint that passes the probe but cannot take the menu's schema."""

    async def handle(wire: Wire) -> None:
        fields = json.dumps(wire.body.get("response_format", ""))
        log.append(fields)
        await (wire.answer(422, {"error": "anyOf"}) if "anyOf" in fields else wire.say('{"ready": true}'))

    return handle


def test_a_schema_that_is_refused_later_moves_one_mode_down():
    with LoopbackServer(refuses_the_menu([])) as server:
        answer = proposer_for(server.url, structured="auto").propose(example_ask())
    assert answer.settings["structured"] == "nvext"


def test_moving_down_is_no_failure_of_the_endpoint():
    context = ProposerContext(campaign_dir=Path(), cache_dir=Path(), menu=example_menu())
    with LoopbackServer(refuses_the_menu([])) as server:
        table = {"base_url": server.url, "model": "m"}
        OpenAIProposer.from_settings("nim", table, context).propose(example_ask())
    assert context.breakers[server.url].failures == 0


def test_a_request_refused_in_every_mode_changes_no_mode():
    """A prompt that is too long once must not cost the schema for the rest of the night."""
    too_long = True

    async def handle(wire: Wire) -> None:
        probing = "ready" in json.dumps(wire.body)
        await (wire.answer(400, {"error": "too long"}) if too_long and not probing else wire.say('{"ready": true}'))

    with LoopbackServer(handle) as server:
        proposer = proposer_for(server.url, structured="auto")
        with pytest.raises(ProposerError, match="too long"):
            proposer.propose(example_ask())
        too_long = False
        assert proposer.propose(example_ask()).settings["structured"] == "json_schema"


def test_a_probe_that_the_deadline_cuts_off_goes_on_where_it_was():
    log: list[str] = []

    async def hangs_once(wire: Wire) -> None:
        if "nvext" in wire.body and log.count("nvext") == 0:
            log.append("nvext")
            await wire.until_closed()
        else:
            await enforcing("nvext", log=log)(wire)

    with LoopbackServer(hangs_once) as server:
        proposer = proposer_for(server.url, structured="auto", deadline_s=1.0)
        with pytest.raises(ProposerError) as caught:
            proposer.propose(example_ask())
        assert caught.value.failure == "llm_timeout"
        assert proposer.propose(example_ask()).settings["structured"] == "nvext"
    assert log == ["json_schema", "nvext", "nvext", "nvext"]


def test_a_mode_that_was_ignored_is_not_tried_again_when_the_answer_fails():
    modes: list[str] = []

    async def ignores_and_fails(wire: Wire) -> None:
        probing = PROBE_PROMPT in json.dumps(wire.body)
        modes.append("probe" if probing else "answer")
        await (wire.say("hello") if probing else wire.answer(401, {"error": "no"}))

    with LoopbackServer(ignores_and_fails) as server:
        proposer = proposer_for(server.url, structured="auto")
        for _ in range(2):
            with pytest.raises(ProposerError, match="status 401"):
                proposer.propose(example_ask())
    assert modes == ["probe", "probe", "probe", "answer", "answer"]


def test_the_probe_takes_nothing_of_the_answers_deadline():
    async def takes_most_of_a_deadline(wire: Wire) -> None:
        await asyncio.sleep(1.0)
        await wire.say('{"ready": true}')

    with LoopbackServer(takes_most_of_a_deadline) as server:
        answer = proposer_for(server.url, structured="auto", deadline_s=1.8).propose(example_ask())
    assert answer.settings["structured"] == "json_schema"


@pytest.mark.parametrize("status", [400, 500])
def test_an_endpoint_that_refused_everything_is_probed_again(status: int):
    """It was not the modes that it refused: a server that is still loading must not cost the schema for the night."""
    loading = True

    async def loads(wire: Wire) -> None:
        await (wire.answer(status, {"error": "loading"}) if loading else wire.say('{"ready": true}'))

    with LoopbackServer(loads) as server:
        proposer = proposer_for(server.url, structured="auto", deadline_s=1.0)
        with pytest.raises(ProposerError, match=f"status {status}"):
            proposer.propose(example_ask())
        loading = False
        assert proposer.propose(example_ask()).settings["structured"] == "json_schema"


def test_a_mode_that_was_asked_for_by_name_is_kept():
    with LoopbackServer(refuses_the_menu([])) as server, pytest.raises(ProposerError, match="status 422"):
        proposer_for(server.url, structured="json_schema").propose(example_ask())


def test_the_schema_of_the_legal_changes_is_sent():
    _, body = ask_once(structured="json_schema")
    knobs = body["response_format"]["json_schema"]["schema"]["anyOf"]
    assert [knob["properties"]["knob"]["enum"] for knob in knobs] == [[knob.name] for knob in example_menu().knobs]


# -- the key


@pytest.fixture
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_NIM_KEY", KEY)


@pytest.mark.usefixtures("_key")
def test_the_key_comes_from_the_named_variable():
    with LoopbackServer(greets) as server:
        proposer_for(server.url, api_key_env="TEST_NIM_KEY").propose(example_ask())
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_variable_that_is_not_set_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TEST_NIM_KEY", raising=False)
    with pytest.raises(CampaignError, match=r"`\[proposers.nim\]` key `api_key_env`.*`TEST_NIM_KEY` is not set"):
        proposer_for("http://127.0.0.1:1/v1", api_key_env="TEST_NIM_KEY")


@pytest.mark.usefixtures("_key")
def test_the_key_is_not_described():
    assert KEY not in json.dumps(dict(proposer_for("http://127.0.0.1:1/v1", api_key_env="TEST_NIM_KEY").describe()))


async def echoes_the_key(wire: Wire) -> None:
    await wire.answer(401, {"error": f"bad header: {wire.headers['authorization']}"})


@pytest.mark.usefixtures("_key")
def test_a_key_that_the_server_sends_back_is_not_in_the_error():
    with LoopbackServer(echoes_the_key) as server, pytest.raises(ProposerError) as caught:
        proposer_for(server.url, api_key_env="TEST_NIM_KEY").propose(example_ask())
    assert KEY not in str(caught.value)
    assert "Bearer ***" in str(caught.value)


@pytest.mark.usefixtures("_key")
def test_a_key_that_the_server_sends_back_is_not_in_the_chained_errors():
    with LoopbackServer(echoes_the_key) as server, pytest.raises(ProposerError) as caught:
        proposer_for(server.url, api_key_env="TEST_NIM_KEY").propose(example_ask())
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.usefixtures("_key")
def test_a_key_that_the_model_says_does_not_reach_the_reply():
    async def says_the_key(wire: Wire) -> None:
        await wire.say(f"Your key is {wire.headers['authorization']}")

    with LoopbackServer(says_the_key) as server:
        reply = proposer_for(server.url, api_key_env="TEST_NIM_KEY").propose(example_ask()).reply
    assert reply == "Your key is Bearer ***"


def shows_part_of_the_key(text: str) -> bool:
    return any(KEY[start : start + 8] in text for start in range(len(KEY) - 7))


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize("kept", range(8, len(KEY), 4))
@pytest.mark.parametrize(
    ("status", "limit"),
    [(200, MAX_ERROR_CHARS), (401, MAX_ERROR_CHARS), (302, 100)],
    ids=["reply", "error", "redirect"],
)
def test_a_key_at_the_cut_of_what_the_server_says_is_not_shown_in_part(status: int, limit: int, kept: int):
    async def fills_up_to_the_key(wire: Wire) -> None:
        said = "x" * (limit - 1 - kept) + KEY + "y" * 100
        await wire.answer(status, said.encode(), {"Location": said})

    with LoopbackServer(fills_up_to_the_key) as server, pytest.raises(ProposerError) as caught:
        proposer_for(server.url, api_key_env="TEST_NIM_KEY").propose(example_ask())
    assert not shows_part_of_the_key(str(caught.value))


def serving(*ids: str) -> Any:
    """Return an endpoint that lists models of these names."""

    async def lists(wire: Wire) -> None:
        if wire.path.endswith("/models"):
            await wire.answer(200, {"data": [{"id": name} for name in ids]})
        else:
            await wire.say("hello")

    return lists


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize("odd", [KEY, "x" * 70 + KEY, "a\x1b[31mb", "a\nb"], ids=["key", "cut", "colour", "line"])
def test_a_list_of_models_shows_neither_the_key_nor_control_characters(odd: str):
    with (
        LoopbackServer(serving(odd, "other")) as server,
        pytest.raises(CampaignError, match="lists 2 models") as caught,
    ):
        proposer_for(server.url, api_key_env="TEST_NIM_KEY", model=None).propose(example_ask())
    assert not shows_part_of_the_key(str(caught.value))
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("_key")
def test_a_base_model_that_is_not_there_shows_neither_the_key_nor_control_characters(tmp_path: Path):
    with LoopbackServer(serving("x" * 70 + KEY, "a\x1b[31mb")) as server:
        proposer = proposer_for(server.url, api_key_env="TEST_NIM_KEY", adapter="v3")
        with pytest.raises(CampaignError, match="lists no model `m`") as caught:
            proposer.with_adapter("v3", make_adapter(tmp_path, "night", 3)).propose(example_ask())
    assert not shows_part_of_the_key(str(caught.value))
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize(("listed", "recorded"), [(f"m-{KEY}", "m-***"), ("m\x1b[31m", "m [31m")])
def test_the_name_of_the_only_model_is_recorded_without_key_and_control_characters(listed: str, recorded: str):
    with LoopbackServer(serving(listed)) as server:
        answer = proposer_for(server.url, api_key_env="TEST_NIM_KEY", model=None).propose(example_ask())
    assert answer.settings["model"] == recorded


def test_a_name_as_long_as_a_path_is_kept():
    name = "/models/" + "a" * 2000
    with LoopbackServer(serving(name)) as server:
        assert proposer_for(server.url, model=None).propose(example_ask()).settings["model"] == name


@pytest.mark.usefixtures("_key")
def test_the_key_is_not_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("DEBUG"), LoopbackServer(echoes_the_key) as server, pytest.raises(ProposerError):
        proposer_for(server.url, api_key_env="TEST_NIM_KEY").propose(example_ask())
    assert KEY not in caplog.text


def test_keys_meant_for_openai_stay_at_home(monkeypatch: pytest.MonkeyPatch):
    for variable in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(variable, KEY)
    with LoopbackServer(greets) as server:
        proposer_for(server.url).propose(example_ask())
        assert KEY not in json.dumps(server.requests[0].headers)


def test_a_local_endpoint_is_reached_past_a_proxy(monkeypatch: pytest.MonkeyPatch):
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with LoopbackServer(greets) as server:
        assert proposer_for(server.url).propose(example_ask()).reply == "hello"


# -- the table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000"}, r"key `base_url`.*http://localhost:8000/v1"),
        ({"base_url": "http://me:pass@host/v1"}, r"key `base_url`.*`api_key_env`"),
        ({"base_url": "http://host/v1?api-key=x"}, r"key `base_url`.*refused"),
        ({"temperature": 3.0}, r"key `temperature`.*less than or equal to 2"),
        ({"deadline_s": 0}, r"key `deadline_s`.*greater than 0"),
        ({"api_key": "sk-1"}, r"key `api_key`.*the keys are: kind, base_url"),
    ],
)
def test_a_table_that_makes_no_sense_is_a_campaign_error(changes: dict[str, object], message: str):
    with pytest.raises(CampaignError, match=message):
        proposer_for(**changes)


def test_a_password_in_the_url_is_not_repeated():
    with pytest.raises(CampaignError) as caught:
        OpenAIProposer.Settings.parse("nim", {"base_url": "http://me:hunter2@host/v1"})
    assert "hunter2" not in str(caught.value)


def test_proposers_of_one_endpoint_share_a_failure_counter():
    context = ProposerContext(campaign_dir=Path(), cache_dir=Path(), menu=example_menu())
    for name, slash in (("cold", ""), ("warm", "/")):
        OpenAIProposer.from_settings(name, {"base_url": f"http://127.0.0.1:1/v1{slash}"}, context)
    assert list(context.breakers) == ["http://127.0.0.1:1/v1"]


def test_importing_it_imports_no_http_client():
    code = (
        "import sys, overnight.agent.proposers.endpoint as _; sys.exit(bool({'openai', 'httpx2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0
