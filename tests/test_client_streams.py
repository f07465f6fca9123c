"""What a Frontend passes on to the handlers of its clients: in turns, to the end, and each separately."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from memory_cluster import baseline, generate, memory_cluster, reference
from memserve.actions import Deliver
from memserve.api.service import Chunk, GenerationParams
from memserve.drawing import Sampling
from memserve.errors import RequestFailed
from memserve.tokens import pack

PD = (("p0", "prefill"), ("d0", "decode"))
FIRST, SECOND = list(range(100, 130)), list(range(200, 230))
GREEDY = GenerationParams(Sampling(0.0), 20, ())


async def test_a_handler_that_wants_no_more_ends_its_request_as_stopped(autojump_clock: MockClock) -> None:
    """A handler that wants no more ends its request, which counts as stopped and not as cancelled."""
    async with memory_cluster(*PD) as (cluster, frontend):
        taken: list[int] = []

        def take(chunk: Chunk) -> bool:
            taken.extend(chunk.tokens)
            return len(taken) < 5

        async with frontend.open(pack(FIRST), GREEDY, "") as stream:
            await stream.listen(take)
        await baseline(cluster)
        assert taken == reference(FIRST, 20)[:5]
        assert frontend.core.counters["requests_stop_total"] == 1
        assert "requests_cancelled_total" not in frontend.core.counters


async def test_a_handler_that_breaks_ends_its_own_request_only(autojump_clock: MockClock) -> None:
    """An exception in a handler ends its own request only, although handlers run within the Frontend's turn."""
    async with memory_cluster(*PD) as (cluster, frontend):
        good: list[int] = []

        async def whole() -> None:
            good.extend(await generate(frontend, SECOND, 20))

        def broken(chunk: Chunk) -> bool:
            raise ZeroDivisionError

        async with trio.open_nursery() as nursery:
            nursery.start_soon(whole)
            with pytest.raises(ZeroDivisionError):
                async with frontend.open(pack(FIRST), GREEDY, "") as stream:
                    await stream.listen(broken)
        assert good == reference(SECOND, 20)
        await baseline(cluster)
        assert frontend.core.counters["requests_cancelled_total"] == 1


async def test_what_comes_in_one_turn_is_one_chunk_and_late_listeners_miss_nothing(
    autojump_clock: MockClock,
) -> None:
    """Tokens of one turn form one chunk, and what comes before a handler listens is kept for it."""
    async with memory_cluster(*PD) as (_cluster, frontend):
        chunks: list[Chunk] = []
        async with frontend.open(pack(FIRST), GREEDY, "") as stream:
            for token in (7, 8):
                frontend.deliver(Deliver(stream.id, (token,), None, 3))
            frontend.pass_on()
            with trio.move_on_after(0):
                await stream.listen(lambda chunk: chunks.append(chunk) or True)
            assert chunks == [Chunk((7, 8), None, 3)]
            for token in (9, 10):
                frontend.deliver(Deliver(stream.id, (token,), None, 3))
            frontend.pass_on()
            frontend.pass_on()
            assert chunks[1:] == [Chunk((9, 10), None, 3)]
            frontend.deliver(Deliver(stream.id, (), None, 3, RequestFailed("lost", "gone", 503)))
            frontend.pass_on()
            with pytest.raises(RequestFailed, match="gone"):
                await stream.listen(lambda chunk: True)
        assert len(chunks) == 2
