"""A real HTTP server on loopback that answers, or misbehaves, as a test tells it to.

Each connection is handed to the test's handler after its request was read. The server counts open connections, so
that a test can see that the client let go.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ChatServer:
    """A real server with an OpenAI-compatible API."""

    url: str
    model: str


@dataclass
class Wire:
    """One connection with its request."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int
    """How many requests came before this one."""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"Content-Type": "application/json", "Content-Length": str(len(payload)), **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        await self.send(f"HTTP/1.1 {status} Whatever\r\n{lines}Connection: close\r\n\r\n".encode() + payload)

    async def say(self, text: str | None) -> None:
        """Answer as a chat model that says `text`."""
        await self.answer(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}},
                ],
                "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
            },
        )

    async def start_body(self, length: int = 1 << 40) -> None:
        await self.send(
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()
        )

    async def until_closed(self) -> None:
        """Wait for the client to hang up."""
        await self.reader.read()

    def reset(self) -> None:
        """Drop the connection with a TCP reset."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Handler = Callable[[Wire], Awaitable[None]]


@dataclass
class LoopbackServer:
    """Runs in a thread of its own; use it as a context manager."""

    handler: Handler
    requests: list[Wire] = field(default_factory=list)
    open_connections: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def bodies(self) -> list[Any]:
        """The JSON of every chat request so far."""
        return [wire.body for wire in self.requests if wire.path.endswith("/chat/completions")]

    def __enter__(self) -> LoopbackServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="misbehaving-server", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result(5)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        try:
            wire = await self._read(reader, writer)
            if wire is not None:
                self.requests.append(wire)
                await self.handler(wire)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client hung up, which is what most of these tests are about
        finally:
            self.open_connections -= 1
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Wire | None:
        start = await reader.readexactly(1)
        if not start.isalpha():  # not HTTP: the first byte of a TLS greeting, say
            writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            return None
        head = (start + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        return Wire(method, path, headers, json.loads(raw or b"null"), reader, writer, len(self.requests))


@dataclass
class LoraServer:
    """The handler of a server that loads and unloads LoRA adapters while it runs, as vLLM does."""

    base: str = "base"
    reply: str = "hello"
    updating: bool = True
    """Whether it was started so that adapters may be loaded."""
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Statuses and messages for paths that are refused, by how they end; an empty end is every path."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Paths by name."""
    did: list[str] = field(default_factory=list)
    """What was asked of it, in order."""
    load_s: float = 0.0
    """How long loading takes."""

    async def __call__(self, wire: Wire) -> None:
        last = wire.path.rpartition("/")[2]
        if last == "models":
            await wire.answer(200, {"data": self._cards()})
        elif last == "completions":
            await self._chat(wire)
        elif last == "load_lora_adapter" and self.updating:
            await self._load(wire, wire.body["lora_name"], wire.body["lora_path"])
        elif last == "unload_lora_adapter" and self.updating:
            await self._unload(wire, wire.body["lora_name"])
        else:
            await wire.answer(404, {"detail": "Not Found"})

    def _cards(self) -> list[dict[str, Any]]:
        base = {"id": self.base, "root": "/models/base", "parent": None}
        return [base, *({"id": name, "root": root, "parent": self.base} for name, root in self.adapters.items())]

    async def _chat(self, wire: Wire) -> None:
        model = wire.body["model"]
        self.did.append(f"ask {model}")
        if model != self.base and model not in self.adapters:
            await self._error(wire, 404, f"there is no model {model}")
            return
        await wire.say(self.reply)

    async def _load(self, wire: Wire, name: str, path: str) -> None:
        self.did.append(f"load {name}")
        refused = next((answer for end, answer in self.refuses.items() if path.endswith(end)), None)
        if refused is None and name in self.adapters:
            refused = 400, f"{name} is loaded already"
        if refused is not None:
            await self._error(wire, *refused)
            return
        await asyncio.sleep(self.load_s)
        self.adapters[name] = path
        await wire.answer(200, b"loaded", {"Content-Type": "text/plain"})

    async def _unload(self, wire: Wire, name: str) -> None:
        self.did.append(f"unload {name}")
        if self.adapters.pop(name, None) is None:
            await self._error(wire, 404, f"{name} cannot be found")
            return
        await wire.answer(200, b"unloaded", {"Content-Type": "text/plain"})

    async def _error(self, wire: Wire, status: int, text: str) -> None:
        await wire.answer(status, {"error": {"message": text, "type": "Whatever", "code": status}})


def unused_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], *, seconds: float = 5.0, what: str = "the condition") -> None:
    """Look at a condition until it holds.

    Raises:
        AssertionError: it does not within `seconds`.
    """
    ends = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < ends, f"{what} did not come about within {seconds} s"
        pause.wait(0.01)
