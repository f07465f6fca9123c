"""Runs the answers of one HTTP request and writes them, whole or as server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cached_property

import attrs
import msgspec
import trio
from starlette.types import Receive, Scope, Send

from memserve.api.choices import Choice
from memserve.api.errors import ApiError, from_failure
from memserve.api.prompts import Prompt, of_choice
from memserve.api.service import Chunk, Service
from memserve.api.wire import DONE, PING, Head, Wire, error_event, event, usage
from memserve.errors import RequestFailed

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@attrs.frozen(kw_only=True)
class Order:
    """What is to be generated, and how it is to be written."""

    prompts: Sequence[Prompt]
    n: int
    stops: Sequence[str]
    wire: Wire
    model: str
    stream: bool
    include_usage: bool
    cache_scope: str
    ping_s: float


class Generation:
    """An ASGI response. It ends with its last answer, its first failure, or when the client leaves.

    One task per answer takes chunks in as they come; this one writes what has gathered since its last write.
    So a client that reads slower than tokens come gets fewer and larger events.
    """

    def __init__(self, service: Service, order: Order, choices: Sequence[Choice]) -> None:
        self._service = service
        self._order = order
        self._choices = choices
        self._id = ""
        self._failure: RequestFailed | None = None
        self._news = trio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leaving the nursery, for whatever reason, leaves every stream's context: what runs is cancelled."""
        watching = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, receive, watching, nursery.cancel_scope)
            for choice in self._choices:
                nursery.start_soon(self._run, choice)
            # OSError: the client is gone in the middle of a write.
            with suppress(OSError):
                await (self._write_stream(send) if self._order.stream else self._write_whole(send))
            # A whole answer's stream leaves its context in its own time; only what failed is cut off.
            (watching if self._whole else nursery.cancel_scope).cancel()

    async def _cancel_when_gone(
        self, receive: Receive, watching: trio.CancelScope, request: trio.CancelScope
    ) -> None:
        """The only way to learn that the client left while there is nothing to write.

        The end of the last write is told in the same words, from within that write: cancelled there, the server would
        take the connection for busy for ever, and wait for it when it is told to end.
        """
        with watching:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not self._over:
                request.cancel()

    # ---- reading -------------------------------------------------------------------------------------------

    async def _run(self, choice: Choice) -> None:
        prompt = self._order.prompts[choice.prompt]
        params = of_choice(prompt.params, choice.index % self._order.n)
        try:
            opening = self._service.open(prompt.packed, params, self._order.cache_scope)
            async with opening as stream, _closing(aiter(stream)) as chunks:
                self._id = self._id or stream.id
                async for chunk in chunks:
                    choice.feed(chunk)
                    self._news.set()
                    if choice.stopped:
                        stream.stop()
                    if choice.finish is not None:
                        return
            assert choice.finish is not None, f"the stream of {stream.id} ended without saying how"
        except RequestFailed as failure:
            self._failure = self._failure or failure
            self._news.set()

    async def _wait(self) -> bool:
        """Wait for news, and clear them. False when there were none for so long that a ping is due."""
        with trio.move_on_after(self._order.ping_s) as scope:
            await self._news.wait()
        self._news = trio.Event()
        return not scope.cancelled_caught

    @property
    def _whole(self) -> bool:
        return all(choice.finish is not None for choice in self._choices)

    @property
    def _over(self) -> bool:
        return self._failure is not None or self._whole

    # ---- writing -------------------------------------------------------------------------------------------

    @cached_property
    def _head(self) -> Head:
        """The same for every event; not to be read before a stream is open."""
        return Head(self._id, int(time.time()), self._order.model)

    async def _write_whole(self, send: Send) -> None:
        while not self._over:
            await self._wait()
        if self._failure is not None:
            return await _send_error(send, from_failure(self._failure))
        whole = self._order.wire.whole(self._head, [(choice, choice.take()) for choice in self._choices])
        body = msgspec.json.encode(whole | {"usage": usage(self._order.prompts, self._choices)})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, *self._id_header()]})
        await send({"type": "http.response.body", "body": body})
        return None

    async def _write_stream(self, send: Send) -> None:
        """The first byte waits for the first news, so that an early failure still decides the status."""
        news = await self._wait()
        if self._failure is not None:
            return await _send_error(send, from_failure(self._failure))
        headers = [*_SSE_HEADERS, *self._id_header()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        opened: set[int] = set()
        while True:
            # Asked before the news are taken: what comes while they are being sent is for the next round.
            over = self._over
            part = self._events(opened) or (b"" if news else PING)
            if over:
                break
            if part:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            news = await self._wait()
        await send({"type": "http.response.body", "body": part + self._ending()})
        return None

    def _ending(self) -> bytes:
        if self._failure is not None:
            return error_event(from_failure(self._failure).body())
        if not self._order.include_usage:
            return DONE
        last = self._order.wire.last(self._head) | {"usage": usage(self._order.prompts, self._choices)}
        return event(last) + DONE

    def _events(self, opened: set[int]) -> bytes:
        """Events for each choice that has news; ``opened`` are the choices whose first event was written."""
        wire, unknown_yet = self._order.wire, {"usage": None} if self._order.include_usage else {}
        events = []
        for choice in self._choices:
            if not (delta := choice.take()):
                continue
            if choice.index not in opened:
                opened.add(choice.index)
                if (opening := wire.opening(self._head, choice)) is not None:
                    events.append(event(opening | unknown_yet))
            # Tokens whose text is held back (half a character, the beginning of a stop string) make no event.
            if delta.text or delta.finish or wire.token_ids:
                events.append(event(wire.chunk(self._head, choice, delta) | unknown_yet))
        return b"".join(events)

    def _id_header(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self._id.encode())] if self._id else []


@asynccontextmanager
async def _closing(chunks: AsyncIterator[Chunk]) -> AsyncIterator[AsyncIterator[Chunk]]:
    """Closes what is an async generator: left in the middle, it must not wait for the garbage collector."""
    try:
        yield chunks
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


async def _send_error(send: Send, error: ApiError) -> None:
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
