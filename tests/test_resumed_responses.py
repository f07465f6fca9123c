"""Events of a response go on when the worker that writes it is killed: without a gap, and each once."""

from __future__ import annotations

import json

import httpx
from trio.testing import MockClock

import memory_cluster as in_memory
from api_client import CHAT
from fake_service import demo_spec, demo_tokenizer, settings, sse
from memory_cluster import baseline, memory_cluster
from memserve.api.app import build_app
from test_cluster import PD2
from test_responses import RESPONSES, put_together
from test_resumed_calls import ASKED, CONTEXT, TOOL, GuidedCluster
from test_tools import joined

FORCED = {name: value for name, value in ASKED.items() if name not in ("messages", "tools")}
BODY = {"input": "Note it", "tools": [{"type": "function", **TOOL["function"]}], **FORCED}


async def streamed(path: str, body: dict, kill_at: int = 0):
    """The events that a client gets, how many tokens were drawn, and how often the request was begun again; its decode
    worker is killed at token ``kill_at``."""
    async with memory_cluster(*PD2, kind=GuidedCluster, pages=2000) as (cluster, frontend):
        seen: set[int] = set()

        async def killing(name: str) -> None:
            cluster.kill(name)

        def on_token(number: int) -> None:
            if number == kill_at > 0 and number not in seen:
                (entry,) = frontend.core._entries.values()
                cluster.nursery.start_soon(killing, entry.plan.decode.rpartition(".")[0])
            seen.add(number)

        cluster.on_token = on_token
        app = build_app(frontend, demo_tokenizer(), demo_spec(), settings(max_context=CONTEXT))
        # Without a limit in virtual time, which passes while a thread checks the tool's grammar.
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        await baseline(cluster)
        return list(sse(answer.text)), len(seen), frontend.core.counters.get("resubmissions_total", 0)


async def test_a_response_goes_on_when_its_worker_is_killed(autojump_clock: MockClock, monkeypatch) -> None:
    """Killed anywhere in a call, the stream has numbered events without a gap, and the call that a chat has."""
    monkeypatch.setattr(in_memory, "MAX_CONTEXT", CONTEXT)
    (*chunks, _done), tokens, _ = await streamed(CHAT, ASKED)
    _, ((_, *known),), _ = joined([json.loads(chunk)["choices"][0] for chunk in chunks])
    for at in (0, 2, tokens // 2, tokens - 3):
        found, _, resubmitted = await streamed(RESPONSES, BODY, at)
        events = [json.loads(event) for event in found]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        (call,) = put_together(events)
        assert events[-1]["type"] == "response.completed" and events[-1]["response"]["output"] == [call]
        assert [call["name"], call["arguments"]] == known
        assert resubmitted == int(at > 0)
