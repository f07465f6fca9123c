"""Runs the answers of one HTTP request and writes them, whole or as server-sent events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial

import attrs
import msgspec
import trio
from starlette.types import Receive, Scope, Send

from memserve.api.choices import Choice
from memserve.api.direct import DIRECT, DirectWriter
from memserve.api.errors import ApiError, from_failure
from memserve.api.prompt_logprobs import PromptReport
from memserve.api.prompts import Prompt, of_choice
from memserve.api.service import Chunk, Service
from memserve.api.wire import PING, EventStream, Head, Wire
from memserve.errors import RequestFailed

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@attrs.frozen(kw_only=True)
class GenerationOrder:
    """What to generate, and how to write it."""

    prompts: Sequence[Prompt]
    n: int
    stops: Sequence[str]
    wire: Wire
    model: str
    stream: bool
    cache_scope: str
    ping_s: float
    prompt_reports: Sequence[PromptReport] = ()
    """Log probabilities of each prompt; empty if not requested."""


class Generation:
    """An ASGI response. It ends with its last answer, at its first failure, or when the client leaves.

    After a stream's first event and before its last, events go to the socket from within the turn that
    brought their tokens, as long as the socket takes them and the connection has a fast path
    (:mod:`memserve.api.direct`). Otherwise this task writes what has accumulated since its last write: a
    client that reads more slowly than tokens come gets fewer and larger events.
    """

    def __init__(self, service: Service, order: GenerationOrder, choices: Sequence[Choice]) -> None:
        self._service = service
        self._order = order
        self._choices = choices
        self._id = ""
        self._failure: RequestFailed | None = None
        self._news = trio.Event()
        self._at_once: DirectWriter | None = None
        """The fast path, set only while nothing else is being written."""
        self._wrote_at = float("-inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run and write the answers.

        Leaving the nursery for any reason leaves every stream's context, which cancels what still runs.
        """
        watching = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, receive, watching, nursery.cancel_scope)
            for choice in self._choices:
                nursery.start_soon(self._run, choice)
            # OSError: the client left in the middle of a write.
            with suppress(OSError):
                if self._order.stream:
                    await self._write_stream(send, scope.get("extensions", {}).get(DIRECT))
                else:
                    await self._write_whole(send)
            # If all answers are complete, their streams leave by themselves; otherwise cancel them.
            (watching if self._whole else nursery.cancel_scope).cancel()

    async def _cancel_when_gone(
        self, receive: Receive, watching: trio.CancelScope, request: trio.CancelScope
    ) -> None:
        """Cancel the request when the client leaves: the only way to notice while there is nothing to write.

        The server reports the end of the last write with the same message, from within that write. If the
        request were cancelled there, the server would consider the connection busy forever, and wait for it
        at shutdown.
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
        """Take in new tokens; returns whether more are wanted. Called in the middle of a Frontend's turn."""
        choice.feed(chunk)
        if self._at_once is None or self._over or choice.withheld or not self._write_at_once(self._at_once):
            self._at_once = None
            self._news.set()
        return not choice.stopped

    def _write_at_once(self, writer: DirectWriter) -> bool:
        """Write the pending events and return whether the socket took all of them."""
        events = self._events()
        self._wrote_at = trio.current_time() if events else self._wrote_at
        return not events or writer.write(events)

    async def _wait(self, writer: DirectWriter | None = None) -> bool:
        """Wait for something that the fast path has not written, and reset the event that reports it.

        Returns False if nothing was written for so long that a ping is due.
        """
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
        """Fields that all events share; must not be read before a stream is open."""
        return Head(self._id, int(time.time()), self._order.model)

    @cached_property
    def _stream(self) -> EventStream:
        """The response as events; must not be read before a stream is open, or one has failed."""
        return self._order.wire.stream(self._head, self._choices)

    async def _write_whole(self, send: Send) -> None:
        while not self._over:
            await self._wait()
        if self._failure is not None:
            return await _send_error(send, from_failure(self._failure), self._id_header())
        await self._show_prompts()
        whole = self._order.wire.whole(self._head, [(choice, choice.take()) for choice in self._choices])
        body = msgspec.json.encode(whole)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, *self._id_header()]})
        await send({"type": "http.response.body", "body": body})
        return None

    async def _write_stream(self, send: Send, writer: DirectWriter | None) -> None:
        """Write the stream. Its head waits for the first tokens, so that an early failure sets the status."""
        has_news = await self._wait()
        if self._failure is not None:
            return await _send_error(send, from_failure(self._failure), self._id_header())
        headers = [*_SSE_HEADERS, *self._id_header()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            # Read before the events are taken: what comes while they are sent is left to the next round.
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
        """Format the prompts' log probabilities in another thread: long ones would hold up other streams."""
        for one in self._order.prompt_reports:
            if one.ready and not one.shown:
                await trio.to_thread.run_sync(one.show)

    def _ending(self) -> bytes:
        if self._failure is not None:
            return self._stream.failure(from_failure(self._failure))
        return self._stream.ending()

    def _events(self) -> bytes:
        """The pending events of all choices; takes their deltas."""
        events = [
            self._stream.events(choice, delta)
            for choice in self._choices
            if not choice.withheld and (delta := choice.take())
        ]
        return b"".join(events)

    def _id_header(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self._id.encode())] if self._id else []


async def _write(part: bytes, send: Send, writer: DirectWriter | None) -> None:
    """Write a part of a body, on the fast path if there is one."""
    if writer is None:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    elif not writer.write(part):
        await writer.drain()


async def _send_error(send: Send, error: ApiError, more: list[tuple[bytes, bytes]]) -> None:
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *more]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
