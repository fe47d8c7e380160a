"""The contract with real servers: `transformers serve` always, a real vLLM where one is running."""

import json
import os
import time
from dataclasses import replace

import jsonschema
import pytest

from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.protocol import Rejection
from overnight.agent.proposers.structured import moves_schema
from overnight.agent.proposers.testing import example_ask
from overnight.rails.menu import Change
from overnight.store.errors import ProposerError

from .servers import ChatServer


def proposer_for(url: str, **settings: object) -> OpenAIProposer:
    table = {"base_url": url, "deadline_s": 60.0, "max_tokens": 40, **settings}
    return OpenAIProposer("real", OpenAIProposer.Settings.parse("real", table))


class TestTransformersServe:
    def test_a_reply_comes_back_as_text(self, transformers_serve: ChatServer):
        assert proposer_for(transformers_serve.url).propose(example_ask()).reply

    def test_the_only_model_is_found(self, transformers_serve: ChatServer):
        answer = proposer_for(transformers_serve.url).propose(example_ask())
        assert answer.settings["model"] == transformers_serve.model

    def test_a_response_format_that_it_ignores_is_not_relied_on(self, transformers_serve: ChatServer):
        assert proposer_for(transformers_serve.url).prepare() == "none"

    def test_tokens_are_recorded(self, transformers_serve: ChatServer):
        usage = proposer_for(transformers_serve.url).propose(example_ask()).usage
        assert usage["prompt_tokens"] > 10
        assert 1 <= usage["completion_tokens"] <= 40

    def test_prose_of_a_random_model_is_no_json(self, transformers_serve: ChatServer):
        reply = proposer_for(transformers_serve.url).propose(example_ask()).reply
        with pytest.raises(ValueError, match=r"Expecting|Invalid|Extra|Unterminated"):
            json.loads(reply)

    def test_a_rejection_fits_its_chat_template(self, transformers_serve: ChatServer):
        rejected = (Rejection("Higher!", "R1_schema", "not a JSON object"),)
        assert proposer_for(transformers_serve.url).propose(example_ask(rejections=rejected)).reply

    def test_a_deadline_that_is_too_short_ends_as_a_timeout(self, transformers_serve: ChatServer):
        proposer = proposer_for(transformers_serve.url, deadline_s=0.2, max_tokens=4000, structured="none")
        started = time.monotonic()
        with pytest.raises(ProposerError) as caught:
            proposer.propose(example_ask())
        assert time.monotonic() - started < 1.2
        assert caught.value.failure == "llm_timeout"

    def test_a_model_that_it_does_not_have_is_an_error(self, transformers_serve: ChatServer):
        with pytest.raises(ProposerError) as caught:
            proposer_for(transformers_serve.url, model="nobody/nothing", deadline_s=20.0).propose(example_ask())
        assert caught.value.failure == "llm_error"


@pytest.fixture(scope="module")
def vllm_url() -> str:
    url = os.environ.get("OVERNIGHT_TEST_VLLM")
    if not url:
        pytest.skip("set OVERNIGHT_TEST_VLLM to the URL of a running vLLM, such as http://127.0.0.1:8011/v1")
    return url


@pytest.mark.server
@pytest.mark.timeout(900)
class TestVllm:
    def test_its_schema_enforcement_is_found(self, vllm_url: str):
        assert proposer_for(vllm_url, deadline_s=300.0).prepare() == "json_schema"

    @pytest.mark.parametrize("seed", range(5))
    def test_every_reply_is_one_of_the_legal_changes(self, vllm_url: str, seed: int):
        ask = example_ask(seed=seed)
        proposer = proposer_for(vllm_url, deadline_s=300.0, structured="json_schema", temperature=1.0, max_tokens=200)
        answer = proposer.propose(ask)
        print(f"{answer.latency_s:.2f} s {dict(answer.usage)} {answer.reply}")
        jsonschema.validate(json.loads(answer.reply), moves_schema(ask.menu, ask.baseline, ask.moves))

    def test_a_single_move_left_is_the_one_proposed(self, vllm_url: str):
        ask = example_ask(moves=(Change("precision", "bf16"),))
        proposer = proposer_for(vllm_url, deadline_s=300.0, structured="json_schema", max_tokens=200)
        said = json.loads(proposer.propose(ask).reply)
        assert (said["knob"], said["new_value"]) == ("precision", "bf16")

    def test_a_prompt_that_does_not_fit_is_an_error(self, vllm_url: str):
        ask = replace(example_ask(), prompt="word " * 9000)
        with pytest.raises(ProposerError, match="status 400") as caught:
            proposer_for(vllm_url, deadline_s=300.0).propose(ask)
        assert caught.value.failure == "llm_error"

    def test_an_unknown_model_is_an_error(self, vllm_url: str):
        with pytest.raises(ProposerError, match="status 404") as caught:
            proposer_for(vllm_url, model="nobody").propose(example_ask())
        assert caught.value.failure == "llm_error"

    def test_a_deadline_that_is_too_short_ends_as_a_timeout(self, vllm_url: str):
        started = time.monotonic()
        with pytest.raises(ProposerError) as caught:
            proposer_for(vllm_url, deadline_s=0.5, structured="none", max_tokens=400).propose(example_ask())
        assert time.monotonic() - started < 1.5
        assert caught.value.failure == "llm_timeout"
