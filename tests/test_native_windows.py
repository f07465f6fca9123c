"""Layers with a sliding window in the native step, for every instruction set that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import attrs
import pytest
import torch

import test_native
from memserve.engine.plans import Row
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import bits_of, default_cache_dir
from memserve.kernels import native_build
from memserve.kernels.native import NativeStep, load
from memserve.kernels.native_build import NativeUnavailable
from memserve.tokens import pack
from test_model import GREEDY, prompt
from test_native import Twin, native_spec


@pytest.fixture(params=["avx2", "vectors", "amx"], scope="module", autouse=True)
def _instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test with each instruction set, as far as this machine has them."""
    amx = request.param == "amx"

    def made(spec: ModelSpec, weights: dict[str, torch.Tensor], page_tokens: int, threads: int) -> NativeStep:
        return NativeStep(library, spec, bits_of(weights), page_tokens, threads, amx=amx)

    with pytest.MonkeyPatch.context() as patched:
        if request.param == "avx2":
            patched.setattr(native_build, "_processor_flags", lambda: {"avx2", "fma"})
        elif not native_build._AVX512.keys() <= native_build._processor_flags():
            pytest.skip("this machine has AVX2 alone")
        patched.setattr(test_native, "native_step", made)
        try:
            library = load.__wrapped__(default_cache_dir())
        except NativeUnavailable as reason:
            pytest.skip(f"no native step here: {reason}")
        if Twin(native_spec(4, 2, 32)).step.amx != amx:
            pytest.skip("no AMX here")
        yield


def windowed(shape: tuple[int, int, int], window: int, local_layers: tuple[int, ...] = (1,)) -> ModelSpec:
    """A tiny model with a window in some of its two layers."""
    return attrs.evolve(native_spec(*shape), sliding_window=window, local_layers=local_layers)


@pytest.mark.parametrize(("shape", "page_tokens"), [((4, 2, 32), 8), ((9, 1, 96), 32), ((34, 2, 32), 16)])
@pytest.mark.parametrize("window", [1, 20, 129, 300])
def test_logits_are_near_the_reference(shape: tuple[int, int, int], page_tokens: int, window: int) -> None:
    """A token of a local layer attends to the window's tokens alone, in long and short chunks and decode rows."""
    twin = Twin(windowed(shape, window), page_tokens)
    ids, pages = prompt(560, 7), twin.pages(560)
    for start, end in pairwise([0, 150, 166, 410, 411, 415, 528, 529, 545, 560]):
        row = Row(pack(ids[start:end]), start, pages, GREEDY)
        found, expected = twin.native(row), twin.exact(row)
        assert float((found - expected).norm() / expected.norm()) < 0.03, start


@pytest.mark.parametrize(("shape", "page_tokens"), [((6, 2, 64), 16), ((5, 5, 32), 8), ((34, 2, 32), 32)])
@pytest.mark.parametrize("window", [30, 200])
def test_company_chunks_and_threads_change_no_bit(
    shape: tuple[int, int, int], page_tokens: int, window: int
) -> None:
    """Logits of a row are the same to the bit alone, in a batch, behind any chunks, and on any number of threads."""
    twin = Twin(windowed(shape, window, (0, 1)), page_tokens, threads=3, pages=320)
    ids = prompt(600, 1)
    tables = [twin.pages(600) for _ in range(4)]
    for table, size in zip(tables, (600, 200, 97, 5), strict=True):
        for start in range(0, 560, size):
            twin.native(Row(pack(ids[start : min(start + size, 560)]), start, table, None))
    one = Row(pack(ids[560:561]), 560, tables[0], GREEDY)
    expected = twin.native(one)
    assert all(torch.equal(twin.native(attrs.evolve(one, pages=table)), expected) for table in tables[1:])

    chunk = Row(pack(ids[540:580]), 540, tables[1], GREEDY)
    rows = [*(attrs.evolve(one, pages=table) for table in tables), chunk]
    rows += [Row(pack(ids[at : at + 1]), at, tables[3], GREEDY) for at in (5, 128, 300, 511)]
    alone = [twin.native(row)[0] for row in rows]
    for threads in (1, 2, 3):
        twin.threads = threads
        for order in (rows, rows[::-1], rows[3:6]):
            together = twin.native(*order)
            for found, row in zip(together, order, strict=True):
                assert torch.equal(found, alone[rows.index(row)])


@pytest.mark.parametrize("shape", [(6, 2, 64), (9, 1, 96)])
@pytest.mark.parametrize("window", [30, 200, 300])
def test_sequences_in_the_same_pages_change_no_bit(shape: tuple[int, int, int], window: int) -> None:
    """Sequences that share pages attend together to those in the window of any of them, with the bits of each alone."""
    twin = Twin(windowed(shape, window), 16, pages=400)
    shared = twin.pages(512)
    twin.native(Row(pack(prompt(512, 1)), 0, shared, None))
    rows = []
    for i, (kept, own) in enumerate([(512, 150), (256, 300), (512, 3), (512, 1), (256, 90), (304, 77)]):
        table = shared[: kept // 16] + twin.pages(own + 20)
        if own > 1:
            twin.native(Row(pack(prompt(own - 1, i + 2)), kept, table, None))
        rows.append(Row(pack([i]), kept + own - 1, table, GREEDY))
    alone = {row: twin.native(row)[0] for row in rows}
    for threads in (1, 2):
        twin.threads = threads
        for order in (rows, rows[::-1], rows[:2], rows[2:4]):
            together = twin.native(*order)
            assert all(torch.equal(found, alone[row]) for found, row in zip(together, order, strict=True))


def test_pages_before_the_window_are_not_read() -> None:
    """What lies before the window costs nothing: pages there may hold anything, NaN included."""
    twin = Twin(windowed((4, 2, 32), 100, (0, 1)))
    ids, pages = prompt(640, 5), twin.pages(640)
    twin.native(Row(pack(ids[:600]), 0, pages, None))
    chunk, one = (Row(pack(ids[600:end]), 600, pages, GREEDY) for end in (625, 601))
    expected = [twin.native(row) for row in (chunk, one)]
    # The window begins at position 501, in the part that begins at 384.
    twin.arena[list(pages[:24])] = float("nan")
    assert all(
        torch.equal(twin.native(row), logits) for row, logits in zip((chunk, one), expected, strict=True)
    )
