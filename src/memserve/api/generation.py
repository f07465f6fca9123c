"""Runs the answers of one HTTP request and writes them, whole or as server-sent events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import attrs
import msgspec
import trio
from starlette.types import Receive, Scope, Send

from memserve.api.choices import Choice, Delta
from memserve.api.direct import DIRECT, DirectWriter
from memserve.api.errors import ApiError, from_failure
from memserve.api.prompt_logprobs import PromptReport
from memserve.api.prompts import Prompt, of_choice
from memserve.api.service import Chunk, Service
from memserve.api.wire import DONE, PING, Head, Mould, Wire, error_event, event, usage
from memserve.errors import RequestFailed

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@attrs.frozen(kw_only=True)
class GenerationOrder:
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
    told: Sequence[PromptReport] = ()
    """What is told of each prompt, where that was asked for."""


class Generation:
    """An ASGI response. It ends with its last answer, its first failure, or when the client leaves.

    Between the first event of a stream and the last, they go to the socket from within the turn that brought their tokens,
    as long as it takes them and the connection has a short way (:mod:`memserve.api.direct`). Otherwise this task writes
    what has gathered since its last write: a client that reads slower than tokens come gets fewer and larger events.
    """

    def __init__(self, service: Service, order: GenerationOrder, choices: Sequence[Choice]) -> None:
        self._service = service
        self._order = order
        self._choices = choices
        self._id = ""
        self._failure: RequestFailed | None = None
        self._news = trio.Event()
        self._at_once: DirectWriter | None = None
        """The short way, while nothing else is being written."""
        self._wrote_at = float("-inf")
        self._moulds: dict[int, Mould] = {}
        """Of the choices whose first event was written."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leaving the nursery, for whatever reason, leaves every stream's context: what runs is cancelled."""
        watching = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, receive, watching, nursery.cancel_scope)
            for choice in self._choices:
                nursery.start_soon(self._run, choice)
            # OSError: the client is gone in the middle of a write.
            with suppress(OSError):
                if self._order.stream:
                    await self._write_stream(send, scope.get("extensions", {}).get(DIRECT))
                else:
                    await self._write_whole(send)
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
            async with self._service.open(prompt.packed, params, self._order.cache_scope) as stream:
                self._id = self._id or stream.id
                await stream.listen(partial(self._take, choice))
            assert choice.finish is not None, f"the stream of {stream.id} ended without saying how"
        except RequestFailed as failure:
            self._failure = self._failure or failure
            self._news.set()

    def _take(self, choice: Choice, chunk: Chunk) -> bool:
        """Called in the middle of the Frontend's turn."""
        choice.feed(chunk)
        if self._at_once is None or self._over or choice.withheld or not self._write_at_once(self._at_once):
            self._at_once = None
            self._news.set()
        return not choice.stopped

    def _write_at_once(self, writer: DirectWriter) -> bool:
        """Whether all of it left."""
        events = self._events()
        self._wrote_at = trio.current_time() if events else self._wrote_at
        return not events or writer.write(events)

    async def _wait(self, writer: DirectWriter | None = None) -> bool:
        """Wait for news that ``writer`` does not take, and clear them. False when nothing was written for so long that a ping is due."""
        self._at_once = writer
        due, now = trio.current_time() + self._order.ping_s, float("-inf")
        while now < due and not self._news.is_set():
            with trio.move_on_at(due):
                await self._news.wait()
            due, now = max(due, self._wrote_at + self._order.ping_s), trio.current_time()
        self._at_once, has_come = None, self._news.is_set()
        self._news = trio.Event()
        if writer is not None:
            await writer.drain()
        return has_come

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
        await self._show_prompts()
        whole = self._order.wire.whole(self._head, [(choice, choice.take()) for choice in self._choices])
        body = msgspec.json.encode(whole | {"usage": usage(self._order.prompts, self._choices)})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, *self._id_header()]})
        await send({"type": "http.response.body", "body": body})
        return None

    async def _write_stream(self, send: Send, writer: DirectWriter | None) -> None:
        """The first byte waits for the first news, so that an early failure still decides the status."""
        has_news = await self._wait()
        if self._failure is not None:
            return await _send_error(send, from_failure(self._failure))
        headers = [*_SSE_HEADERS, *self._id_header()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            # Asked before the news are taken: what comes while they are being sent is for the next round.
            over = self._over
            await self._show_prompts()
            part = self._events() or (b"" if has_news else PING)
            if over:
                break
            if part:
                await _write(part, send, writer)
            has_news = await self._wait(writer)
        await _write(part + self._ending(), send, writer)
        await send({"type": "http.response.body", "body": b""})
        return None

    async def _show_prompts(self) -> None:
        """What has come of prompts is written in another thread: of a long one it would hold up the streams of others."""
        for one in self._order.told:
            if one.ready and not one.shown:
                await trio.to_thread.run_sync(one.show)

    def _ending(self) -> bytes:
        if self._failure is not None:
            return error_event(from_failure(self._failure).body())
        if not self._order.include_usage:
            return DONE
        last = self._order.wire.last(self._head) | {"usage": usage(self._order.prompts, self._choices)}
        return event(last) + DONE

    def _events(self) -> bytes:
        """Events for each choice that has news."""
        events = []
        for choice in self._choices:
            if choice.withheld or not (delta := choice.take()):
                continue
            if choice.index not in self._moulds:
                events.append(self._opening(choice))
            events += [self._event(choice, part) for part in delta.parts]
        return b"".join(events)

    def _event(self, choice: Choice, delta: Delta) -> bytes:
        """Tokens whose text is held back (half a character, what may be the beginning of a stop string or a call) make none."""
        if delta.finish or delta.calls or delta.thought or self._order.wire.per_token:
            return event(self._chunk(choice, delta))
        return self._moulds[choice.index].event(delta.text) if delta.text else b""

    def _opening(self, choice: Choice) -> bytes:
        """What a choice's stream begins with, if anything."""
        self._moulds[choice.index] = Mould.of(lambda text: self._chunk(choice, Delta(text)))
        opening = self._order.wire.opening(self._head, choice)
        return b"" if opening is None else event(opening | self._usage_unknown)

    def _chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return self._order.wire.chunk(self._head, choice, delta) | self._usage_unknown

    @property
    def _usage_unknown(self) -> dict[str, Any]:
        return {"usage": None} if self._order.include_usage else {}

    def _id_header(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self._id.encode())] if self._id else []


async def _write(part: bytes, send: Send, writer: DirectWriter | None) -> None:
    """A part of a body, by the short way where there is one."""
    if writer is None:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    elif not writer.write(part):
        await writer.drain()


async def _send_error(send: Send, error: ApiError) -> None:
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
