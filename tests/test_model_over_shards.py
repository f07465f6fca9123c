"""A chat with the real model over two shards in every cache mode: right tokens, and only the promised work and transfers."""

from __future__ import annotations

import mmap

import pytest
from trio.testing import MockClock

from memory_cluster import PAGE_TOKENS, MemoryCluster, memory_cluster
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import find_model
from memserve.engine.weights import prepare
from memserve.tokens import pack
from test_model import DEMO, GREEDY
from test_shards_cluster import MODES, ON_TWO_SHARDS, chat, check_mode

pytestmark = pytest.mark.usefixtures("native_step")
DTYPE = "bfloat16"
TURNS = 3


class ModelArena(dict):
    """Pages of KV by slot, all in one memory."""

    def __init__(self, slots: list[int]) -> None:
        self.files = prepare(find_model(DEMO), DTYPE)
        size = self.files.spec.page_bytes(PAGE_TOKENS, DTYPE)
        self.memory = mmap.mmap(-1, size * len(slots))
        whole = memoryview(self.memory)
        super().__init__({slot: whole[i * size : (i + 1) * size] for i, slot in enumerate(slots)})

    def engine(self) -> CpuEngine:
        """An engine on these pages."""
        files = self.files
        return CpuEngine(files.spec, files.weights, self.memory, len(self), PAGE_TOKENS, DTYPE, threads=2)


class ModelCluster(MemoryCluster):
    """The cluster in virtual time with the demo model in its engines."""

    def make_arena(self, slots: list[int]) -> ModelArena:
        """Pages of KV."""
        return ModelArena(slots)

    def make_engine(self, arena: ModelArena) -> CpuEngine:
        """An engine on these pages."""
        return arena.engine()


@pytest.fixture(scope="module")
def alone():
    """A function that gives the model's own answer, each computed once."""
    engine, known = ModelArena(list(range(60))).engine(), {}

    def answer(ids: list[int], new: int) -> list[int]:
        text, start = list(ids), 0
        while len(text) < len(ids) + new:
            row = Row(pack(text[start:]), start, tuple(range(60)), GREEDY)
            start = len(text)
            text += [token for token in engine.run(BatchPlan((row,))).tokens if token is not None]
        return text[len(ids) :]

    return lambda ids, new: known.get(tuple(ids)) or known.setdefault(tuple(ids), answer(ids, new))


@pytest.mark.parametrize("mode", MODES)
async def test_a_chat_with_the_model(autojump_clock: MockClock, alone, mode) -> None:
    """The same tokens in every mode.

    Mode 3 computes only what the user has added, mode 2 also sends only that, and off sends all.
    """
    settings = {"policy": "least_load", "pages": 60, "kind": ModelCluster, **MODES[mode]}
    async with memory_cluster(*ON_TWO_SHARDS, **settings) as (cluster, frontend):
        check_mode(cluster, mode, await chat(cluster, frontend, TURNS, alone))
