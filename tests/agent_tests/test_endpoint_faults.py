"""Every way a network can fail ends inside the deadline plus a second, with its class, and leaves nothing behind."""

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overnight.agent.proposers import chat
from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.protocol import ProposerContext
from overnight.agent.proposers.testing import example_ask
from overnight.store.errors import LeaseLostError, ProposerError

from .servers import Handler, LoopbackServer, Wire, unused_port, wait_until

DEADLINE_S = 1.0


def proposer_for(url: str, *, deadline_s: float = DEADLINE_S, **settings: object) -> OpenAIProposer:
    table = {"base_url": url, "model": "m", "deadline_s": deadline_s, "structured": "none", **settings}
    return OpenAIProposer("nim", OpenAIProposer.Settings.parse("nim", table))


def endpoint_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("overnight-")]


@contextmanager
def ends_in_time(deadline_s: float = DEADLINE_S) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < deadline_s + 1.0


async def resets_mid_body(wire: Wire) -> None:
    await wire.start_body(1000)
    await wire.send(b'{"choices": [')
    wire.reset()


async def fails_always(wire: Wire) -> None:
    await wire.answer(500, {"error": {"message": "out of cheese"}})


async def asks_for_a_long_wait(wire: Wire) -> None:
    await wire.answer(429, {"error": "busy"}, {"Retry-After": "3600"})


async def never_ends(wire: Wire) -> None:
    await wire.start_body()
    while True:
        await wire.send(b" ")
        await asyncio.sleep(0.02)


async def sends_100_megabytes(wire: Wire) -> None:
    await wire.start_body(100 << 20)
    for _ in range(100):
        await wire.send(b" " * (1 << 20))


async def fails_with_100_megabytes(wire: Wire) -> None:
    await wire.send(b"HTTP/1.1 500 Oops\r\nContent-Length: 104857600\r\n\r\n")
    for _ in range(100):
        await wire.send(b" " * (1 << 20))


async def sends_the_wrong_shape(wire: Wire) -> None:
    await wire.answer(200, {"answer": ["yes", "no"]})


async def sends_no_choices(wire: Wire) -> None:
    await wire.answer(200, {"choices": []})


async def sends_broken_json(wire: Wire) -> None:
    await wire.answer(200, b'{"choices": [{"message"')


async def sends_deeply_nested_json(wire: Wire) -> None:
    await wire.answer(200, b"[" * 100_000)


async def trickles_headers(wire: Wire) -> None:
    await wire.send(b"HTTP/1.1 200 OK\r\n")
    for number in range(10_000):
        await wire.send(f"X-{number}: y\r\n".encode())
        await asyncio.sleep(0.02)


async def sends_endless_headers(wire: Wire) -> None:
    await wire.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await wire.send(b"X-Filler: " + b"y" * 8000 + b"\r\n")


async def fails_once_and_hangs(wire: Wire) -> None:
    if wire.number == 0:
        await fails_always(wire)
    else:
        await wire.until_closed()


async def never_answers(wire: Wire) -> None:
    await wire.until_closed()


async def hangs_up(wire: Wire) -> None:
    wire.writer.close()


async def sends_a_zip_bomb(wire: Wire) -> None:
    await wire.answer(200, b"\x1f\x8b" + bytes(100), {"Content-Encoding": "gzip"})


async def says_no(wire: Wire) -> None:
    await wire.answer(401, {"error": "who are you?"})


@pytest.mark.parametrize(
    ("handler", "failure", "message"),
    [
        (resets_mid_body, "llm_error", "Reset|reset|RemoteProtocolError|peer closed"),
        (fails_always, "llm_error", "status 500: .*out of cheese"),
        (fails_once_and_hangs, "llm_error", "no answer within 1 s; before that: status 500"),
        (asks_for_a_long_wait, "llm_error", "status 429.*asks to wait 3600 s"),
        (never_ends, "llm_timeout", "no answer within 1 s"),
        (sends_100_megabytes, "llm_error", "more than 1,048,576 bytes"),
        (fails_with_100_megabytes, "llm_error", "more than 1,048,576 bytes"),
        (sends_the_wrong_shape, "llm_error", "not of the OpenAI form .choices"),
        (sends_no_choices, "llm_error", "not of the OpenAI form .choices"),
        (sends_broken_json, "llm_error", "not of the OpenAI form"),
        (sends_deeply_nested_json, "llm_error", "not of the OpenAI form"),
        (trickles_headers, "llm_timeout", "no answer within 1 s"),
        (never_answers, "llm_timeout", "no answer within 1 s"),
        (hangs_up, "llm_error", "disconnected"),
        (sends_a_zip_bomb, "llm_error", "compressed reply"),
        (says_no, "llm_error", "status 401.*`api_key_env`"),
    ],
)
def test_a_fault_ends_in_time_with_its_class_and_lets_go(handler: Handler, failure: str, message: str):
    with LoopbackServer(handler) as server:
        with ends_in_time(), pytest.raises(ProposerError, match=message) as caught:
            proposer_for(server.url).propose(example_ask())
        assert caught.value.failure == failure
        wait_until(lambda: server.open_connections == 0, what="closing of the connection")
        assert endpoint_threads() == []


@pytest.mark.parametrize(
    ("status", "header"),
    [
        (429, {"Retry-After": "Mon, 01 Jan 99999999999999 00:00:00 GMT"}),
        (429, {"Retry-After": "Mon, 01 Jan 2024 00:00:00 +99999999999999"}),
        (429, {"Retry-After": "Mon, 01 Jan 0001 00:00:00 -0000"}),
        (429, {"Retry-After": "9" * 400}),
        (500, {"Content-Type": "text/html; charset=undefined"}),
        (400, {"Content-Type": "text/html; charset=zlib"}),
        (400, {"Content-Type": "text/html; charset=rot13"}),
        (302, {"Location": "http://[::bad/"}),
    ],
)
def test_a_header_that_makes_no_sense_changes_nothing_about_its_status(status: int, header: dict[str, str]):
    async def misleads(wire: Wire) -> None:
        await wire.answer(status, b"out of cheese", header)

    with LoopbackServer(misleads) as server, ends_in_time(), pytest.raises(ProposerError) as caught:
        proposer_for(server.url).propose(example_ask())
    assert caught.value.failure == "llm_error"
    assert f"status {status}: " in str(caught.value)


def test_an_error_page_is_read_as_utf_8_whatever_is_said_of_it():
    async def says_it_in_german(wire: Wire) -> None:
        await wire.answer(400, "Käse ist aus".encode() + b"\xff", {"Content-Type": "text/plain; charset=utf-16"})

    with LoopbackServer(says_it_in_german) as server, pytest.raises(ProposerError, match="status 400: Käse ist aus"):
        proposer_for(server.url).propose(example_ask())


def test_what_the_client_library_stumbles_over_is_a_failure_of_the_endpoint(monkeypatch: pytest.MonkeyPatch):
    """A key that no header can carry is one such thing."""
    monkeypatch.setenv("TEST_NIM_KEY", "sk-schlüssel-0123456789")
    with LoopbackServer(never_answers) as server, pytest.raises(ProposerError, match="UnicodeEncodeError") as caught:
        proposer_for(server.url, api_key_env="TEST_NIM_KEY").propose(example_ask())
    assert caught.value.failure == "llm_error"


def test_headers_without_end_are_refused_or_run_into_the_deadline():
    """Which comes first depends on how busy the machine is."""
    with LoopbackServer(sends_endless_headers) as server:
        with ends_in_time(), pytest.raises(ProposerError, match=r"(?i)header|too|large|protocol|no answer") as caught:
            proposer_for(server.url).propose(example_ask())
        assert caught.value.failure in ("llm_error", "llm_timeout")
        wait_until(lambda: server.open_connections == 0, what="closing of the connection")


def test_nobody_listening_is_an_error_in_time():
    with ends_in_time(), pytest.raises(ProposerError, match=r"(?i)refused|connect") as caught:
        proposer_for(f"http://127.0.0.1:{unused_port()}/v1").propose(example_ask())
    assert caught.value.failure == "llm_error"


def test_tls_where_there_is_none_is_said_so():
    with LoopbackServer(never_answers) as server:
        url = server.url.replace("http://", "https://")
        with ends_in_time(), pytest.raises(ProposerError, match=r"TLS failed.*`base_url`") as caught:
            proposer_for(url).propose(example_ask())
    assert caught.value.failure == "llm_error"


def test_a_tls_handshake_that_hangs_ends_in_time_and_lets_go():
    """Cancelled in the handshake, the client library leaves its socket open; a warning here would say so."""
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, ends_in_time(), pytest.raises(ProposerError) as caught:
        proposer_for(f"https://127.0.0.1:{silent.getsockname()[1]}/v1").propose(example_ask())
    assert caught.value.failure == "llm_timeout"
    gc.collect()


def test_an_unknown_name_is_an_error_in_time():
    with ends_in_time(), pytest.raises(ProposerError):
        proposer_for("http://no-such-host.invalid/v1").propose(example_ask())


def test_a_name_lookup_that_hangs_ends_in_time(monkeypatch: pytest.MonkeyPatch):
    """The system's resolver cannot be cancelled, so its thread is left behind."""
    let_go = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        let_go.wait(20)
        raise socket.gaierror("gave up")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        with ends_in_time(), pytest.raises(ProposerError) as caught:
            proposer_for("http://slow-name.example/v1").propose(example_ask())
        assert caught.value.failure == "llm_timeout"
        assert endpoint_threads() == ["overnight-name-lookup"]
    finally:
        let_go.set()
    wait_until(lambda: endpoint_threads() == [], what="end of the lookup")


def test_a_redirect_is_not_followed():
    with LoopbackServer(never_answers) as elsewhere:

        async def redirects(wire: Wire) -> None:
            await wire.answer(307, {}, {"Location": f"{elsewhere.url}/chat/completions"})

        with LoopbackServer(redirects) as server, ends_in_time(), pytest.raises(ProposerError, match="not followed"):
            proposer_for(server.url).propose(example_ask())
        assert elsewhere.requests == []


def test_a_short_wait_that_the_endpoint_asks_for_is_kept():
    async def busy_at_first(wire: Wire) -> None:
        if wire.number == 0:
            await wire.answer(429, {"error": "busy"}, {"Retry-After": "1"})
        else:
            await wire.say("hello")

    with LoopbackServer(busy_at_first) as server:
        started = time.monotonic()
        assert proposer_for(server.url, deadline_s=5.0).propose(example_ask()).reply == "hello"
        assert time.monotonic() - started >= 1.0


def test_a_passing_failure_is_tried_again():
    async def fails_twice(wire: Wire) -> None:
        await (wire.say("hello") if wire.number == 2 else wire.answer(503, {}))

    with LoopbackServer(fails_twice) as server:
        assert proposer_for(server.url, deadline_s=10.0).propose(example_ask()).reply == "hello"


def test_a_storm_is_met_with_growing_pauses():
    """Full jitter over doubling pauses: 5 s of failures are a few dozen attempts at the very most, not thousands."""
    with LoopbackServer(fails_always) as server:
        with pytest.raises(ProposerError):
            proposer_for(server.url, deadline_s=2.0).propose(example_ask())
        assert 2 <= len(server.requests) <= 30


def test_a_refusal_is_not_tried_again():
    async def refuses(wire: Wire) -> None:
        await wire.answer(400, {"error": "the prompt is too long"})

    with LoopbackServer(refuses) as server:
        with pytest.raises(ProposerError, match=r"status 400.*too long"):
            proposer_for(server.url).propose(example_ask())
        assert len(server.requests) == 1


def test_an_endpoint_that_fails_three_times_is_left_alone():
    with LoopbackServer(says_no) as server:
        proposer = proposer_for(server.url)
        for _ in range(5):
            with pytest.raises(ProposerError):
                proposer.propose(example_ask())
        assert len(server.requests) == 3


def test_a_call_inside_a_running_event_loop_works():
    """A host application may drive the graph asynchronously."""

    async def host(url: str) -> str:
        return proposer_for(url).propose(example_ask()).reply

    async def greets(wire: Wire) -> None:
        await wire.say("hello")

    with LoopbackServer(greets) as server:
        assert asyncio.run(host(server.url)) == "hello"


def test_an_interrupt_lets_go_of_the_connection(monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C arrives in the thread that waits."""
    with LoopbackServer(never_answers) as server:
        join: Callable[..., None] = threading.Thread.join

        def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
            if thread.name == "overnight-endpoint":
                wait_until(lambda: len(server.requests) == 1, what="the request")
                raise KeyboardInterrupt
            join(thread, timeout)

        monkeypatch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            proposer_for(server.url, deadline_s=60.0).propose(example_ask())
        wait_until(lambda: server.open_connections == 0, what="closing of the connection")


def test_the_lease_is_kept_while_an_endpoint_thinks_and_its_loss_ends_the_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "IDLE_S", 0.02)
    beats: list[None] = []

    async def thinks(wire: Wire) -> None:
        await asyncio.to_thread(wait_until, lambda: len(beats) >= 3, what="the third beat")
        await wire.say("hello")

    def beat() -> None:
        beats.append(None)

    def lost() -> None:
        if server.requests:
            raise LeaseLostError("another process took it")

    with LoopbackServer(thinks) as server:
        table = {"base_url": server.url, "model": "m", "deadline_s": 20.0, "structured": "none"}

        def told(idle: Callable[[], None]) -> OpenAIProposer:
            context = ProposerContext(campaign_dir=Path(), cache_dir=Path(), menu=example_ask().menu, idle=idle)
            return OpenAIProposer.from_settings("nim", table, context)

        assert told(beat).propose(example_ask()).reply == "hello"
    with LoopbackServer(never_answers) as server:
        table["base_url"] = server.url
        with ends_in_time(), pytest.raises(LeaseLostError):
            told(lost).propose(example_ask())
        wait_until(lambda: server.open_connections == 0, what="closing of the connection")
