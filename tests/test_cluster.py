"""The whole protocol in virtual time: right tokens, no request lost and no page leaked, whichever actor dies."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from cluster_scenarios import a_worker_dies_under_load, all_are_served, die_and_return
from memory_cluster import baseline, generate, memory_cluster, reference
from memserve.api.service import GenerationParams
from memserve.drawing import Sampling
from memserve.errors import RequestFailed
from memserve.scheduling.view import Health
from memserve.tokens import pack

PD = (("p0", "prefill"), ("d0", "decode"))
PD2 = (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode"))
BOTH = (("w0", "both"),)


def prompt(seed: int, length: int) -> list[int]:
    """Random tokens that depend on the seed alone."""
    rng = random.Random(seed)
    return [rng.randrange(2, 50_000) for _ in range(length)]


@pytest.mark.parametrize("workers", [PD, PD2, BOTH])
@pytest.mark.parametrize("chunk_tokens", [3, 16, 1000])
async def test_tokens_are_those_of_an_undisturbed_run(
    autojump_clock: MockClock, workers, chunk_tokens
) -> None:
    """Tokens do not depend on the layout or the chunk size, and no page stays leased."""
    async with memory_cluster(*workers, chunk_tokens=chunk_tokens) as (cluster, frontend):
        for length, new in [(1, 9), (4, 1), (17, 30), (60, 5), (16, 16)]:
            assert await generate(frontend, prompt(length, length), new) == reference(
                prompt(length, length), new
            )
        await baseline(cluster)


@pytest.mark.parametrize("workers", [PD, BOTH])
async def test_many_at_once_share_batches_and_prefixes(autojump_clock: MockClock, workers) -> None:
    """Requests that are batched together and share half of their prompt each get their own right tokens."""
    async with memory_cluster(*workers) as (cluster, frontend):
        common = prompt(0, 22)
        results: dict[int, list[int]] = {}

        async def one(i: int) -> None:
            await trio.sleep(i * 0.013)
            results[i] = await generate(frontend, common + prompt(i, i % 7), 5 + i, seed=i % 3)

        async with trio.open_nursery() as nursery:
            for i in range(16):
                nursery.start_soon(one, i)
        for i, tokens in results.items():
            assert tokens == reference(common + prompt(i, i % 7), 5 + i, seed=i % 3)
        await baseline(cluster)


@pytest.mark.parametrize("workers", [PD, BOTH])
async def test_a_burst_computes_what_it_shares_once(autojump_clock: MockClock, workers) -> None:
    """Of prompts that come at once and share a prefix, only the first computes it, although it is not in the index yet."""
    async with memory_cluster(*workers) as (cluster, frontend):
        common, results = prompt(0, 80), {}

        async def one(i: int) -> None:
            results[i] = await generate(frontend, common + prompt(i, 5 + i), 6)

        async with trio.open_nursery() as nursery:
            for i in range(6):
                nursery.start_soon(one, i)
        assert results == {i: reference(common + prompt(i, 5 + i), 6) for i in range(6)}
        computed = cluster.actors[workers[0][0]].core.gauges()["prefill_tokens_total"]
        assert computed == 80 + sum(5 + i for i in range(6))
        await baseline(cluster)


@pytest.mark.parametrize("after", [0.0, 0.004, 0.012, 0.025, 0.045, 0.07])
@pytest.mark.parametrize("workers", [PD, BOTH])
async def test_the_first_of_a_burst_may_leave(autojump_clock: MockClock, workers, after) -> None:
    """When the request that computes a shared prefix is cancelled, those that wait for its pages still finish."""
    async with memory_cluster(*workers) as (cluster, frontend):
        common, results = prompt(0, 80), {}

        async def first() -> None:
            with trio.move_on_after(after):
                await generate(frontend, common + prompt(9, 5), 6)

        async def one(i: int) -> None:
            await trio.sleep(0.001)
            results[i] = await generate(frontend, common + prompt(i, 5), 6)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            for i in range(3):
                nursery.start_soon(one, i)
        assert results == {i: reference(common + prompt(i, 5), 6) for i in range(3)}
        await baseline(cluster)


async def cached(frontend, tokens: list[int], new: int) -> int:
    """Run one request; returns how many of its prompt tokens were cached."""
    params = GenerationParams(Sampling(0.0), new, ())
    chunks = []
    async with frontend.open(pack(tokens), params, "") as stream:
        await stream.listen(lambda chunk: chunks.append(chunk) or True)
    return chunks[-1].cached_tokens


@pytest.mark.parametrize(("retire", "expected"), [("all", 48), ("prompt", 28), ("none", 0)])
async def test_a_second_turn_finds_prompt_and_answer(autojump_clock: MockClock, retire, expected) -> None:
    """The next turn of a chat finds as much of the last one cached as the caching mode keeps."""
    async with memory_cluster(*PD, retire=retire) as (cluster, frontend):
        first = prompt(1, 30)
        answer = await generate(frontend, first, 20)
        assert await cached(frontend, first + answer + prompt(2, 5), 3) == expected
        await baseline(cluster)


async def test_handing_over_copies_nothing(autojump_clock: MockClock) -> None:
    """A handoff on one shard moves the lease of the pages and copies no bytes."""
    async with memory_cluster(*PD) as (cluster, frontend):
        await generate(frontend, prompt(1, 30), 20)
        gauges = cluster.actors["s0"].core.gauges()
        assert gauges["handed_over_pages_total"] == 9  # 30 tokens in 8 pages, and one ahead
        assert gauges["handoff_bytes_copied_total"] == 0


@pytest.mark.parametrize("workers", [PD, BOTH, PD2])
async def test_a_pool_too_small_for_all_serves_all(autojump_clock: MockClock, workers) -> None:
    """When pages run out, requests queue and the youngest are preempted; all finish with the right tokens."""
    async with memory_cluster(*workers, pages=40) as (cluster, frontend):
        await all_are_served(cluster, frontend, [prompt(i, 20) for i in range(12)], reference)


@pytest.mark.parametrize("workers", [PD, BOTH, PD2])
async def test_what_left_the_arena_comes_back(autojump_clock: MockClock, workers) -> None:
    """Prompts whose pages went to host memory and disk, some of them damaged there, get the right tokens, partly from
    the cache."""
    async with memory_cluster(*workers, pages=60, host_pages=30, disk_pages=200) as (cluster, frontend):
        for order in (1, -1, 1):  # backwards finds the latest in host memory, forwards the oldest on disk
            results: dict[int, list[int]] = {}

            async def one(i: int, results: dict[int, list[int]], order: int) -> None:
                await trio.sleep(i * order % 12 * 0.05)
                results[i] = await generate(frontend, prompt(i, 60), 10)

            async with trio.open_nursery() as nursery:
                for i in range(12):
                    nursery.start_soon(one, i, results, order)
            assert results == {i: reference(prompt(i, 60), 10) for i in range(12)}
        gauges = cluster.actors["s0"].core.gauges()
        assert gauges["matched_host_tokens_total"] > 0
        assert gauges["matched_disk_tokens_total"] > 0
        assert gauges["bad_pages_total"] > 0
        scheduler = cluster.actors["scheduler-0"].core
        assert scheduler.index.is_whole(cluster.actors["s0"].id)
        assert scheduler.index.events > 0
        await baseline(cluster)


async def test_a_request_larger_than_the_pool_is_refused(autojump_clock: MockClock) -> None:
    """A request that can never fit is refused with 400 instead of waiting for ever."""
    async with memory_cluster(*BOTH, pages=10) as (cluster, frontend):
        with pytest.raises(RequestFailed, match="too_large") as caught:
            await generate(frontend, prompt(1, 60), 5)
        assert caught.value.status == 400
        with pytest.raises(RequestFailed, match="too_large"):
            await generate(frontend, prompt(2, 30), 100)
        await baseline(cluster)


@pytest.mark.parametrize("after", [0.0, 0.005, 0.02, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("workers", [PD, BOTH])
async def test_a_client_that_leaves_frees_its_pages(autojump_clock: MockClock, after, workers) -> None:
    """A request that is cancelled at any phase is dropped within a step or two, its pages come free, and others go on."""
    async with memory_cluster(*workers) as (cluster, frontend):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, frontend, prompt(1, 60), 100)
            with trio.move_on_after(after):
                await generate(frontend, prompt(2, 60), 100)
            at = trio.current_time()
            await trio.sleep(0.03)  # a step under way, and one more
            held = sum(
                len(one._live) for one in (a.core for a in cluster.actors.values()) if hasattr(one, "_live")
            )
            assert held <= 1, f"still held {trio.current_time() - at} s after the client left"
        await baseline(cluster)


@pytest.mark.parametrize("victim", ["p0", "d0", "p1", "d1"])
@pytest.mark.parametrize("after", [0.001, 0.02, 0.04, 0.08, 0.3])
@pytest.mark.parametrize("announced", [True, False])
async def test_killing_a_worker_costs_no_token(autojump_clock: MockClock, victim, after, announced) -> None:
    """A worker killed at any phase: every stream has the tokens of an undisturbed run, none twice and none missing."""
    async with memory_cluster(*PD2, announce_deaths=announced) as (cluster, frontend):
        prompts = [prompt(i, 40) for i in range(8)]
        await a_worker_dies_under_load(cluster, frontend, victim, after, prompts, 30, reference)


@pytest.mark.parametrize("announced_by", ["scheduler", "shard"])
@pytest.mark.parametrize("after", [0.02, 0.1, 0.3])
async def test_a_paused_worker_writes_to_nobody_elses_pages(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, after, announced_by
) -> None:
    """A worker stopped in the middle of a step is killed before its pages are given to others, so it cannot write to
    them."""
    if announced_by == "shard":  # nobody declares it dead: its leases expire
        monkeypatch.setattr("memserve.scheduling.membership.DEAD_AFTER_S", 100.0)
    async with memory_cluster(("w0", "both"), ("w1", "both"), pages=40) as (cluster, frontend):
        results: dict[int, list[int]] = {}

        async def one(i: int) -> None:
            await trio.sleep(i * 0.7 if i > 3 else 0)
            results[i] = await generate(frontend, prompt(i, 30), 40)

        async with trio.open_nursery() as nursery:
            for i in range(30):
                nursery.start_soon(one, i)
            await trio.sleep(after)
            cluster.pause("w0")
        assert results == {i: reference(prompt(i, 30), 40) for i in range(30)}
        assert "w0" not in cluster.actors
        await baseline(cluster)


async def test_the_only_worker_dies_and_returns(autojump_clock: MockClock) -> None:
    """Requests wait for the restarted worker instead of failing, and /health says what is missing."""
    async with memory_cluster(*BOTH) as (cluster, frontend), trio.open_nursery() as nursery:
        results: list[list[int]] = []

        async def one() -> None:
            results.append(await generate(frontend, prompt(1, 40), 50))

        nursery.start_soon(one)
        await trio.sleep(0.2)
        cluster.kill("w0")
        await trio.sleep(0.1)
        assert frontend.health() == Health(
            "unavailable", "no prefill and no decode worker is ready; w0 is gone"
        )
        await trio.sleep(3)
        await cluster.worker("w0", "both")
        with trio.fail_after(20):
            while not results:
                await trio.sleep(0.1)
        assert results == [reference(prompt(1, 40), 50)]
        assert frontend.health() == Health("ok")
        await baseline(cluster)


async def test_a_scheduler_that_restarts_interrupts_no_stream(autojump_clock: MockClock) -> None:
    """Streams go on without a scheduler; a new one knows all members soon, and serves what was submitted meanwhile."""
    said: list[Health] = []
    async with memory_cluster(*PD) as (cluster, frontend), trio.open_nursery() as nursery:
        old = cluster.actors["scheduler-0"]
        results: dict[int, list[int]] = {}

        async def one(i: int) -> None:
            results[i] = await generate(frontend, prompt(i, 40), 40)

        nursery.start_soon(one, 1)
        await trio.sleep(0.1)
        cluster.kill("scheduler-0")
        nursery.start_soon(one, 2)  # submitted while there is none
        await trio.sleep(1)
        new = await cluster.scheduler()
        for actor in cluster.actors.values():  # the well-known address of real sockets
            actor.shell.link.connect(
                actor.shell.link.actor.__class__("scheduler-0.seed"), new.shell.link.endpoint
            )
        assert old.id != new.id
        with trio.fail_after(20):
            while len(results) < 2 or said[-1].status != "ok":
                said.append(frontend.health())
                await trio.sleep(0.02)
        assert {one.status for one in said} == {"degraded", "ok"}, (
            "what is held and served is not unavailable"
        )
        assert results == {i: reference(prompt(i, 40), 40) for i in (1, 2)}


async def test_the_dead_frontend_s_requests_are_dropped(autojump_clock: MockClock) -> None:
    """Workers drop the requests of a dead Frontend, and their pages come free."""
    async with memory_cluster(*PD) as (cluster, frontend):
        other = await cluster.frontend("frontend-1")
        await cluster.settled(other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, other, prompt(1, 60), 100)
            await trio.sleep(0.1)
            cluster.kill("frontend-1")
            await trio.sleep(0.2)
            assert cluster.actors["d0"].core.idle
            nursery.cancel_scope.cancel()
        await baseline(cluster)
        assert await generate(frontend, prompt(3, 9), 5) == reference(prompt(3, 9), 5)


async def test_a_full_frontend_refuses(autojump_clock: MockClock) -> None:
    """Beyond frontend.max_requests, a client gets status 429 with a retry time."""
    async with memory_cluster(*BOTH) as (_, frontend), trio.open_nursery() as nursery:
        for i in range(64):
            nursery.start_soon(generate, frontend, prompt(i, 5), 50)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(RequestFailed, match="overloaded") as caught:
            await generate(frontend, prompt(99, 5), 5)
        assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)


@pytest.mark.parametrize("seed", range(12))
async def test_random_clients_and_kills(autojump_clock: MockClock, seed: int) -> None:
    """Random clients that share prefixes or leave, a small pool, and workers that die and return: right tokens and no
    leak."""
    rng = random.Random(seed)
    tiers = {"host_pages": rng.choice([0, 30]), "disk_pages": rng.choice([0, 60])}
    async with memory_cluster(*PD2, pages=rng.choice([60, 400]), rows=rng.choice([3, 8]), **tiers) as (
        cluster,
        frontend,
    ):
        trunks = [prompt(1000 + i, 30) for i in range(3)]

        async def client(i: int) -> None:
            for turn in range(3):
                text = rng.choice(trunks)[: rng.randrange(1, 30)] + prompt(
                    i * 10 + turn, rng.randrange(1, 20)
                )
                new = rng.randrange(1, 40)
                with trio.move_on_after(rng.choice([0.05, 0.3, 1e4])) as patience:
                    got = await generate(frontend, text, new, seed=i % 3)
                if not patience.cancelled_caught:
                    assert got == reference(text, new, seed=i % 3)

        async with trio.open_nursery() as nursery:
            for i in range(10):
                nursery.start_soon(client, i)
            nursery.start_soon(die_and_return, cluster, dict(PD2), rng)
        await baseline(cluster)
