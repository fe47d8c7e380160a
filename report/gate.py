"""What stands before the live page: who may ask, under which name, and with which methods.

A request whose Host header is not one that the server is bound to is refused, so that a web page elsewhere cannot point
its own name at this address (DNS rebinding). Beyond loopback a token is asked for. Nothing but reading is let through.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
COOKIE = "overnight_token"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_of(host: str, extra: Iterable[str] = ()) -> frozenset[str]:
    """Return the names under which a server bound to `host` may be asked for, without the port."""
    names = {*LOOPBACK_NAMES, *(name.lower() for name in extra)}
    if not is_loopback(host):
        names.add(_bracketed(host))
    if host in ("0.0.0.0", "::"):
        import psutil

        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        found = (address for addresses in psutil.net_if_addrs().values() for address in addresses)
        names |= {_bracketed(a.address) for a in found if a.family in (socket.AF_INET, socket.AF_INET6)}
    return frozenset(names)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()


class Gate:
    """An ASGI application before another one."""

    def __init__(self, app: App, *, names: frozenset[str], port: int, token: str | None) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in names} | (set(names) if port in (80, 443) else set())
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application behind answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value.lower() for name, value in headers if name == b"host"]
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            await _answer(send, 421, "this server is not asked under that Host; add it with --allow-host")
        elif scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, "only reading is allowed here")
        elif self._token is None or self._knows(headers):
            await self._app(scope, receive, _safely(send))
        else:
            await self._ask(scope, send)

    def _knows(self, headers: Iterable[tuple[bytes, str]]) -> bool:
        for name, value in headers:
            if name == b"authorization" and self._same(value.removeprefix("Bearer ")):
                return True
            if name == b"cookie" and self._same(_cookie(value)):
                return True
        return False

    def _same(self, given: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self._token.encode())

    async def _ask(self, scope: Scope, send: Send) -> None:
        """Take the token from the address once, into a cookie; else refuse."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if not any(name == "token" and self._same(value) for name, value in query):
            await _answer(send, 401, "a token is needed: open the address that `overnight serve` printed")
            return
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        path = "/" + scope["path"].lstrip("/\\") + (f"?{rest}" if rest else "")
        cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
        location = path.encode("ascii", "ignore").replace(b"\r", b"").replace(b"\n", b"")
        await _answer(send, 303, "", [(b"location", location), (b"set-cookie", cookie.encode())])


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return "" if morsel is None else morsel.value


def _safely(send: Send) -> Send:
    async def with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_SAFE]}
        await send(message)

    return with_headers


async def _answer(send: Send, status: int, words: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store"), *_SAFE, *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": words.encode()})
