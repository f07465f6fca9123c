"""Waiting requests as clients of a whole cluster see them: through HTTP, with real cores and shells, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import trio
from trio.testing import MockClock

from fake_service import demo_spec, demo_tokenizer, settings
from memory_cluster import MemoryCluster, memory_cluster, reference
from memserve.api.app import build_app

ONE = (("w0", "both"),)
PROMPT_TOKENS = 60
"""About a tenth of a second of work for a worker without measured costs."""


def prompt(salt: int) -> list[int]:
    """A prompt that shares no prefix with others."""
    return [salt + 10, *range(100, 99 + PROMPT_TOKENS)]


@asynccontextmanager
async def serving(**changes) -> AsyncIterator[tuple[MemoryCluster, httpx.AsyncClient]]:
    """A cluster of one worker with little room, and an HTTP client."""
    async with memory_cluster(*ONE, rows=2, hold_back_s=0.05, **changes) as (cluster, frontend):
        app = build_app(
            frontend, demo_tokenizer(), demo_spec(), settings(max_context=190, api_keys=("k1", "k2"))
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
            yield cluster, client


async def ask(
    client: httpx.AsyncClient, salt: int, key: str = "k1", *, ttft_ms: float | None = None, **body
) -> httpx.Response:
    """One completion of six tokens."""
    headers = {"authorization": f"Bearer {key}"} | (
        {} if ttft_ms is None else {"x-slo-ttft-ms": f"{ttft_ms}"}
    )
    body = {
        "prompt": prompt(salt),
        "max_tokens": 6,
        "temperature": 0,
        "seed": 0,
        "return_token_ids": True,
    } | body
    return await client.post("/v1/completions", json=body, headers=headers)


def whole(answer: httpx.Response, salt: int) -> bool:
    """Whether an answer has all of its tokens."""
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"] == reference(prompt(salt), 6)


async def flood(
    client: httpx.AsyncClient, nursery: trio.Nursery, salts: range, answers: dict[int, httpx.Response]
) -> None:
    """Ask all of it at once as one tenant; the answers arrive later."""

    async def one(salt: int) -> None:
        answers[salt] = await ask(client, salt)

    for salt in salts:
        nursery.start_soon(one, salt)
    await trio.sleep(0.05)


async def test_a_flood_is_refused_in_part_and_holds_up_nobody_else(autojump_clock: MockClock) -> None:
    """A key that sends too much is refused in part, and requests of another key are served soon."""
    async with serving(held_max=16) as (cluster, client), trio.open_nursery() as nursery:
        answers: dict[int, httpx.Response] = {}
        await flood(client, nursery, range(30), answers)
        refused = [one for one in answers.values() if one.status_code != 200]
        assert 15 <= len(refused) <= 22
        for one in refused:
            assert (one.status_code, one.json()["error"]["code"]) == (429, "tenant_full")
            assert int(one.headers["retry-after"]) >= 1
        assert whole(await ask(client, 100, "k2"), 100)
        later = 30 - len(answers)
        assert later >= 4, "the other key waited behind them"
        with trio.fail_after(60):
            while len(answers) < 30:
                await trio.sleep(0.05)
        assert all(whole(one, salt) for salt, one in answers.items() if one.status_code == 200)
        cluster.check()


async def test_deadlines_and_priorities_through_http(autojump_clock: MockClock) -> None:
    """Deadlines and priorities given through HTTP take effect."""
    async with serving() as (_, client), trio.open_nursery() as nursery:
        assert whole(await ask(client, 200, ttft_ms=5000), 200)
        answers: dict[int, httpx.Response] = {}
        await flood(client, nursery, range(12), answers)
        late = await ask(client, 201, ttft_ms=50)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "deadline_unreachable")
        assert int(late.headers["retry-after"]) >= 1
        assert whole(await ask(client, 202, priority=-1), 202)
        assert len(answers) <= 6, "it waited behind others of its key"


async def test_a_scheduler_that_dies_loses_nothing_that_waits(autojump_clock: MockClock) -> None:
    """When the scheduler dies, its successor gets every waiting request again and refuses none."""
    async with serving(held_max=32) as (cluster, client), trio.open_nursery() as nursery:
        answers: dict[int, httpx.Response] = {}
        await flood(client, nursery, range(14), answers)
        assert cluster.actors["scheduler-0"].core.gauges()["requests_held"] > 6
        cluster.kill("scheduler-0")
        await trio.sleep(2.0)
        cluster.held_max = 2
        successor = await cluster.scheduler()
        for actor in cluster.actors.values():  # its address is well known
            if actor is not successor:
                actor.shell.link.connect("scheduler-0.seed", successor.shell.link.endpoint)
        with trio.fail_after(120):
            while len(answers) < 14:
                await trio.sleep(0.1)
        assert all(whole(one, salt) for salt, one in answers.items())
        cluster.check()


async def test_a_worker_that_dies_has_its_requests_continued_before_all_that_wait(
    autojump_clock: MockClock,
) -> None:
    """When the worker dies, its requests continue before those that wait, and /health says what is missing."""
    async with serving(held_max=16) as (cluster, client), trio.open_nursery() as nursery:
        answers: dict[int, httpx.Response] = {}
        await flood(client, nursery, range(20), answers)
        begun = await (await client.get("/metrics")).aread()
        assert b"memserve_requests_held" in begun
        cluster.kill("w0")
        await trio.sleep(1.0)
        unwell = await client.get("/health")
        assert (unwell.status_code, unwell.json()["status"]) == (503, "unavailable")
        assert "no prefill and no decode worker is ready" in unwell.json()["reason"]
        await cluster.worker("w0", "both")
        with trio.fail_after(120):
            while len(answers) < 20:
                await trio.sleep(0.1)
        served = {salt: one for salt, one in answers.items() if one.status_code == 200}
        assert len(served) >= 8
        assert all(whole(one, salt) for salt, one in served.items())
        assert {one.status_code for one in answers.values()} == {200, 429}
        assert (await client.get("/health")).json() == {"status": "ok"}
