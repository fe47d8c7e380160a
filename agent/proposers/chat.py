"""One OpenAI-compatible endpoint, spoken to within a wall-clock deadline that nothing on the network can stretch.

Each call runs on an event loop of its own in a short-lived thread, because only a cancelled coroutine lets go of a
trickling socket in time: per-read timeouts never fire on a server that sends one byte a second. The connection ends
with the call. Replies are cut off at 1 MiB, redirects are refused, the key is kept out of every text. What may
outlive a call is the system's name lookup, which cannot be cancelled: it sits in a daemon thread and is forgotten.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from overnight.agent.proposers.replies import Completion, ListedModel, ModelList
from overnight.store.errors import ProposerError

if TYPE_CHECKING:
    import httpx2
    import openai
    import tenacity

MAX_REPLY_BYTES = 1 << 20
MAX_ERROR_CHARS = 300
MAX_NAME_CHARS = 4096
"""Of a model's name at the endpoint, which may be the path of a file."""
LONGEST_WAIT_S = 8.0
IDLE_S = 1.0
"""How often `idle` is called while an answer is waited for: the campaign's lease must not lapse meanwhile."""
GRACE_S = 0.5
"""How long after the deadline a call may take to close its connection."""
TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})
_T = TypeVar("_T")
_M = TypeVar("_M", bound=BaseModel)


class Refused(Exception):
    """The endpoint will not do what this request asks, and would not if asked again: mostly status 400 or 422."""


class _Transient(Exception):
    """Worth another attempt; the endpoint may have said after how many seconds."""

    def __init__(self, text: str, *, retry_after: float | None = None, status: int | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after
        self.status = status


class _Permanent(Exception):
    """Another attempt would end the same."""


class ChatEndpoint:
    """An endpoint's address and key; holds no connection between calls.

    Args:
        base_url: where its API begins.
        key: sent with each request; None: none.
        idle: called about every second of a call; what it raises ends the call and is passed on.
    """

    def __init__(self, base_url: str, key: str | None, *, idle: Callable[[], None] = lambda: None) -> None:
        self.base_url = base_url.rstrip("/")
        self._key = key
        self._idle = idle
        self._ssl: ssl.SSLContext | None = None

    def call(self, work: Callable[[ChatSession], Awaitable[_T]], deadline_s: float) -> _T:
        """Run `work` with an open session, and end it at the deadline whatever it waits for.

        Raises:
            ProposerError: `llm_timeout` where nothing came back by the deadline, `llm_error` for every other end: an
                error that was still being retried then, too.
            Exception: whatever else `work` itself raises.
        """
        import openai  # noqa: F401  (half a second, once: not the endpoint's time)

        job = _Job(self, work, deadline_s)
        thread = threading.Thread(target=job.run, name="overnight-endpoint", daemon=True)
        thread.start()
        ends = time.monotonic() + deadline_s + GRACE_S
        try:
            while thread.is_alive() and (left := ends - time.monotonic()) > 0:
                thread.join(min(left, IDLE_S))
                if thread.is_alive():
                    self._idle()
        except BaseException:  # raised on: a signal came while waiting, and the call must not go on alone
            job.cancel()
            raise
        if job.result is not None:
            return job.result[0]
        error = job.error
        if error is None or isinstance(error, TimeoutError | asyncio.CancelledError):
            job.cancel()
            failure = "llm_error" if job.hindsight else "llm_timeout"
            raise self._failure(f"no answer within {deadline_s:g} s{job.hindsight}", failure)
        if isinstance(error, _Transient | _Permanent | Refused):
            raise self._failure(str(error), "llm_error") from None
        raise error

    def _failure(self, text: str, failure: Any) -> ProposerError:
        return ProposerError(f"endpoint `{self.base_url}`: {self.scrub(text)}", failure=failure)

    def scrub(self, text: str) -> str:
        """Return `text` without the key, should a server send it back, as it is or in a body's JSON."""
        if not self._key or len(self._key) < 6:
            return text
        return text.replace(self._key, "***").replace(json.dumps(self._key)[1:-1], "***")

    def shown(self, text: str, limit: int = MAX_ERROR_CHARS) -> str:
        """Return text of the server fit to be shown: without the key, plain, and only then cut to `limit`."""
        return _plain(self.scrub(text), limit)

    def open(self) -> openai.AsyncOpenAI:
        """Return a client of the running loop: no retries of its own, no redirects, no time-outs but the deadline."""
        import httpx2
        import openai

        self._ssl = self._ssl or httpx2.create_ssl_context()
        client = openai.AsyncOpenAI(
            base_url=self.base_url,
            # Without a key the client would look for OPENAI_API_KEY and send it to whoever answers here.
            api_key=self._key or "none",
            max_retries=0,
            timeout=None,
            # A compressed reply could be any size once unpacked.
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(
                verify=self._ssl,
                follow_redirects=False,
                timeout=None,
                # Proxies from the environment are for hosts outside; a local server is reached directly.
                trust_env=not is_loopback(self.base_url),
                event_hooks={"response": [_tame]},
            ),
        )
        client.organization = client.project = None  # from the environment, meant for OpenAI alone
        return client


class _Job(Generic[_T]):
    """One call in its thread."""

    def __init__(self, endpoint: ChatEndpoint, work: Callable[[ChatSession], Awaitable[_T]], deadline_s: float) -> None:
        self.result: tuple[_T] | None = None
        self.error: BaseException | None = None
        self._endpoint = endpoint
        self._work = work
        self._deadline_s = deadline_s
        self._session: ChatSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[_T] | None = None

    @property
    def hindsight(self) -> str:
        """What the last attempt that did end ended with."""
        seen = self._session.last_error if self._session else ""
        return f"; before that: {seen}" if seen else ""

    def run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_Loop) as runner:
                self.result = (runner.run(self._main()),)
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: the caller raises it
            self.error = error

    async def _main(self) -> _T:
        ends = time.monotonic() + self._deadline_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        try:
            async with asyncio.timeout(self._deadline_s), self._endpoint.open() as client:
                self._session = ChatSession(self._endpoint, client, ends)
                return await self._work(self._session)
        finally:
            assert isinstance(self._loop, _Loop)
            await self._loop.drop_connections()

    def cancel(self) -> None:
        loop, task = self._loop, self._task
        if loop is not None and task is not None and not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that can be left at once: without its name lookups, and with no connection still open.

    The usual lookups are waited for when a loop closes; a connection cancelled in its TLS handshake stays open.
    """

    def __init__(self) -> None:
        super().__init__()
        self._connections: list[asyncio.BaseTransport] = []

    async def create_connection(self, *arguments: Any, **options: Any) -> Any:
        made = await super().create_connection(*arguments, **options)
        self._connections.append(made[0])
        return made

    async def drop_connections(self) -> None:
        for transport in self._connections:
            assert isinstance(transport, asyncio.WriteTransport)
            transport.abort()
        await asyncio.sleep(0)  # the loop closes an aborted socket in its next round

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        found: asyncio.Future[Any] = self.create_future()

        def settle(setter: Callable[[Any], None], value: Any) -> None:
            if not found.done():
                setter(value)

        def look_up() -> None:
            import socket

            try:
                setter, value = found.set_result, socket.getaddrinfo(host, port, **options)
            except OSError as error:
                setter, value = found.set_exception, error  # type: ignore[assignment]
            if not self.is_closed():
                self.call_soon_threadsafe(settle, setter, value)

        threading.Thread(target=look_up, name="overnight-name-lookup", daemon=True).start()
        return await found


class ChatSession:
    """An open connection to the endpoint, until the deadline."""

    def __init__(self, endpoint: ChatEndpoint, client: openai.AsyncOpenAI, ends: float) -> None:
        self.last_error = ""
        self._endpoint = endpoint
        self._client = client
        self._ends = ends

    async def complete(self, body: Mapping[str, Any], *, probing: bool = False) -> Completion:
        """Ask for one chat completion, retrying what is worth it for as long as the deadline allows.

        Args:
            body: The request's JSON.
            probing: Take a status of 500 or 501 as a refusal: some servers fall over what they do not support.

        Raises:
            Refused: status 400 or 422.
        """
        raw = await self._send("POST", "/chat/completions", body, probing=probing)
        return self._parse(Completion, raw)

    async def models(self) -> list[ListedModel]:
        """Return the endpoint's models, adapters included, with names fit to be shown and stored."""
        listed = self._parse(ModelList, await self._send("GET", "/models", None, probing=False)).data
        return [model.model_copy(update={"id": self._endpoint.shown(model.id, MAX_NAME_CHARS)}) for model in listed]

    async def post(self, path: str, body: Mapping[str, Any]) -> None:
        """Send a request of which only the success counts.

        Raises:
            Refused: any status that trying again would not mend, 500 and 501 included.
        """
        try:
            await self._send("POST", path, body, probing=True)
        except _Permanent as error:
            raise Refused(str(error)) from None

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, *, probing: bool) -> bytes:
        import tenacity

        jitter = tenacity.wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT_S)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after if isinstance(error, _Transient) else None
            return max(float(jitter(state)), asked or 0.0)

        def stop(state: tenacity.RetryCallState) -> bool:
            return time.monotonic() + state.upcoming_sleep >= self._ends

        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Transient), wait=wait, stop=stop, reraise=True
        ):
            with attempt:
                try:
                    return await self._send_once(method, path, body)
                except _Transient as error:
                    self.last_error = str(error)
                    if probing and error.status in (500, 501):
                        raise Refused(str(error)) from None
                    raise
        raise AssertionError("tenacity ends by returning or raising")

    async def _send_once(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        import httpx2
        import openai

        try:
            if method == "GET":
                response = await self._client.get(path, cast_to=httpx2.Response)
            else:
                response = await self._client.post(path, body=body, cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            raise self._of_status(error.response) from None
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            raise self._of_connection(error) from None
        except _Permanent:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a server makes the client stumble over is its own failure
            raise _Permanent(f"{type(error).__name__}: {self._endpoint.shown(str(error))}") from None
        return response.content

    def _of_status(self, response: httpx2.Response) -> Exception:
        """Return the error that a status other than success stands for."""
        status = response.status_code
        shown = self._endpoint.shown
        text = f"status {status}: {shown(response.text) or shown(response.reason_phrase)}"
        if status in (400, 422):
            return Refused(text)
        if 300 <= status < 400:
            target = shown(response.headers.get("location", "nowhere"), 100)
            return _Permanent(f"status {status}: it redirects to {target}, which is not followed; set `base_url` to it")
        if status in (401, 403):
            return _Permanent(f"{text}; check the variable that `api_key_env` names")
        if status in TRANSIENT_STATUSES:
            wait = _retry_after(response.headers.get("retry-after"))
            asked = f" (it asks to wait {wait:.0f} s)" if wait else ""
            return _Transient(text + asked, retry_after=wait, status=status)
        return _Permanent(text)

    def _of_connection(self, error: BaseException) -> Exception:
        """Return the error for a request that got no status, named after the deepest cause."""
        shown = self._endpoint.shown
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        for link in chain:
            if isinstance(link, _Permanent):
                return link
            if isinstance(link, ssl.SSLError):
                return _Permanent(f"TLS failed: {shown(str(link))}; check `https` in `base_url`, and the certificate")
        deepest = next((link for link in reversed(chain) if str(link)), error)
        return _Transient(f"{type(deepest).__name__}: {shown(str(deepest))}")

    def _parse(self, model: type[_M], raw: bytes) -> _M:
        try:
            return model.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            shown = self._endpoint.shown(raw.decode(errors="replace"))
            raise _Permanent(f"its reply is not of the OpenAI form ({where}: {first['msg']}): {shown}") from None


async def _tame(response: httpx2.Response) -> None:
    """Let no body grow beyond the limit, whatever its status (an endless error page fills memory as well), and read
    it as UTF-8: a charset that the server names may be any codec of Python's, and fail."""
    import httpx2

    if response.headers.get("content-encoding", "identity") != "identity":
        raise _Permanent("it sent a compressed reply, though none was asked for")
    response.encoding = "utf-8"
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    inner: httpx2.AsyncByteStream = response.stream

    class Capped(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            seen = 0
            async for chunk in inner:
                seen += len(chunk)
                if seen > MAX_REPLY_BYTES:
                    raise _Permanent(f"it sent more than {MAX_REPLY_BYTES:,} bytes; the rest was not read")
                yield chunk

        async def aclose(self) -> None:
            await inner.aclose()

    response.stream = Capped()


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header (RFC 9110, section 10.2.3: seconds, or a date), if it is one."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _plain(text: str, limit: int) -> str:
    """Return untrusted text on one line, cut, without control characters."""
    line = " ".join("".join(ch if ch.isprintable() else " " for ch in text[: limit * 4]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def is_loopback(url: str) -> bool:
    """Say whether the URL's host is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
