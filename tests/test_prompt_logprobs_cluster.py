"""Log probabilities of prompts across a cluster in virtual time: all of them, once and in order, whichever worker dies."""

from __future__ import annotations

import random
from array import array

import attrs
import pytest
import trio
from trio.testing import MockClock

from memory_cluster import (
    PAGE_TOKENS,
    MemoryCluster,
    PageEngine,
    baseline,
    generate,
    memory_cluster,
    reference,
)
from memserve.api.service import GenerationParams
from memserve.drawing import PromptLogprobs, Sampling
from memserve.engine.plans import BatchPlan, BatchResult, Row
from memserve.tokens import count, pack, unpack
from test_cluster import prompt

PD2 = (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode"))
ON_TWO_SHARDS = (("p0", "prefill", "s0"), ("d0", "decode", "s1"))
BOTH = (("w0", "both"),)
HOW = Sampling(0.0, prompt_logprobs=1)


def scored_after(before: list[int], token: int) -> tuple[float, int]:
    """The log probability and rank of a token in the make-believe model, which depend on every token before it."""
    rng = random.Random(pack([*before, token]))
    return -rng.random(), rng.randrange(1, 50_000)


def of_prompt(tokens: list[int]) -> list[tuple[float, int]]:
    """All scores that a prompt should get."""
    return [scored_after(tokens[:at], tokens[at]) for at in range(1, len(tokens))]


class ScoringEngine(PageEngine):
    """Scores tokens by those that its pages hold before them, as engines with a model do."""

    def run(self, plan: BatchPlan) -> BatchResult:
        result = super().run(plan)
        scores = {i: self.scores(row) for i, row in enumerate(plan.rows) if row.score is not None}
        return attrs.evolve(result, prompts=scores)

    def scores(self, row: Row) -> PromptLogprobs:
        held = [self.arena[row.pages[i // PAGE_TOKENS]][i % PAGE_TOKENS] for i in range(row.end)]
        lines = [
            scored_after(held[: row.start + i + 1], token)
            for i, token in enumerate(unpack(row.score.follows))
        ]
        values, ranks = zip(*lines, strict=True)
        packed = array("d", values).tobytes()
        return PromptLogprobs(packed, pack(ranks), pack(ranks), packed)


@attrs.define(eq=False)
class ScoringCluster(MemoryCluster):
    """A cluster whose workers have such engines."""

    engines: list[ScoringEngine] = attrs.field(factory=list)

    def make_engine(self, arena):
        self.engines.append(ScoringEngine(arena))
        return self.engines[-1]


async def ask(frontend, tokens: list[int], new: int) -> tuple[list[tuple[float, int]], list[int], int]:
    """Returns the scores of a prompt, which must come before any token, the answer, and the number of cached prompt
    tokens."""
    found: list[tuple[float, int]] = []
    answer: list[int] = []
    cached = set()

    def take(chunk) -> bool:
        assert not (chunk.prompt and answer), "something of the prompt came behind a token"
        for one in chunk.prompt:
            found.extend(zip(array("d", one.values), unpack(one.ranks), strict=True))
        answer.extend(chunk.tokens)
        cached.add(chunk.cached_tokens)
        return True

    with trio.fail_after(300):
        async with frontend.open(pack(tokens), GenerationParams(HOW, new, ()), "") as stream:
            await stream.listen(take)
    return found, answer, max(cached)


@pytest.mark.parametrize("workers", [PD2, ON_TWO_SHARDS, BOTH])
@pytest.mark.parametrize("chunk_tokens", [3, 16, 1000])
async def test_all_of_a_prompt_is_scored_before_its_answer(
    autojump_clock: MockClock, workers, chunk_tokens
) -> None:
    """Every token of a prompt is scored before the answer begins, in every layout and chunk size."""
    async with memory_cluster(*workers, kind=ScoringCluster, chunk_tokens=chunk_tokens) as (
        cluster,
        frontend,
    ):
        for length, new in [(1, 3), (2, 1), (17, 9), (60, 5)]:
            tokens = prompt(length, length)
            assert await ask(frontend, tokens, new) == (of_prompt(tokens), reference(tokens, new), 0)
        await baseline(cluster)


@pytest.mark.parametrize("workers", [PD2, ON_TWO_SHARDS, BOTH])
async def test_what_is_cached_is_computed_again_and_serves_others(autojump_clock: MockClock, workers) -> None:
    """A scored prompt is computed whole although it is cached, and its pages serve later requests."""
    async with memory_cluster(*workers, kind=ScoringCluster) as (cluster, frontend):
        tokens = prompt(5, 50)
        await generate(frontend, tokens, 6)
        assert await ask(frontend, tokens, 6) == (of_prompt(tokens), reference(tokens, 6), 0)
        other = prompt(6, 50)
        await ask(frontend, other, 1)
        async with frontend.open(pack(other), GenerationParams(Sampling(0.0), 1, ()), "") as stream:
            cached: list[int] = []
            await stream.listen(lambda chunk: cached.append(chunk.cached_tokens) or True)
        assert cached == [48]
        await baseline(cluster)


async def test_nobody_waits_for_what_is_of_no_use_to_it(autojump_clock: MockClock) -> None:
    """A request that must compute its whole prompt does not wait for another one with the same prefix."""
    async with memory_cluster(*BOTH, kind=ScoringCluster, chunk_tokens=10) as (cluster, frontend):
        tokens = prompt(7, 100)
        async with trio.open_nursery() as nursery:
            for run in (generate, ask, generate):
                nursery.start_soon(run, frontend, tokens, 1)
                await trio.sleep(0.001)
            live = cluster.actors["w0"].core._live.values()
            assert [(one.score_count is not None, one.behind is not None) for one in live] == [
                (False, False),
                (True, False),
                (False, True),
            ]
        await baseline(cluster)


async def test_preempted_prompts_are_scored_once(autojump_clock: MockClock) -> None:
    """A preempted prompt reports each score once, and does not use its own cached pages."""
    async with memory_cluster(*BOTH, kind=ScoringCluster, pages=44, chunk_tokens=12) as (cluster, frontend):
        results = {}

        async def one(i: int) -> None:
            await trio.sleep(i * 0.011)
            results[i] = await ask(frontend, prompt(i, 50 + i), 30)

        async with trio.open_nursery() as nursery:
            for i in range(6):
                nursery.start_soon(one, i)
        for i, (found, answer, _) in results.items():
            assert (found, answer) == (of_prompt(prompt(i, 50 + i)), reference(prompt(i, 50 + i), 30))
        assert cluster.actors["w0"].core.gauges()["preemptions_total"] > 0
        await baseline(cluster)


@pytest.mark.parametrize("victim", ["p0", "p1", "d0", "d1"])
@pytest.mark.parametrize("after", [0.001, 0.02, 0.04, 0.06, 0.09, 0.13, 0.3])
@pytest.mark.parametrize("announced", [True, False])
async def test_killing_a_worker_reports_nothing_twice(
    autojump_clock: MockClock, victim, after, announced
) -> None:
    """A worker is killed at any phase: the next attempt reports the missing scores and no others."""
    setting = {"kind": ScoringCluster, "announce_deaths": announced, "chunk_tokens": 8}
    async with memory_cluster(*PD2, **setting) as (cluster, frontend):
        results = {}

        async def one(i: int) -> None:
            await trio.sleep(i * 0.01)
            results[i] = await ask(frontend, prompt(i, 40), 20)

        async with trio.open_nursery() as nursery:
            for i in range(6):
                nursery.start_soon(one, i)
            await trio.sleep(after)
            cluster.kill(victim)
        for i, (found, answer, _) in results.items():
            assert (found, answer) == (of_prompt(prompt(i, 40)), reference(prompt(i, 40), 20))
        assert len(results) == 6
        await baseline(cluster)


async def test_a_later_attempt_computes_only_what_is_missing(autojump_clock: MockClock) -> None:
    """When a decode worker dies, a prompt that was scored already is not computed whole again."""
    async with memory_cluster(*PD2, kind=ScoringCluster, chunk_tokens=8) as (cluster, frontend):
        tokens, results = prompt(3, 80), []

        async def one() -> None:
            results.append(await ask(frontend, tokens, 60))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await trio.sleep(0.4)
            (entry,) = frontend.core._entries.values()
            assert count(entry.sent) > 5 and not entry.unscored
            assert entry.current().sampling.prompt_logprobs is None
            cluster.kill(entry.plan.decode.rpartition(".")[0])
        assert results == [(of_prompt(tokens), reference(tokens, 60), 0)]
        prefills = [
            cluster.actors[name].core.gauges().get("prefill_tokens_total", 0) for name in ("p0", "p1")
        ]
        assert 80 <= sum(prefills) < 80 + 40
        await baseline(cluster)
