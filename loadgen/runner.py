"""Plays a workload against a server: sends requests when they are due and makes a record of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import orjson
import trio

from loadgen.answer import Answer, error_text
from loadgen.arrivals import Arrivals, times
from loadgen.client import Client, reason
from loadgen.content import Filler
from loadgen.conversation import Conversation, Own, Style, digest
from loadgen.records import Record
from loadgen.wire import Exchange, IncompleteError, WireError
from loadgen.workload import Session, Turn, Workload

TICK_S = 0.02
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@attrs.frozen
class Manner:
    """How requests are sent, and for how long."""

    model: str
    style: Style
    body: dict[str, Any] = attrs.field(factory=dict)
    """Fields that are put into every request's body."""
    api_key: str = attrs.field(default="", repr=False)
    tenant_keys: dict[str, str] = attrs.field(factory=dict, repr=False)
    timeout_s: float = 600.0
    duration_s: float | None = None
    drain_s: float = 60.0
    in_flight_max: int = 4096
    keep_answers: bool = False


@attrs.define
class Progress:
    """What is known while a run is under way; the terminal reads it."""

    planned: int
    began_s: float = 0.0
    """When the run began, on trio's clock."""
    sent: int = 0
    ok: int = 0
    failed: int = 0
    in_flight: int = 0
    events: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    lag_max_s: float = 0.0
    ttft_ms: deque[float] = attrs.field(factory=lambda: deque(maxlen=500))
    jct_ms: deque[float] = attrs.field(factory=lambda: deque(maxlen=500))
    errors: dict[str, int] = attrs.field(factory=dict)

    def ended(self, record: Record) -> None:
        """Count a request that has ended."""
        self.ok += record.ok
        self.output_tokens += record.output_tokens or 0
        if record.cached_tokens is not None:
            self.cached_tokens += record.cached_tokens
            self.prompt_tokens += record.prompt_tokens or 0
        if not record.ok:
            self.failed += 1
            self.errors[record.error] = self.errors.get(record.error, 0) + 1
        if record.ok and record.ttft_ms is not None:
            self.ttft_ms.append(record.ttft_ms)
            self.jct_ms.append(record.jct_ms)


@attrs.define
class Outcome:
    """How a run ended. Times are seconds since it began."""

    ended_s: float = 0.0
    last_due_s: float = 0.0
    interrupted: bool = False
    overflowed: int = 0
    """Number of sessions that were not played because too many were under way."""
    abandoned: int = 0
    """Number of requests not sent because their session failed, was not played, or ran out of time."""
    ticks_ms: list[float] = attrs.field(factory=list)
    """How late a sleeping task was woken, sampled throughout the run, in milliseconds."""


class Player:
    """Plays one workload once. ``sink`` gets each record as its request ends."""

    def __init__(
        self,
        workload: Workload,
        arrivals: Arrivals,
        manner: Manner,
        client: Client,
        filler: Filler,
        sink: Callable[[Record], None],
    ) -> None:
        self.workload = workload
        self.arrivals = arrivals
        self.manner = manner
        self.client = client
        self.filler = filler
        self.sink = sink
        self.progress = Progress(workload.requests)
        self.outcome = Outcome()
        self._scope = trio.CancelScope()
        self._began = 0.0
        self._under_way = 0

    def stop(self) -> None:
        """End the run now; requests in flight are recorded as unfinished."""
        self.outcome.interrupted = True
        self._scope.cancel()

    async def play(self) -> Outcome:
        """Play to the end, or until duration and drain time have passed."""
        self._began = self.progress.began_s = trio.current_time()
        with self._scope:
            async with trio.open_nursery() as helpers:
                helpers.start_soon(self._tick)
                helpers.start_soon(self._limit)
                async with trio.open_nursery() as sessions:
                    if self.arrivals.kind == "closed":
                        self._closed_loop(sessions)
                    else:
                        await self._open_loop(sessions)
                helpers.cancel_scope.cancel()
        self.outcome.ended_s = self._now()
        return self.outcome

    def _now(self) -> float:
        return trio.current_time() - self._began

    async def _tick(self) -> None:
        wanted = trio.current_time()
        while True:
            # At fixed times: after a stop of half a second, all ticks that fell into it are counted, and not one.
            wanted += TICK_S
            await trio.sleep_until(wanted)
            self.outcome.ticks_ms.append((trio.current_time() - wanted) * 1e3)

    async def _limit(self) -> None:
        if self.manner.duration_s is not None:
            await trio.sleep_until(self._began + self.manner.duration_s + self.manner.drain_s)
            self._scope.cancel()

    def _out_of_time(self, due_s: float) -> bool:
        return self.manner.duration_s is not None and due_s >= self.manner.duration_s

    async def _open_loop(self, nursery: trio.Nursery) -> None:
        moments = times(self.arrivals, self.workload.sessions)
        for session, at_s in zip(self.workload.sessions, moments, strict=True):
            if self._out_of_time(at_s):
                return
            await trio.sleep_until(self._began + at_s)
            if self._under_way >= self.manner.in_flight_max:
                self.outcome.overflowed += 1
                self.outcome.abandoned += len(session.turns)
                continue
            self._under_way += 1
            nursery.start_soon(self._session, session, at_s)

    def _closed_loop(self, nursery: trio.Nursery) -> None:
        waiting = iter(self.workload.sessions)
        for _ in range(self.arrivals.clients):
            nursery.start_soon(self._client, waiting)

    async def _client(self, waiting: Iterator[Session]) -> None:
        for session in waiting:
            if self._out_of_time(self._now()):
                return
            self._under_way += 1
            await self._session(session, self._now())

    async def _session(self, session: Session, at_s: float) -> None:
        conversation = Conversation(session, self.manner.style, self.filler)
        due_s = at_s
        try:
            for number, turn in enumerate(session.turns):
                if number:
                    due_s = self._now() + turn.think_s
                    await trio.sleep_until(self._began + due_s)
                if self._out_of_time(due_s) or not await self._turn(conversation, number, turn, due_s):
                    sent = number + (not self._out_of_time(due_s))
                    self.outcome.abandoned += len(session.turns) - sent
                    return
        finally:
            self._under_way -= 1

    async def _turn(self, conversation: Conversation, number: int, turn: Turn, due_s: float) -> bool:
        """Send one request; whether the session can continue."""
        prompt = conversation.prompt(turn)
        # Built before the time of sending is taken: the time that it takes is the generator's lag.
        body, prompt_digest = self._body(prompt, turn), digest(prompt)
        session = conversation.session
        record = Record(
            session.id, number, session.tenant, due_s, self._now(), turn.output_tokens, prompt_digest
        )
        self.outcome.last_due_s = max(self.outcome.last_due_s, due_s)
        answer = Answer()
        self.progress.sent += 1
        self.progress.in_flight += 1
        self.progress.lag_max_s = max(self.progress.lag_max_s, record.lag_s)
        try:
            await self._ask(record, answer, body)
        except trio.Cancelled:
            record.error, record.detail = "unfinished", "the run ended before the answer did"
            raise
        finally:
            self.progress.in_flight -= 1
            self._complete(record, answer)
        conversation.answered(turn, Own(answer.text, tuple(answer.ids) if answer.ids is not None else None))
        return record.ok

    def _body(self, prompt: dict[str, Any], turn: Turn) -> bytes:
        manner = self.manner
        body = {"model": manner.model, "max_tokens": turn.output_tokens, "stream": True}
        return orjson.dumps(body | {"stream_options": {"include_usage": True}} | manner.body | prompt)

    async def _ask(self, record: Record, answer: Answer, body: bytes) -> None:
        """Fill in the answer, and the record's error if the request fails."""
        progress = self.progress

        def on_event(name: str, data: bytes, now: float) -> None:
            progress.events += answer.receive(name, data, now)

        key = self.manner.tenant_keys.get(record.tenant) or self.manner.api_key
        headers = [("Authorization", f"Bearer {key}")] if key else []
        path = PATHS[self.manner.style.endpoint]
        with trio.move_on_after(self.manner.timeout_s) as limit:
            try:
                exchange = await self.client.post(path, body, on_event, headers)
                record.request_id = exchange.headers.get("x-request-id", "")
                record.error, record.detail = _verdict(exchange, answer)
            except IncompleteError as error:
                record.error, record.detail = answer.error or "incomplete", answer.detail or str(error)
            except WireError as error:
                record.error, record.detail = "protocol", str(error)
            except (OSError, trio.BrokenResourceError) as error:
                record.error, record.detail = "connection", reason(error)
        if limit.cancelled_caught:
            record.error, record.detail = "timeout", f"no whole answer within {self.manner.timeout_s:g} s"

    def _complete(self, record: Record, answer: Answer) -> None:
        record.end_s = self._now()
        sent = record.sent_s + self._began
        record.event_ms = [round((at - sent) * 1e3, 3) for at in answer.event_s]
        record.first_tokens = answer.first_tokens
        record.prompt_tokens = answer.tokens("prompt_tokens")
        record.cached_tokens = answer.cached_tokens
        record.output_tokens = answer.output_tokens
        record.finish_reason = answer.finish_reason
        record.answer_digest = answer.digest
        if self.manner.keep_answers:
            record.answer, record.token_ids = answer.text, answer.ids
        self.progress.ended(record)
        self.sink(record)


def _verdict(exchange: Exchange, answer: Answer) -> tuple[str, str]:
    """The error and its detail; both empty for a complete answer."""
    if exchange.status != 200:
        return f"http {exchange.status}", _said(bytes(exchange.body))
    if answer.error:
        return answer.error, answer.detail
    if exchange.body:
        return "not a stream", _said(bytes(exchange.body))
    # Some servers (transformers) send no [DONE]: a body that ended and gave a finish_reason is complete.
    if not answer.done and not answer.finish_reason:
        return "incomplete", "the stream ended without [DONE] and without a finish_reason"
    return "", ""


def _said(body: bytes) -> str:
    try:
        return error_text(orjson.loads(body))[:300]
    except orjson.JSONDecodeError:
        return body[:300].decode(errors="replace")
