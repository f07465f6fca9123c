"""The native step against the reference, where this machine can have it."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import attrs
import pytest
import torch
from structlog.testing import capture_logs

from memserve.engine.model import Batch, Llama
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import default_cache_dir, random_weights
from memserve.kernels.cpu import CpuAttention
from memserve.kernels.native import NativeStep, NativeUnavailable, load, open_step
from memserve.tokens import pack, pages_for
from test_model import GREEDY, prompt, tiny_spec

SHAPES = [(4, 2, 32), (6, 2, 64), (3, 3, 32), (9, 1, 96)]


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    try:
        load(default_cache_dir())
    except NativeUnavailable as reason:
        pytest.skip(f"no native step here: {reason}")


def native_spec(heads: int, kv_heads: int, head_dim: int) -> ModelSpec:
    """A tiny Llama of widths that the native step takes."""
    spec = tiny_spec(heads, kv_heads, head_dim, tied=heads % 2 == 0)
    return attrs.evolve(spec, hidden=96, intermediate=160, vocab=132, max_context=1024)


class Twin:
    """A model in float32 by the reference and in bfloat16 by the native step, each with pages of its own."""

    def __init__(self, spec: ModelSpec, page_tokens: int = 16, threads: int = 2, pages: int = 200) -> None:
        self.spec, self.page_tokens, self.threads = spec, page_tokens, threads
        self.weights = random_weights(spec, "bfloat16", 1)
        exact = {name: tensor.float() for name, tensor in self.weights.items()}
        shape = (pages, *spec.page_shape(page_tokens))
        self.reference = Llama(spec, exact)
        self.attention = CpuAttention(torch.full(shape, float("nan")), spec.heads)
        # NaN wherever nothing was written: whoever reads past a row's end shows it.
        self.arena = torch.full(shape, float("nan"), dtype=torch.bfloat16)
        step = open_step(spec, self.weights, self.reference.rope, page_tokens, threads, default_cache_dir())
        assert isinstance(step, NativeStep)
        self.step = step
        self.free = list(range(pages))
        random.Random(3).shuffle(self.free)

    def pages(self, tokens: int) -> tuple[int, ...]:
        """Pages nobody else has, in no order."""
        return tuple(self.free.pop() for _ in range(pages_for(tokens, self.page_tokens)))

    def native(self, *rows: Row) -> torch.Tensor:
        """Logits of the native step."""
        return self.step.forward(BatchPlan(rows), self.arena, self.threads)

    def exact(self, *rows: Row) -> torch.Tensor:
        """Logits of the reference."""
        plan = BatchPlan(rows)
        with torch.inference_mode():
            return self.reference.forward(Batch.of(plan), self.attention.plan(plan), self.attention)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("page_tokens", [8, 16, 32])
def test_logits_are_near_the_reference(shape: tuple[int, int, int], page_tokens: int) -> None:
    """Chunks from nothing, chunks on a cache and decode rows, past one attention part: all must be this model."""
    twin = Twin(native_spec(*shape), page_tokens)
    ids, pages = prompt(300, 7), twin.pages(300)
    cuts = [0, 150, *range(174, 294, 24), 295, 296, 300]
    for start, end in pairwise(cuts):
        row = Row(pack(ids[start:end]), start, pages, GREEDY)
        found, expected = twin.native(row), twin.exact(row)
        assert float((found - expected).norm() / expected.norm()) < 0.03, start


def test_mixed_rows_are_near_the_reference() -> None:
    """Rows of a batch must find their own pages, positions and logits."""
    twin = Twin(native_spec(4, 2, 32))
    lengths = (1, 5, 17, 24, 31)
    tables = {length: twin.pages(length + 3) for length in lengths}
    for length in lengths:
        row = Row(pack(prompt(length, length)), 0, tables[length], None)
        assert twin.native(row).shape == (0, 132)
        twin.exact(row)
    rows = [
        Row(pack(prompt(1 + i % 3, i)), length, tables[length], GREEDY if i != 2 else None)
        for i, length in enumerate(lengths)
    ]
    found, expected = twin.native(*rows), twin.exact(*rows)

    assert found.shape == expected.shape == (4, 132)
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.max()) < 0.03, errors


def test_company_and_threads_change_no_bit() -> None:
    """Greedy bfloat16 output would depend on who else is being served, and on how many cores are free."""
    spec = native_spec(6, 2, 64)
    results = []
    for threads in (1, 2, 3):
        twin = Twin(spec, threads=threads)
        tables = [twin.pages(290) for _ in range(5)]
        for i, table in enumerate(tables):
            ids = prompt(280, i)
            for start in range(0, 280, 70):
                twin.native(Row(pack(ids[start : start + 70]), start, table, None))
        rows = [Row(pack([i]), 280 - 50 * i, table, GREEDY) for i, table in enumerate(tables)]
        rows[2] = Row(pack(prompt(9, 4)), 260, tables[2], GREEDY)  # a chunk, whose rows attend together
        together = twin.native(*rows)
        alone = torch.cat([twin.native(row) for row in rows])
        assert torch.equal(together, alone)
        results.append(together)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_thread_counts_may_change_from_step_to_step() -> None:
    """Cores come and go; a thread left out of one step must be neither lost nor late in the next."""
    twin = Twin(native_spec(4, 2, 32), threads=4)
    row = Row(pack([7]), 0, twin.pages(1), GREEDY)
    expected = twin.native(row)
    for step in range(3000):
        twin.threads = 1 + step * 7 % 4
        assert torch.equal(twin.native(row), expected), step
    twin.step.close()


def test_what_it_cannot_run_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler must serve, and its operator learn why it is slow."""
    spec = native_spec(4, 2, 32)
    weights = random_weights(spec, "bfloat16", 1)
    rope = Llama(spec, weights).rope
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    odd = attrs.evolve(spec, hidden=40)
    with capture_logs() as logs:
        assert open_step(spec, weights, rope, 16, 2, tmp_path) is None
        assert open_step(odd, weights, rope, 16, 2, default_cache_dir()) is None
        assert open_step(spec, {"embed": weights["embed"].float()}, rope, 16, 2, default_cache_dir()) is None

    assert [entry["event"] for entry in logs] == ["native step unavailable"] * 3
    assert "no C++ compiler" in logs[0]["reason"]
    assert "multiples of 32" in logs[1]["reason"]
    assert "float32" in logs[2]["reason"]
