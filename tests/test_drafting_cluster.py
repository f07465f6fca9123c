"""Drafts across a cluster in virtual time: the tokens of an undisturbed run without drafts, whichever worker dies."""

from __future__ import annotations

import hashlib
import random

import attrs
import pytest
import trio
from trio.testing import MockClock

from cluster_scenarios import a_worker_dies_under_load, all_are_served, chats_while_workers_die
from memory_cluster import PAGE_TOKENS, MemoryCluster, PageEngine, baseline, generate, memory_cluster
from memserve.engine.plans import BatchPlan, BatchResult, Row
from memserve.tokens import pack, unpack
from test_cluster import prompt

PD2 = (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode"))
ON_TWO_SHARDS = (("p0", "prefill", "s0"), ("d0", "decode", "s1"))
BOTH = (("w0", "both"),)


def next_token(tokens: list[int], seed: int) -> int:
    """The next token of a model that mostly repeats itself, and sometimes depends on all of ``tokens``."""
    digest = hashlib.sha256(pack(tokens) + bytes([seed])).digest()
    if digest[0] % 4 == 0:
        return 10 + int.from_bytes(digest[1:5], "little") % 49_000
    return 2 + hashlib.sha256(pack(tokens[-1:])).digest()[0] % 5


def reference(prompt: list[int], max_tokens: int, seed: int = 0) -> list[int]:
    """The tokens of an undisturbed run without drafts."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


def result_of(drawn: list[list[int]]) -> BatchResult:
    """The result of a step whose rows drew these tokens."""
    more = {i: pack(one[1:]) for i, one in enumerate(drawn) if len(one) > 1}
    return BatchResult(tuple(one[0] if one else None for one in drawn), 1.0, 1, more=more)


class DraftingEngine(PageEngine):
    """Runs drafts as engines with a model do: all draft tokens are written, and wrong ones stay in the pages."""

    def run(self, plan: BatchPlan) -> BatchResult:
        return result_of([self.drawn(row) for row in plan.rows])

    def drawn(self, row: Row) -> list[int]:
        whole = attrs.evolve(row, tokens=row.tokens + row.draft)
        held = self.write(whole)
        if held is None:
            return []
        drawn = [next_token(held[: row.end], row.sample.seed)]
        for at, guessed in enumerate(unpack(row.draft)):
            if drawn[-1] != guessed:
                break
            drawn.append(next_token(held[: row.end + at + 1], row.sample.seed))
        return drawn


@attrs.define(eq=False)
class DraftingCluster(MemoryCluster):
    """A cluster whose workers have such engines."""

    draft: int = 5

    def make_engine(self, arena):
        return DraftingEngine(arena)

    def accepted(self) -> float:
        """Draft tokens accepted by all workers that live."""
        return self._total("accepted_tokens_total")

    def steps(self) -> float:
        """Steps of all workers that live."""
        return self._total("steps_total")

    def _total(self, counter: str) -> float:
        return sum(one.core.gauges().get(counter, 0.0) for one in self.actors.values())


@pytest.mark.parametrize("workers", [PD2, ON_TWO_SHARDS, BOTH])
@pytest.mark.parametrize("chunk_tokens", [3, 1000])
async def test_drafts_change_no_token(autojump_clock: MockClock, workers, chunk_tokens) -> None:
    """Answers with drafts have the tokens of a run without, in every layout and chunk size."""
    async with memory_cluster(*workers, kind=DraftingCluster, chunk_tokens=chunk_tokens) as (
        cluster,
        frontend,
    ):
        for length, new in [(1, 90), (4, 1), (17, 130), (60, 5), (16, 64), (3, 2)]:
            tokens = prompt(length, length)
            assert await generate(frontend, tokens, new) == reference(tokens, new)
        assert cluster.accepted() > 50
        await baseline(cluster)


async def test_steps_are_fewer_with_drafts(autojump_clock: MockClock) -> None:
    """Drafts reduce the number of steps."""
    steps = {}
    for draft in (0, 5):
        async with memory_cluster(*BOTH, kind=DraftingCluster, draft=draft) as (cluster, frontend):
            await generate(frontend, prompt(1, 10), 150)
            steps[draft] = cluster.actors["w0"].core.gauges()["steps_total"]
    assert steps[0] == 150
    assert steps[5] < 110


async def test_the_next_turn_finds_an_answer_of_drafts(autojump_clock: MockClock) -> None:
    """An answer that was generated with drafts is cached with the right tokens."""
    async with memory_cluster(*BOTH, kind=DraftingCluster) as (cluster, frontend):
        first = prompt(2, 21)
        second = first + await generate(frontend, first, 101) + prompt(3, 9)
        before = cluster.actors["w0"].core.gauges()["cached_tokens_total"]
        assert await generate(frontend, second, 20) == reference(second, 20)
        found = cluster.actors["w0"].core.gauges()["cached_tokens_total"] - before
        assert found == (21 + 100) // PAGE_TOKENS * PAGE_TOKENS
        await baseline(cluster)


@pytest.mark.parametrize("workers", [PD2, ON_TWO_SHARDS, BOTH])
async def test_the_same_again_is_answered_in_fewer_steps(autojump_clock: MockClock, workers) -> None:
    """The same request again is drafted from the cached answer, and another seed still gets its own tokens."""
    async with memory_cluster(*workers, kind=DraftingCluster) as (cluster, frontend):
        for length in (9, 12, 47):
            tokens = prompt(length, length)
            first = await generate(frontend, tokens, 90)
            await trio.sleep(1)
            before, taken = cluster.accepted(), cluster.steps()
            assert await generate(frontend, tokens, 90) == first == reference(tokens, 90)
            assert cluster.accepted() - before > 45
            assert cluster.steps() - taken < 45
            assert await generate(frontend, tokens, 30, seed=1) == reference(tokens, 30, seed=1)
        await baseline(cluster)


@pytest.mark.parametrize("workers", [PD2, BOTH])
async def test_a_pool_too_small_for_all_serves_all(autojump_clock: MockClock, workers) -> None:
    """In a pool that is too small for all, requests with drafts are preempted and finish with the right tokens."""
    async with memory_cluster(*workers, kind=DraftingCluster, pages=40) as (cluster, frontend):
        await all_are_served(cluster, frontend, [prompt(i, 20) for i in range(12)], reference)


@pytest.mark.parametrize("victim", ["p0", "d0", "d1"])
@pytest.mark.parametrize("after", [0.02, 0.06, 0.15, 0.3])
async def test_killing_a_worker_costs_no_token(autojump_clock: MockClock, victim, after) -> None:
    """A worker that is killed while drafts run costs no token."""
    async with memory_cluster(*PD2, kind=DraftingCluster) as (cluster, frontend):
        prompts = [prompt(i, 40) for i in range(8)]
        await a_worker_dies_under_load(cluster, frontend, victim, after, prompts, 60, reference)


@pytest.mark.parametrize("seed", range(6))
async def test_random_clients_and_kills(autojump_clock: MockClock, seed: int) -> None:
    """Random clients that continue answers or leave, a small pool, and workers that die and return: all tokens right."""
    rng = random.Random(seed)
    settings = {"pages": rng.choice([90, 400]), "rows": rng.choice([3, 8]), "draft": rng.choice([1, 3, 7])}
    async with memory_cluster(*PD2, kind=DraftingCluster, **settings) as (cluster, frontend):
        prompts = [prompt(1000 + i, 30) for i in range(3)]
        await chats_while_workers_die(cluster, frontend, dict(PD2), prompts, reference, rng)
        await baseline(cluster)
