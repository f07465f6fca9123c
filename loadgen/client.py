"""The HTTP client: requests over trio streams, with connections kept for the next request.

httpx is not used: with 1,000 streams it took 800 µs of CPU per event, where this client takes about 30
(``make bench-loadgen``).
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import attrs
import orjson
import trio

from loadgen.answer import error_text
from loadgen.errors import LoadgenError
from loadgen.wire import Exchange, IncompleteError, WireError

READ_BYTES = 65_536
IDLE_MAX = 4096
"""Maximum number of idle connections that are kept."""

OnEvent = Callable[[str, bytes, float], object]
"""Called with an event's name, its data and the time at which it was read."""
Connect = Callable[[], Awaitable[trio.abc.Stream]]


@attrs.frozen
class Target:
    """Where requests go."""

    host: str
    port: int
    tls: bool
    path: str
    """The part of the path before ``/v1``."""

    @classmethod
    def parse(cls, url: str) -> Target:
        """Parse a URL such as http://127.0.0.1:8080, with or without a final /v1.

        Raises LoadgenError for others.
        """
        wrong = LoadgenError(f"--url: must be like http://HOST:PORT, not {url!r}")
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError:
            raise wrong from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise wrong
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), tls, path)

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class Client:
    """Sends requests to one server. Owned by one trio task tree; close it with ``aclose``."""

    def __init__(self, url: str, connect: Connect | None = None) -> None:
        self.target = Target.parse(url)
        self._headers = [("Host", self.target.authority), ("Accept", "*/*")]
        self._connect = connect or self._dial
        self._idle: list[trio.abc.Stream] = []
        self._address = ""
        self._tls = ssl.create_default_context() if self.target.tls else None

    async def post(
        self, path: str, body: bytes, on_event: OnEvent, headers: Sequence[tuple[str, str]] = ()
    ) -> Exchange:
        """Send JSON and read the whole answer.

        Raises OSError, trio.BrokenResourceError or WireError if that fails.
        """
        return await self._ask("POST", path, body, on_event, [("Content-Type", "application/json"), *headers])

    async def get_json(self, path: str, headers: Sequence[tuple[str, str]] = ()) -> Any:
        """Get a JSON document. Raises LoadgenError if the server is unreachable or answers anything else."""
        try:
            exchange = await self._ask("GET", path, b"", lambda *_: None, headers)
            document = orjson.loads(exchange.body)
        except (OSError, trio.BrokenResourceError, WireError, orjson.JSONDecodeError) as error:
            raise LoadgenError(
                f"--url: {self.target.authority}{path} does not answer: {reason(error)}"
            ) from None
        if exchange.status != 200:
            raise LoadgenError(
                f"--url: {self.target.authority}{path} answers {exchange.status}: {error_text(document)}"
            )
        return document

    async def aclose(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await trio.aclose_forcefully(self._idle.pop())

    async def _ask(
        self, method: str, path: str, body: bytes, on_event: OnEvent, headers: Sequence[tuple[str, str]]
    ) -> Exchange:
        while True:
            reused = bool(self._idle)
            stream = self._idle.pop() if reused else await self._connect()
            exchange = Exchange()
            request = exchange.request(method, f"{self.target.path}{path}", [*self._headers, *headers], body)
            try:
                if await self._converse(stream, exchange, request, on_event, reused):
                    return exchange
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            # The server closed a kept connection before it saw the request: try the next one, or a new one.
            await trio.aclose_forcefully(stream)

    async def _converse(
        self, stream: trio.abc.Stream, exchange: Exchange, request: bytes, on_event: OnEvent, reused: bool
    ) -> bool:
        """Send and receive; False if a kept connection turned out to be closed."""
        try:
            await stream.send_all(request)
            data: bytes | bytearray = await stream.receive_some(READ_BYTES)
        except trio.BrokenResourceError:
            if reused:
                return False
            raise
        if not data and reused:
            return False
        while True:
            now = trio.current_time()
            for name, payload in exchange.receive(bytes(data)):
                on_event(name, payload, now)
            if exchange.done or not data:
                break
            data = await stream.receive_some(READ_BYTES)
        if not exchange.done:
            raise IncompleteError("the connection closed before the answer's end")
        if exchange.reusable and len(self._idle) < IDLE_MAX:
            self._idle.append(stream)
        else:
            await trio.aclose_forcefully(stream)
        return True

    async def _dial(self) -> trio.abc.Stream:
        # The first connection tries every address of the name. Later ones go where it went: otherwise a thread
        # would look up the name for each of them.
        stream = await trio.open_tcp_stream(self._address or self.target.host, self.target.port)
        if not self._address:
            self._address = str(stream.socket.getpeername()[0])
        if self._tls is None:
            return stream
        return trio.SSLStream(stream, self._tls, server_hostname=self.target.host, https_compatible=True)


def reason(error: BaseException) -> str:
    """An error in a few words; of a group of failed connection attempts, the first."""
    inner = error.__cause__
    if isinstance(inner, BaseExceptionGroup) and inner.exceptions:
        inner = inner.exceptions[0]
    text = str(inner or error) or type(error).__name__
    return text[:300]
