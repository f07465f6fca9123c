"""The native step compared with the reference in torch, where this machine can run it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import pairwise

import attrs
import numpy as np
import pytest
import torch

from memserve.engine.model import BatchTensors, Llama
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import bits_of, default_cache_dir, random_weights
from memserve.kernels.cpu import attention_of
from memserve.kernels.native import THREADS_MAX, ArenaPages, NativeStep, load
from memserve.kernels.native_build import NativeUnavailable
from memserve.tokens import pack, pages_for, unpack
from test_model import GREEDY, prompt, tiny_spec, widened

SHAPES = [(4, 2, 32), (6, 2, 64), (3, 3, 32), (9, 1, 96), (2, 1, 128), (2, 2, 256), (34, 2, 32)]


AMX = False
"""Whether the steps of the running test are to use AMX."""


@pytest.fixture(params=[False, True], ids=["vectors", "amx"], scope="module", autouse=True)
def _instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test with vector instructions and with AMX, as far as this machine has them."""
    global AMX
    AMX = request.param
    try:
        spec = native_spec(4, 2, 32)
        step = native_step(spec, random_weights(spec, "bfloat16", 1), 16, 1)
    except NativeUnavailable as reason:
        pytest.skip(f"no native step here: {reason}")
    if step.amx != AMX:
        pytest.skip("no AMX here")
    yield
    AMX = False


def native_step(
    spec: ModelSpec, weights: dict[str, torch.Tensor], page_tokens: int, threads: int
) -> NativeStep:
    """A step that uses the instructions of the running test."""
    library = load(default_cache_dir())
    return NativeStep(library, spec, bits_of(weights), page_tokens, threads, amx=AMX)


def native_spec(heads: int, kv_heads: int, head_dim: int) -> ModelSpec:
    """A tiny Llama with widths that the native step supports."""
    spec = tiny_spec(heads, kv_heads, head_dim, tied=heads % 2 == 0)
    return attrs.evolve(spec, hidden=96, intermediate=160, vocab=132, max_context=1024)


def pages_of(arena: torch.Tensor) -> ArenaPages:
    """The pages of a bfloat16 arena, on the same memory, in the form that the native step takes."""
    return ArenaPages(arena.view(torch.uint16).numpy())


class Twin:
    """One model twice, each with its own pages: in float32 by the reference and in bfloat16 by the native step."""

    def __init__(
        self,
        spec: ModelSpec,
        page_tokens: int = 16,
        threads: int = 2,
        pages: int = 200,
        stored: str = "bfloat16",
    ) -> None:
        self.spec, self.page_tokens, self.threads = spec, page_tokens, threads
        self.weights = random_weights(spec, stored, 1)
        exact = widened(self.weights)
        shape = (pages, *spec.page_shape(page_tokens))
        self.reference = Llama(spec, exact)
        self.attention = attention_of(spec, torch.full(shape, float("nan")))
        # NaN wherever nothing was written: a step that reads past a row's end gives NaN.
        self.arena = torch.full(shape, float("nan"), dtype=torch.bfloat16)
        self.arena_pages = pages_of(self.arena)
        self.step = native_step(spec, self.weights, page_tokens, threads)
        self.free = list(range(pages))
        random.Random(3).shuffle(self.free)

    def pages(self, tokens: int) -> tuple[int, ...]:
        """Pages that no other sequence has, in random order."""
        return tuple(self.free.pop() for _ in range(pages_for(tokens, self.page_tokens)))

    def native(self, *rows: Row) -> torch.Tensor:
        """Logits of the native step."""
        return torch.from_numpy(self.step.forward(BatchPlan(rows), self.arena_pages, self.threads))

    def drawn(self, *rows: Row) -> list[int]:
        """Tokens of the native step."""
        drawn, _ = self.step.step(BatchPlan(rows), self.arena_pages, self.threads)
        return [*unpack(b"".join(drawn))]

    def exact(self, *rows: Row) -> torch.Tensor:
        """Logits of the reference."""
        plan = BatchPlan(rows)
        with torch.inference_mode():
            return self.reference.forward(BatchTensors.of(plan), self.attention.plan(plan), self.attention)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("page_tokens", [8, 32, 128])
def test_logits_are_near_the_reference(shape: tuple[int, int, int], page_tokens: int) -> None:
    """Logits are near the reference for first chunks, chunks on a cache and decode rows, also beyond one attention part."""
    twin = Twin(native_spec(*shape), page_tokens)
    ids, pages = prompt(300, 7), twin.pages(300)
    cuts = [0, 150, *range(174, 294, 24), 295, 296, 300]
    for start, end in pairwise(cuts):
        row = Row(pack(ids[start:end]), start, pages, GREEDY)
        found, expected = twin.native(row), twin.exact(row)
        assert float((found - expected).norm() / expected.norm()) < 0.03, start


def test_mixed_rows_are_near_the_reference() -> None:
    """In a batch of unequal rows each finds its own pages and positions, and rows that want no logits give none."""
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
    """Logits of a row are the same to the bit, alone or in a batch and on any number of threads."""
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


@pytest.mark.parametrize("shape", [(6, 2, 64), (9, 1, 96), (5, 5, 32)])
@pytest.mark.parametrize("page_tokens", [8, 16, 32, 256])
def test_sequences_in_the_same_pages_change_no_bit(shape: tuple[int, int, int], page_tokens: int) -> None:
    """Sequences that share their first pages attend to them together and get the same logits to the bit as alone."""
    twin = Twin(native_spec(*shape), page_tokens, pages=600)
    shared = twin.pages(512)
    twin.native(Row(pack(prompt(512, 1)), 0, shared, None))
    rows = []
    for i, (kept, own) in enumerate(
        [(512, 200), (256, 300), (512, 3), (0, 400), (256, 90), (512, 1), (300, 77)]
    ):
        kept = kept // page_tokens * page_tokens
        table = shared[: kept // page_tokens] + twin.pages(own + 20)
        if own > 1:
            twin.native(Row(pack(prompt(own - 1, i + 2)), kept, table, None))
        rows.append(Row(pack([i]), kept + own - 1, table, GREEDY))
    last = rows[1]  # a chunk beside them, whose rows have a task of their own
    rows.insert(2, Row(pack(prompt(15, 9)), last.start + 1, last.pages, GREEDY))
    alone = {row: twin.native(row)[0] for row in rows}
    for threads in (1, 2, 3):
        twin.threads = min(threads, 2)
        for order in (rows, rows[::-1], rows[:2], [rows[0], *rows[3:6]]):
            together = twin.native(*order)
            assert all(torch.equal(found, alone[row]) for found, row in zip(together, order, strict=True))


def test_more_sequences_than_a_task_takes_change_no_bit() -> None:
    """Sequences that share pages are cut into several tasks, and each still gets the logits that it gets alone."""
    twin = Twin(native_spec(4, 2, 32), pages=400)
    shared = twin.pages(256)
    twin.native(Row(pack(prompt(256, 1)), 0, shared, None))
    rows = [Row(pack([i % 100]), 256, (*shared, *twin.pages(1)), GREEDY) for i in range(150)]
    longer = [Row(pack([i]), 128, (*shared[:8], *twin.pages(1)), GREEDY) for i in range(5)]
    rows[100:100] = longer
    together = twin.native(*rows)
    assert all(torch.equal(found, twin.native(row)[0]) for found, row in zip(together, rows, strict=True))


def in_chunks(
    twin: Twin, ids: list[int], cuts: Iterable[int], pages: tuple[int, ...]
) -> dict[int, torch.Tensor]:
    """Compute the tokens in chunks that end at ``cuts``; returns the logits at the end of each chunk."""
    return {
        end: twin.native(Row(pack(ids[start:end]), start, pages, GREEDY))[0]
        for start, end in pairwise([0, *cuts])
    }


@pytest.mark.parametrize("shape", [(6, 2, 64), (9, 1, 96), (5, 5, 32)])
@pytest.mark.parametrize("page_tokens", [8, 16, 32])
def test_chunks_change_no_bit(shape: tuple[int, int, int], page_tokens: int) -> None:
    """The logits of a token do not depend on how its prompt was cut into chunks."""
    generator = random.Random(page_tokens)
    twin = Twin(native_spec(*shape), page_tokens, pages=1000)
    ids = prompt(600, page_tokens)
    token_by_token = in_chunks(twin, ids, range(1, 601), twin.pages(600))

    cuttings = [range(size, 601, size) for size in (600, 300, 100, 40, 25, 15, 12, 4)]
    for cuts in [*cuttings, sorted({*generator.sample(range(1, 600), 9), 600})]:
        twin.threads = 1 + len(cuts) % 2
        for end, logits in in_chunks(twin, ids, cuts, twin.pages(600)).items():
            assert torch.equal(logits, token_by_token[end]), (cuts, end)


def test_int8_weights_are_near_the_reference_and_change_no_bit() -> None:
    """int8 weights are widened in two ways, for few rows and for many: both give the same bits, near the reference."""
    twin = Twin(native_spec(9, 1, 96), pages=400, stored="int8")
    ids = prompt(300, 4)
    token_by_token = in_chunks(twin, ids, range(1, 301), twin.pages(300))
    for size in (300, 150, 60, 30, 12, 5):
        for end, logits in in_chunks(twin, ids, range(size, 301, size), twin.pages(300)).items():
            assert torch.equal(logits, token_by_token[end]), (size, end)
    expected = twin.exact(Row(pack(ids), 0, twin.pages(300), GREEDY))[0]
    assert float((token_by_token[300] - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_deep_products_change_no_bit(stored: str) -> None:
    """Products too deep for the first-level cache are made in parts for many rows, and sum as they do for few."""
    spec = attrs.evolve(native_spec(6, 2, 64), intermediate=1600)
    twin = Twin(spec, stored=stored)
    ids = prompt(150, 3)
    few = in_chunks(twin, ids, range(10, 151, 10), twin.pages(150))
    for size in (150, 50):
        for end, logits in in_chunks(twin, ids, range(size, 151, size), twin.pages(150)).items():
            assert torch.equal(logits, few[end]), (size, end)


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_no_number_of_rows_changes_a_bit(stored: str) -> None:
    """Rows are computed in parts of several sizes: for each number of rows the logits are those of a row alone."""
    spec = attrs.evolve(native_spec(6, 2, 64), hidden=416, intermediate=800)
    twin = Twin(spec, stored=stored, pages=400)
    ids = prompt(36, 3)
    alone = in_chunks(twin, ids, range(1, 37), twin.pages(36))
    for rows in range(2, 19):
        for end, logits in in_chunks(twin, ids, range(rows, 37, rows), twin.pages(36)).items():
            assert torch.equal(logits, alone[end]), (rows, end)


def test_threads_with_rows_of_their_own_change_no_bit() -> None:
    """Many rows are cut into one block per thread, and the logits do not depend on the number of threads."""
    spec = native_spec(6, 2, 64)
    results = []
    for threads in (1, 2, 3, 5):
        twin = Twin(spec, threads=threads)
        ids, other = prompt(460, 1), prompt(40, 2)
        pages, others = twin.pages(470), twin.pages(60)
        twin.native(Row(pack(other), 0, others, None))
        decode = Row(pack([5]), 40, others, GREEDY)
        results.append(twin.native(decode, Row(pack(ids), 0, pages, GREEDY)))
    assert all(torch.equal(found, results[0]) for found in results)


def test_cache_and_company_of_chunks_change_no_bit() -> None:
    """A sequence on cached pages and in a batch has the logits that it has alone and in one chunk."""
    twin = Twin(native_spec(6, 2, 64), pages=400)
    ids, other = prompt(420, 1), prompt(420, 2)
    whole = in_chunks(twin, ids, [420], twin.pages(420))[420]
    pages, others = twin.pages(420), twin.pages(420)
    in_chunks(twin, ids, [7, 160, 320], pages)  # what an earlier request left
    in_chunks(twin, other, [300], others)

    mixed = twin.native(
        Row(pack(other[300:333]), 300, others, None),
        Row(pack(ids[320:420]), 320, pages, GREEDY),
        Row(pack([5]), 0, twin.pages(1), GREEDY),
    )
    assert torch.equal(mixed[0], whole)
    again = twin.native(Row(pack(ids[419:]), 419, pages, GREEDY))  # as a decode row, over its own K and V
    assert torch.equal(again[0], whole)


def test_steps_beyond_its_buffers_change_no_bit() -> None:
    """A step larger than the buffers gives the same logits as its rows in small steps."""
    twin = Twin(native_spec(4, 2, 32), pages=400)
    prompts = [prompt(length, length) for length in (1, 511, 700, 1, 320)]
    alone = [twin.native(Row(pack(ids), 0, twin.pages(len(ids)), GREEDY)) for ids in prompts]
    rows = [Row(pack(ids), 0, twin.pages(len(ids)), GREEDY if i else None) for i, ids in enumerate(prompts)]

    assert torch.equal(twin.native(*rows), torch.cat(alone[1:]))


def test_what_is_not_there_is_refused() -> None:
    """Pages, tokens and positions out of range are refused: they would read or write memory of others."""
    twin = Twin(native_spec(4, 2, 32), pages=4)
    for row in (
        Row(pack([1]), 0, (4,), GREEDY),
        Row(pack([1]), 0, (-1,), GREEDY),
        Row(pack([132]), 0, (0,), GREEDY),
        Row(pack([-1]), 0, (0,), GREEDY),
        Row(pack([1]), 16, (0,), GREEDY),
        Row(pack([1]), -1, (0,), GREEDY),
        Row(pack([1]), 1024, (0,) * 65, GREEDY),
    ):
        with pytest.raises(ValueError, match="not there"):
            twin.native(row)
    for threads in (0, 99):  # more than it has is fewer, none is one
        twin.threads = threads
        assert twin.native(Row(pack([1]), 0, (0,), GREEDY)).isfinite().all()


def written_out(spec: ModelSpec, weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits of every position in float32, by the formulas of the model."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    tokens, half, eps = len(ids), spec.head_dim // 2, spec.rms_eps
    angles = torch.outer(
        torch.arange(tokens).float(), spec.rope_theta ** (-torch.arange(half).float() * 2 / spec.head_dim)
    )
    cosines, sines = angles.cos()[:, None], angles.sin()[:, None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cosines - b * sines, b * cosines + a * sines), -1)

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w[name]

    x = w["embed"][ids]
    for layer in range(spec.layers):
        qkv = normed(x, f"{layer}.attn_norm") @ w[f"{layer}.qkv"].T
        if spec.qkv_bias:
            qkv = qkv + w[f"{layer}.qkv_bias"]
        sizes = [spec.heads, spec.kv_heads, spec.kv_heads]
        q, k, v = qkv.view(tokens, -1, spec.head_dim).split(sizes, 1)
        if spec.qk_norm:
            q, k = normed(q, f"{layer}.q_norm"), normed(k, f"{layer}.k_norm")
        q, k, v = (
            part.repeat_interleave(spec.heads // part.shape[1], 1).transpose(0, 1)
            for part in (rotated(q), rotated(k), v)
        )
        scores = q @ k.transpose(1, 2) / spec.head_dim**0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        attended = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        x = x + attended.transpose(0, 1).reshape(tokens, -1) @ w[f"{layer}.o"].T
        gate, up = (normed(x, f"{layer}.mlp_norm") @ w[f"{layer}.gate_up"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ w[f"{layer}.down"].T
    return normed(x, "norm") @ w.get("head", w["embed"]).T


@pytest.mark.parametrize(
    ("qkv_bias", "qk_norm"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("shape", [(4, 2, 64), (2, 1, 256), (18, 1, 32)])
def test_families_are_near_float32(shape: tuple[int, int, int], qkv_bias: bool, qk_norm: bool) -> None:
    """Qwen2's biases and Qwen3's norms of q and k are applied in the right order and to the right heads."""
    spec = attrs.evolve(native_spec(*shape), qkv_bias=qkv_bias, qk_norm=qk_norm)
    weights = random_weights(spec, "bfloat16", 1)
    generator = torch.Generator().manual_seed(2)
    for layer in range(spec.layers):
        width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        if qkv_bias:
            weights[f"{layer}.qkv_bias"] = torch.randn(width, generator=generator)
        if qk_norm:
            for name in ("q_norm", "k_norm"):
                weights[f"{layer}.{name}"] = 1 + 0.5 * torch.randn(spec.head_dim, generator=generator)
    step = native_step(spec, weights, 16, 2)
    ids, arena = prompt(40, 5), torch.full((3, *spec.page_shape(16)), float("nan"), dtype=torch.bfloat16)
    pages = pages_of(arena)
    found = [
        step.forward(BatchPlan((Row(pack(ids[start:end]), start, (2, 0, 1), GREEDY),)), pages, 2)[0]
        for start, end in pairwise([0, 30, *range(31, 41)])
    ]
    expected = written_out(spec, weights, ids)[29:]
    errors = (torch.from_numpy(np.stack(found)) - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.max()) < 0.03, errors


def test_thread_counts_may_change_from_step_to_step() -> None:
    """Each step may use another number of threads, and its logits stay the same."""
    twin = Twin(native_spec(4, 2, 32), threads=4)
    row = Row(pack([7]), 0, twin.pages(1), GREEDY)
    expected = twin.native(row)
    for step in range(3000):
        twin.threads = 1 + step * 7 % 4
        assert torch.equal(twin.native(row), expected), step
    twin.step.close()


def test_a_machine_of_more_cores_than_it_counts_runs_it_too() -> None:
    """The largest machines would compute in torch, many times slower."""
    small, large = (Twin(native_spec(4, 2, 32), threads=threads) for threads in (1, THREADS_MAX + 1))
    row = Row(pack(prompt(90, 1)), 0, small.pages(90), GREEDY)
    assert torch.equal(large.native(row), small.native(row))
    large.step.close()


def test_threads_may_come_and_go_within_a_step() -> None:
    """Threads may leave and join between two layers; tokens and KV stay the same, and each layer is asked for once."""
    spec = attrs.evolve(native_spec(4, 2, 32), layers=6)
    twin = Twin(spec, threads=4)
    row = Row(pack(prompt(90, 1)), 0, twin.pages(90), GREEDY)
    expected = twin.step.step(BatchPlan((row,)), twin.arena_pages, 4)
    kv = twin.arena.clone()
    had: list[int] = []

    def crew(threads: int) -> int:
        had.append(threads)
        return 1 + len(had) * 7 % 4

    for start in range(500):
        assert twin.step.step(BatchPlan((row,)), twin.arena_pages, 1 + start % 4, crew) == expected, start
        assert torch.equal(twin.arena.nan_to_num(), kv.nan_to_num()), start
    assert len(had) == 500 * (spec.layers - 1)
    assert set(had) == {1, 2, 3, 4}
    twin.step.close()


def test_a_short_step_does_not_ask_for_threads_between_layers() -> None:
    """A step of one decode row does not ask for its threads between layers: that costs a tenth of a layer."""
    twin = Twin(native_spec(4, 2, 32), threads=2)
    row = Row(pack([7]), 0, twin.pages(1), GREEDY)
    asked: list[int] = []
    twin.step.step(BatchPlan((row,)), twin.arena_pages, 2, lambda threads: asked.append(threads) or threads)
    assert not asked
    twin.step.close()
