"""The Frontend: HTTP on one side, the cluster on the other, and the journal between them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import attrs
import structlog
import trio
from starlette.types import ASGIApp

from memserve import observe
from memserve.actions import Deliver
from memserve.actors.loop import Shell
from memserve.actors.membership import introduce, pass_on_deaths
from memserve.api.app import build_app
from memserve.api.server import serve_http
from memserve.api.service import ApiSettings, Chunk, GenerationParams, Take
from memserve.bus import open_link
from memserve.drawing import Logprobs, PromptLogprobs
from memserve.engine.tokenizer import Tokenizer
from memserve.errors import RequestFailed
from memserve.identity import actor_name
from memserve.journal import FrontendCore
from memserve.messages import Change, Member, Request
from memserve.presence import Reporting
from memserve.processes.actor import ActorContext
from memserve.scheduling.changes import find_worker
from memserve.scheduling.view import Health
from memserve.tokens import count

log = structlog.get_logger()

CHANGE_S = 10.0
"""How long a worker may take to make the change that an operator ordered."""
CHANGE_REPEAT_S = 1.0
"""Interval at which the order is repeated, since the message may have been lost."""


@attrs.define(eq=False)
class ClientStream:
    """Tokens that have arrived for one client and are not passed on yet.

    Bounded by the request's max_tokens.
    """

    id: str
    opened_at: float
    outcome: str = "cancelled"
    """The outcome of the request if the client's handler leaves now."""
    begun: bool = False
    """Whether the first token has come."""
    _tokens: list[int] = attrs.field(factory=list, init=False)
    _logprobs: list[Logprobs] = attrs.field(factory=list, init=False)
    _prompt: list[PromptLogprobs] = attrs.field(factory=list, init=False)
    _cached_tokens: int = attrs.field(default=0, init=False)
    _finish: str | None = attrs.field(default=None, init=False)
    _failure: Exception | None = attrs.field(default=None, init=False)
    _take: Take | None = attrs.field(default=None, init=False)
    _ended: trio.Event = attrs.field(factory=trio.Event, init=False)

    def put(self, delivery: Deliver) -> None:
        """Add a delivery. The shell calls this; :meth:`pass_on` follows in the same turn."""
        self._tokens += delivery.tokens
        self._logprobs += delivery.logprobs
        self._prompt += delivery.prompt
        self._cached_tokens = delivery.cached_tokens
        self._finish = delivery.finish
        self._failure = delivery.failure

    def pass_on(self) -> None:
        """Pass on everything gathered in this turn as one chunk."""
        if self._take is None or self._ended.is_set():
            return
        if self._failure is None and (self._tokens or self._finish):
            logprobs, prompt = tuple(self._logprobs), tuple(self._prompt)
            chunk = Chunk(tuple(self._tokens), self._finish, self._cached_tokens, logprobs, prompt)
            self._tokens.clear()
            self._logprobs.clear()
            self._prompt.clear()
            try:
                if not self._take(chunk):
                    self.outcome = "stop"
                    self._ended.set()
            except Exception as error:  # one client's error must not end the turn, which serves all clients
                self._failure = error
        if self._failure or self._finish:
            self._ended.set()

    async def listen(self, take: Take) -> None:
        """See :class:`memserve.api.service.Stream`."""
        self._take = take
        self.pass_on()
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure


@attrs.define(eq=False)
class FrontendService:
    """The :class:`memserve.api.service.Service` that the HTTP surface calls, on top of the journal."""

    core: FrontendCore
    shell: Shell
    down: Mapping[str, str] = attrs.field(factory=dict)
    """Why each actor that is down is down, by name; kept up to date by the supervisor's events."""
    ttft_s: observe.Histogram = attrs.field(factory=observe.Histogram, init=False)
    _streams: dict[str, ClientStream] = attrs.field(factory=dict, init=False)
    _updated: dict[str, ClientStream] = attrs.field(factory=dict, init=False)
    """The streams that got something in this turn."""

    def __attrs_post_init__(self) -> None:
        self.shell.perform[Deliver] = self.deliver
        self.shell.after_turn = self.pass_on

    @asynccontextmanager
    async def open(self, prompt: bytes, params: GenerationParams, scope: str) -> AsyncIterator[ClientStream]:
        """Submit a request; leaving the context before the stream has ended cancels it."""
        request = Request(
            id=f"req-{secrets.token_hex(8)}",
            attempt=0,
            frontend=self.shell.link.actor,
            scope=scope,
            tokens=prompt,
            prompt_tokens=count(prompt),
            max_tokens=params.max_tokens,
            stop_tokens=params.stop_tokens,
            sampling=params.sampling,
            priority=params.priority,
            ttft_s=params.ttft_s,
        )
        stream = self._streams[request.id] = ClientStream(request.id, self.shell.clock())
        try:
            self.core.open(request, self.shell.clock())
            self.shell.turn()
            yield stream
        finally:
            del self._streams[request.id]
            self.core.close(request.id, stream.outcome, self.shell.clock())
            self.shell.turn()

    def deliver(self, delivery: Deliver) -> None:
        """Add a delivery to its stream, if the client's handler is still there."""
        stream = self._streams.get(delivery.request)
        if stream is None:
            return
        if delivery.tokens and not stream.begun:
            stream.begun = True
            self.ttft_s.observe(self.shell.clock() - stream.opened_at)
        stream.put(delivery)
        self._updated[stream.id] = stream

    def pass_on(self) -> None:
        """Pass one chunk to each handler, however many steps' tokens came in this turn."""
        updated, self._updated = self._updated, {}
        for stream in updated.values():
            stream.pass_on()

    def health(self) -> Health:
        """Whether a request sent now could be served."""
        return self.core.health(self.shell.clock(), self.down)

    def cluster(self) -> list[Member]:
        """Every known actor."""
        return self.core.members(self.shell.clock())

    async def change(self, worker: str, change: Change) -> None:
        """Order a change of a worker, and wait until the scheduler's view shows it.

        Raises RequestFailed when it does not within CHANGE_S.
        """
        find_worker(worker, change, self.core.members(self.shell.clock()))
        with trio.move_on_after(CHANGE_S):
            while not self._obeyed(worker, change):
                self.core.order(worker, change, self.shell.clock())
                self.shell.turn()
                with trio.move_on_after(CHANGE_REPEAT_S):
                    await self._seen(worker, change)
            return
        text = f"{worker} did not change within {CHANGE_S:g} s; `memserve status` shows whether it does later"
        raise RequestFailed("change_unconfirmed", text, 504)

    def _obeyed(self, worker: str, change: Change) -> bool:
        return self.core.obeyed(worker, change, self.shell.clock())

    async def _seen(self, worker: str, change: Change) -> None:
        while not self._obeyed(worker, change):
            await self.shell.turned.wait()

    def metrics(self) -> bytes:
        """The whole cluster's metrics."""
        who = {"actor": actor_name(self.shell.link.actor), "kind": "Frontend"}
        return observe.render_metrics(
            self.core.members(self.shell.clock()), {"vllm:time_to_first_token_seconds": self.ttft_s}, who
        )


async def main(context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve HTTP until drained.

    From then on new requests are refused; open ones may finish within frontend.drain_s.
    """
    config = context.resolved.config.frontend
    async with open_link(context.id, context.inbox, context.keys) as link:
        core = FrontendCore(introduce(context, link), config.max_requests)
        shell = Shell(Reporting(core, core.presence), link)
        service = FrontendService(core, shell, context.lifeline.down)
        async with trio.open_nursery() as nursery:
            await nursery.start(shell.run)
            nursery.start_soon(pass_on_deaths, context, shell)
            app = await trio.to_thread.run_sync(make_app, context, service)
            http = Http(app, context)
            port = await nursery.start(http.serve)
            log.info("http listening", host=config.host, port=port)
            core.presence.become("ready")
            shell.turn()
            task_status.started()
            nursery.start_soon(announce_serving, context, service, f"http://{url_host(config.host)}:{port}")
            await context.lifeline.drain.wait()
            core.presence.become("draining")
            shell.turn()
            await http.ended.wait()
            nursery.cancel_scope.cancel()


@attrs.define(eq=False)
class Http:
    """The listening server.

    When drained, it accepts no new connection; open ones may finish within frontend.drain_s.
    """

    app: ASGIApp
    context: ActorContext
    ended: trio.Event = attrs.field(factory=trio.Event, init=False)
    """Set when the last answer has been sent, not only generated."""

    async def serve(self, *, task_status: trio.TaskStatus[int]) -> None:
        """Serve until drained; reports the port through ``task_status``."""
        config = self.context.resolved.config.frontend
        await serve_http(
            self.app,
            config.host,
            config.port,
            shutdown=self.context.lifeline.drain,
            reuse_port=config.count > 1,
            graceful_s=config.drain_s,
            task_status=task_status,
        )
        self.ended.set()


def make_app(context: ActorContext, service: FrontendService) -> ASGIApp:
    """The HTTP surface with the tokenizer loaded. Blocks while loading, so it must run off the event loop."""
    resolved = context.resolved
    tokenizer = Tokenizer.load(context.model_files().tokenizer)
    model, frontend = resolved.config.model, resolved.config.frontend
    settings = ApiSettings(
        model=resolved.spec.name,
        max_context=resolved.max_context,
        api_keys=frontend.api_keys,
        admin_keys=frontend.admin_keys,
        priority_keys=frontend.priority_keys,
        cors_origins=frontend.cors_origins,
        ttft_ms=frontend.ttft_ms,
        tool_format=model.tool_format,
        reasoning=model.reasoning,
    )
    return build_app(service, tokenizer, resolved.spec, settings)


def url_host(host: str) -> str:
    """The host as a client on this machine writes it in a URL."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


async def announce_serving(context: ActorContext, service: FrontendService, url: str) -> None:
    """Tell the supervisor the URL once /health is true."""
    while not service.health().serves:
        await service.shell.turned.wait()
    context.lifeline.serving(url)
