"""Drafts of answers with adjusted logits: each draw sees the past that it would have in a step of its own."""

from __future__ import annotations

import attrs
import pytest
import trio

from adjustments import past_of
from memory_cluster import baseline, generate_with, memory_cluster
from memserve.drawing import Sampling
from memserve.engine.adjusting import adjusted
from memserve.engine.plans import BatchPlan, BatchResult, Row
from memserve.engine.sampling import draw
from memserve.tokens import count, pack, span, unpack
from test_adjusting import ENDS, HOW, PROMPT, AdjustingEngine, make_believe_logits
from test_drafting_cluster import DraftingCluster, result_of

PLAIN = attrs.evolve(HOW, logprobs=None, temperature=0.4)
NEW = 60


class DraftingEngine(AdjustingEngine):
    """Runs drafts as engines with a model do."""

    def run(self, plan: BatchPlan) -> BatchResult:
        return result_of([self.all_drawn(row) for row in plan.rows])

    def all_drawn(self, row: Row) -> list[int]:
        drawn: list[int] = []
        for place in range(1 + count(row.draft)):
            said = span(row.draft, 0, place)
            token, _ = self.drawn(
                attrs.evolve(row, tokens=row.tokens + said, past=row.past_at(place), draft=b"")
            )
            if token is None:
                break
            drawn.append(token)
            if place == count(row.draft) or token != unpack(row.draft)[place]:
                break
        return drawn


class AdjustingCluster(DraftingCluster):
    """A cluster whose workers have such engines."""

    def make_engine(self, arena):
        return DraftingEngine(arena)


def undisturbed(how: Sampling) -> list[int]:
    """The answer of one engine that never stops and never drafts."""
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + NEW and tokens[-1] not in ENDS:
        row = Row(pack(tokens), 0, (), how, past_of(how, tokens, len(PROMPT), ENDS))
        tokens += draw(adjusted(make_believe_logits(tokens)[None], [row]), [how], [len(tokens)])
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("workers", [(("p0", "prefill"), ("d0", "decode")), (("w0", "both"), ("w1", "both"))])
async def test_drafts_change_no_adjusted_token(autojump_clock, workers, seed) -> None:
    """Answers with penalties and a least length have the same tokens with drafts as without."""
    how = attrs.evolve(PLAIN, seed=seed)
    expected = undisturbed(how)
    async with memory_cluster(*workers, kind=AdjustingCluster) as (cluster, frontend):
        for _ in range(2):  # the second time the pool knows it all
            assert await generate_with(frontend, PROMPT, how, NEW, ENDS) == expected
            await trio.sleep(1)
        assert cluster.accepted() > 10
        await baseline(cluster)
