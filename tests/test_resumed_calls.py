"""Tool calls in every format go on when the worker that writes them is killed: the same call, made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import attrs
import httpx
import pytest
from trio.testing import MockClock

import memory_cluster as in_memory
from api_client import CHAT
from fake_service import demo_spec, demo_tokenizer, settings, sse
from memory_cluster import MemoryCluster, PageEngine, baseline, memory_cluster
from memserve.api.app import build_app
from memserve.api.call_formats import CALL_FORMATS
from memserve.engine.guide import Guide
from memserve.engine.plans import BatchPlan, BatchResult
from memserve.tokens import count, pack
from test_cluster import PD2
from test_grammars import made, tokens_of
from test_tools import joined

CONTEXT = 2000
GRAMMARS = made(demo_tokenizer())
TOOL = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "minLength": 20, "maxLength": 30},
                "marks": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 2, "maxItems": 3},
                "size": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["text", "marks", "size"],
        },
    },
}  # fmt: skip
ASKED = {
    "messages": [{"role": "user", "content": "Note it"}], "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False,
    "seed": 3, "stream": True,
}  # fmt: skip


@attrs.define(eq=False)
class GuidedCluster(MemoryCluster):
    """A cluster whose workers draw any token that the request's grammar allows, by all that their pages hold."""

    on_token: Callable[[int], None] = lambda number: None
    """Called in each step with the number of the answer's tokens before it."""

    def make_engine(self, arena):
        return GuidedEngine(arena, self)


@attrs.define
class GuidedEngine(PageEngine):
    """The engine of one of these workers."""

    cluster: GuidedCluster

    def run(self, plan: BatchPlan) -> BatchResult:
        guided = Guide(lambda: GRAMMARS).filled(plan)
        return BatchResult(tuple(self._drawn(row) for row in guided.rows), 1.0, 1)

    def _drawn(self, row) -> int | None:
        held = self.write(row)
        if held is None:
            return None
        self.cluster.on_token(count(row.past.output))
        allowed = tokens_of(row.past.allowed)
        return allowed[int.from_bytes(hashlib.sha256(pack(held)).digest()[:4]) % len(allowed)]


async def called(form: str, kill_at: int = 0):
    """What a client gets of a forced call, how many tokens were drawn for it, and how often it was begun again; its
    decode worker is killed at token ``kill_at``."""
    async with memory_cluster(*PD2, kind=GuidedCluster, pages=2000) as (cluster, frontend):
        seen: set[int] = set()

        def on_token(number: int) -> None:
            if number == kill_at and number not in seen:
                (entry,) = frontend.core._entries.values()
                cluster.nursery.start_soon(killing, entry.plan.decode.rpartition(".")[0])
            seen.add(number)

        async def killing(name: str) -> None:
            cluster.kill(name)

        cluster.on_token = on_token if kill_at else seen.add
        chosen = settings(max_context=CONTEXT, tool_format=form)
        transport = httpx.ASGITransport(build_app(frontend, demo_tokenizer(), demo_spec(), chosen))
        # Without a limit in virtual time, which passes while a thread checks the tool's grammar.
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post(CHAT, json=ASKED)
        *events, done = sse(answer.text)
        assert (answer.status_code, done) == (200, "[DONE]"), answer.text
        await baseline(cluster)
        text, ((_, *call),), finish = joined([json.loads(event)["choices"][0] for event in events])
        return (text, call, finish), len(seen), frontend.core.counters.get("resubmissions_total", 0)


@pytest.mark.parametrize("form", CALL_FORMATS)
async def test_a_call_goes_on_when_its_worker_is_killed(autojump_clock: MockClock, monkeypatch, form) -> None:
    """Killed anywhere in a call, in a text, in JSON or in a tag, the stream has the same call, once."""
    monkeypatch.setattr(in_memory, "MAX_CONTEXT", CONTEXT)
    known, tokens, _ = await called(form)
    (text, (name, arguments), finish) = known
    assert (text, name, finish) == ("", "note", "tool_calls")
    assert set(json.loads(arguments)) == {"text", "marks", "size"}
    for at in range(2, tokens - 2, max(1, tokens // 6)):
        found, _, resubmitted = await called(form, at)
        assert (found, resubmitted) == (known, 1)
