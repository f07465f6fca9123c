"""The step engine from outside: rows get their tokens, threads are those it may use, and foreign pages stay as they are."""

from __future__ import annotations

import mmap
import threading
import time
import tracemalloc
from pathlib import Path

import attrs
import pytest
import torch

from memserve.drawing import Sampling
from memserve.engine import model
from memserve.engine.cpu_budget import Cores
from memserve.engine.ops import chosen_experts
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import random_weights, save_weights
from memserve.tokens import pack
from test_fallback import native_shape
from test_model import GREEDY, Runner, prompt, tiny_spec, widened

PAGES = 16


@pytest.fixture
def engine(tmp_path: Path) -> CpuEngine:
    """A random model over an arena of 16 pages of 16 tokens."""
    spec = tiny_spec()
    save_weights(random_weights(spec, "float32", 1), tmp_path / "w")
    arena = mmap.mmap(-1, PAGES * spec.page_bytes(16, "float32"))
    return CpuEngine(spec, tmp_path / "w", arena, PAGES, 16, "float32", Cores(tmp_path / "cores", 2, 2, 0))


def test_a_step_returns_a_token_where_one_is_wanted(engine: CpuEngine) -> None:
    """Each row that wants a token gets its own, the same as when it runs alone."""
    rows = (
        Row(pack(prompt(20, 1)), 0, (3, 1), GREEDY),
        Row(pack(prompt(9, 2)), 0, (4,), None),
        Row(pack(prompt(5, 3)), 0, (5,), Sampling(seed=4)),
    )
    result = engine.run(BatchPlan(rows))
    alone = [engine.run(BatchPlan((row,))).tokens[0] for row in rows]

    assert list(result.tokens) == alone
    assert result.tokens[1] is None
    assert result.threads == 2
    assert result.step_ms > 0


def test_a_step_tells_how_long_it_had_no_core(engine: CpuEngine, tmp_path: Path) -> None:
    """Waiting for the end of a neighbour's step is no part of the step's own time."""
    plan = BatchPlan((Row(pack(prompt(5, 1)), 0, (3,), GREEDY),))
    assert engine.run(plan).waited_s < 0.1
    engine.rest()
    taken = threading.Event()

    def neighbour() -> None:
        with Cores(tmp_path / "cores", 2, 2, 1).hold():
            taken.set()
            time.sleep(0.5)

    other = threading.Thread(target=neighbour)
    other.start()
    taken.wait()
    began = time.perf_counter()
    result = engine.run(plan)
    took_s = time.perf_counter() - began
    other.join()
    assert result.waited_s > 0.3
    assert result.waited_s + result.step_ms / 1e3 <= took_s


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_engine_is_made_for_the_context_that_is_served(tmp_path: Path, dtype: str) -> None:
    """Each worker of a model of a million positions would take seconds longer to start, and half a GB of its own."""
    spec = attrs.evolve(native_shape(), max_context=1_000_000)
    save_weights(random_weights(spec, dtype, 1), tmp_path / "w")
    arena = mmap.mmap(-1, PAGES * spec.page_bytes(16, dtype))
    tracemalloc.start()
    engine = CpuEngine(spec, tmp_path / "w", arena, PAGES, 16, dtype, max_context=64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    engine.warm_up()

    assert peak < 20 << 20
    assert engine.run(BatchPlan((Row(pack(prompt(64, 1)), 0, (0, 1, 2, 3), GREEDY),))).tokens[0] is not None
    with pytest.raises(ValueError, match="within 64 positions"):
        engine.run(BatchPlan((Row(pack(prompt(65, 1)), 0, (0, 1, 2, 3, 4), GREEDY),)))
    engine.close()


def test_warming_up_touches_no_page(tmp_path: Path) -> None:
    """Warming up writes to no page: the arena may hold other requests' KV."""
    spec = tiny_spec()
    save_weights(random_weights(spec, "bfloat16", 1), tmp_path / "w")
    arena = mmap.mmap(-1, spec.page_bytes(16, "bfloat16"))
    arena[:] = b"\x5a" * len(arena)
    engine = CpuEngine(spec, tmp_path / "w", arena, 1, 16, "bfloat16", threads=1)
    engine.warm_up()

    assert arena[:] == b"\x5a" * len(arena)
    engine.close()
    del engine
    arena.close()  # BufferError if a tensor still held it


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_int8_weights_serve_in_either_dtype(tmp_path: Path, dtype: str) -> None:
    """int8 weights serve with KV in bfloat16 and float32, and draw nearly the best token."""
    spec = attrs.evolve(tiny_spec(4, 2, 32), hidden=96, intermediate=160, vocab=132)
    weights = random_weights(spec, "int8", 1)
    save_weights(weights, tmp_path / "w")
    arena = mmap.mmap(-1, PAGES * spec.page_bytes(16, dtype))
    engine = CpuEngine(spec, tmp_path / "w", arena, PAGES, 16, dtype, threads=2)
    engine.warm_up()
    exact = Runner(spec, widened(weights))
    for length in (1, 40, 90):
        row = Row(pack(prompt(length, length)), 0, tuple(range(6)), GREEDY)
        (token,) = engine.run(BatchPlan((row,))).tokens
        (logits,) = exact.step(row)
        assert token is not None
        assert float(logits.max() - logits[token]) < (0.1 if dtype == "bfloat16" else 1e-5)
    engine.close()


def test_a_step_runs_on_the_cores_it_holds(tmp_path: Path) -> None:
    """A step uses as many threads as it holds cores: more would make it many times slower."""
    spec = tiny_spec()
    save_weights(random_weights(spec, "float32", 1), tmp_path / "w")
    arena = mmap.mmap(-1, spec.page_bytes(16, "float32"))
    mine, other = Cores(tmp_path / "cores", 2, 2, 0), Cores(tmp_path / "cores", 2, 2, 1)
    engine = CpuEngine(spec, tmp_path / "w", arena, 1, 16, "float32", mine)
    row = Row(pack([1, 2]), 0, (0,), GREEDY)
    assert engine.run(BatchPlan((row,))).threads == 2
    with other.hold() as held:
        assert held == 1
        assert engine.run(BatchPlan((row,))).threads == 1
        assert torch.get_num_threads() == 1
    other.busy(False)
    assert engine.run(BatchPlan((row,))).threads == 2


def test_rows_are_timed_on_experts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of equal tokens would choose the same experts, and a batch would seem to cost no more than one row."""
    spec = attrs.evolve(tiny_spec(), experts=16, experts_used=2)
    save_weights(random_weights(spec, "float32", 1), tmp_path / "w")
    arena = mmap.mmap(-1, spec.page_bytes(16, "float32"))
    engine = CpuEngine(spec, tmp_path / "w", arena, 1, 16, "float32")
    used: list[int] = []

    def watched(logits: torch.Tensor, spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = chosen_experts(logits, spec)
        used.append(len(set(chosen.flatten().tolist())))
        return weights, chosen

    monkeypatch.setattr(model, "chosen_experts", watched)
    run = engine.timer(rows=8, context=64)
    for shape in ([(1, 20)] * 8, [(30, 0)]):
        used.clear()
        run(shape)
        assert min(used) > 6
    engine.close()


def test_steps_are_timed_on_pages_of_their_own(engine: CpuEngine) -> None:
    """Timing steps does not write to pages of the shard."""
    before = engine.run(BatchPlan((Row(pack(prompt(20, 1)), 0, (3, 1), GREEDY),))).tokens
    run = engine.timer(rows=4, context=64)
    for shape in ([(16, 0)], [(1, 63)] * 4, [(30, 30), (1, 40), (1, 17)]):
        seconds, threads = run(shape)
        assert 0 < seconds < 60 and threads in (2, 0)  # 0: other programs had the cores
    assert engine.run(BatchPlan((Row(pack(prompt(20, 1)[16:]), 16, (3, 1), GREEDY),))).tokens == before
