"""The CUDA engine with FlashInfer itself, its kernels run by the CPU (``gpu_rehearsal``): ``make gpu-rehearsal``."""

from __future__ import annotations

import ctypes
import random

import attrs
import numpy as np
import pytest
import torch

import gpu_rehearsal
from adjustments import by_definition, past_of, some_adjustments
from backends import FlashRunner
from gpu_rehearsal import PROCESSORS, Graphs, Rehearsed, machine, needs_compiled
from memserve.drawing import Sampling
from memserve.engine.cuda import CudaEngine
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.weights import random_weights
from memserve.kernels import flashinfer_kit
from memserve.kernels.flashinfer_kit import FlashInferAttention, libraries
from memserve.kernels.page_tables import StepTables, Table, buckets_up_to
from memserve.settings.gpu_room import CONTEXT_BYTES, worker_bytes
from memserve.settings.sections import BatchConfig
from memserve.tokens import pack, pages_for
from test_cuda_engine import ENDS, HOWS, PAGES, drive
from test_model import GREEDY, Runner, prompt, tiny_spec

PROBLEM = gpu_rehearsal.missing()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"no rehearsal: {PROBLEM}")
PAGE_TOKENS = 16

BASE = attrs.evolve(tiny_spec(8, 2, 64), hidden=128, intermediate=256, vocab=1024, max_context=2048)
MODELS = {
    "groups of 4": BASE,
    "groups of 3": attrs.evolve(BASE, heads=6),
    "no groups": attrs.evolve(BASE, heads=2),
    "groups of 7": attrs.evolve(BASE, heads=7, kv_heads=1),
    "groups of 16": attrs.evolve(BASE, heads=16, kv_heads=1),
    "biases": attrs.evolve(BASE, qkv_bias=True),
    "normalised heads": attrs.evolve(BASE, qk_norm=True),
    # Every token runs through all experts, so that rounding changes no choice.
    "experts": attrs.evolve(BASE, intermediate=64, experts=6, experts_used=6),
    "heads of 128": attrs.evolve(BASE, heads=4, head_dim=128),
    "heads of 256": attrs.evolve(BASE, heads=4, head_dim=256),
}


@pytest.fixture(autouse=True)
def on_an_h100(monkeypatch):
    """Give the device as many multiprocessors as an H100 has, and forget earlier launches."""
    monkeypatch.setattr(flashinfer_kit, "_processors", lambda device: PROCESSORS)
    gpu_rehearsal.asked.clear()
    machine().launches()


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("name", MODELS)
def test_every_step_gets_the_models_logits(name, backend):
    """For every model shape FlashInfer accepts the steps, gives the model's logits, and asks only for libraries that
    are listed."""
    spec = MODELS[name]
    needs_compiled(spec, backend)
    weights = random_weights(spec, "bfloat16", 3)
    ours = FlashRunner(
        spec, weights, torch.bfloat16, library=Rehearsed, device=str(machine().device), backend=backend
    )
    theirs = Runner(spec, {key: tensor.float() for key, tensor in weights.items()})
    ids = [prompt(length, length, spec.vocab) for length in (70, 41)]

    def step(runner: Runner) -> list[torch.Tensor]:
        first, second = (runner.pages(90) for _ in ids)
        alike = (*first[:4], *second[4:])
        return [
            runner.step(Row(pack(ids[0][:33]), 0, first, GREEDY)),
            runner.step(Row(pack(ids[0][33:]), 33, first, GREEDY), Row(pack(ids[1]), 0, second, GREEDY)),
            runner.step(
                Row(pack([5]), 70, first, GREEDY),
                Row(pack([9] * 3), 41, second, None),
                Row(pack([7]), 70, (*alike[:4], *first[4:]), GREEDY),
            ),
        ]

    for found, exact in zip(step(ours), step(theirs), strict=True):
        assert float((found - exact).norm() / exact.norm()) < 0.05
    launched = [launch.kernel for launch in machine().launches()]
    for kernel in (
        "AppendPagedKVCache",
        "BatchPrefillWithPagedKVCache" if backend == "fa2" else "Prefill",
        "RMSNorm",
    ):
        assert any(kernel in one for one in launched), (kernel, set(launched))
    assert gpu_rehearsal.asked <= libraries(spec, backend), (
        "a worker would look for a library that nobody compiled"
    )


@pytest.mark.parametrize("heads", [2, 8])
def test_rows_that_begin_alike_get_the_logits_of_each_alone(heads):
    """Rows that share their first pages have these attended to once, with the logits that each row has alone."""
    spec = attrs.evolve(BASE, heads=heads)
    needs_compiled(spec, "fa2")
    weights = random_weights(spec, "bfloat16", 3)
    runners = [
        FlashRunner(spec, weights, torch.bfloat16, library=Rehearsed, device=str(machine().device))
        for _ in range(2)
    ]
    runners[0].least = 1
    logits = []
    for runner in runners:
        common, tails = runner.pages(64), [runner.pages(30) for _ in range(3)]
        runner.step(Row(pack(prompt(64, 1, spec.vocab)), 0, common, None))
        rows = [Row(pack([i]), 64, (*common, *tail), GREEDY) for i, tail in enumerate(tails)]
        machine().launches()
        logits.append(runner.step(*rows))
        merged = any("MergeStateInPlace" in launch.kernel for launch in machine().launches())
        assert merged == (runner.least is not None)
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.02
    assert gpu_rehearsal.asked <= libraries(spec, "fa2")


# ---- what the host may do while the device has not begun ---------------------------------------------------------


def test_a_copy_from_pinned_memory_reads_it_when_its_turn_comes():
    """The played device reads pinned memory when the copy runs, as a GPU does: arrays written too early show here."""
    device, pinned = machine().device, torch.full((4,), 1, dtype=torch.int32, pin_memory=True)
    there = torch.zeros(4, dtype=torch.int32, device=device)
    there.copy_(pinned, non_blocking=True)
    begun = machine().mark()
    doubled = there * 2
    pinned.fill_(5)
    machine().wait(begun)
    pinned.fill_(7)
    assert there.tolist() == [5] * 4 and doubled.tolist() == [10] * 4
    there.copy_(
        torch.full((4,), 3, dtype=torch.int32), non_blocking=True
    )  # of other memory the driver keeps a copy
    back = torch.zeros(4, dtype=torch.int32, pin_memory=True)
    back.copy_(there, non_blocking=True)
    assert back.tolist() == [0] * 4
    machine().wait(machine().mark())
    assert back.tolist() == [3] * 4


def test_a_graph_keeps_none_of_its_tensors():
    """A graph of the played device fails if one of its tensors was freed, where a GPU would read other data."""
    given, out = [torch.ones(4, device=machine().device)], torch.ones(4, device=machine().device)
    graph = machine().capture(lambda: out.add_(given[0]))
    for _ in range(2):
        graph.replay()
    assert out.tolist() == [3] * 4
    given.clear()
    graph.replay()
    with pytest.raises(RuntimeError, match="was freed before"):
        out.tolist()


def test_a_step_waits_once_however_many_rows_draw():
    """A step in which many rows draw waits for the device once, and once more to plan the next step."""
    spec = attrs.evolve(BASE, vocab=131)
    needs_compiled(spec, "fa2")
    device, weights = machine().device, random_weights(spec, "bfloat16", 3)
    arena = torch.zeros(PAGES + 1, *spec.page_shape(PAGE_TOKENS), dtype=torch.bfloat16, device=device)
    placed = {name: tensor.to(device) for name, tensor in weights.items()}
    engine = CudaEngine(spec, placed, arena, Rehearsed, Graphs(), rows=32, backend="fa2", max_context=64)
    engine.warm_up()
    asked = [some_adjustments(random.Random(i), 131) for i in range(24)]
    for start in range(2):
        rows = [
            Row(
                pack([3]),
                start,
                (i,),
                Sampling(temperature=1.0, top_p=0.9, top_k=5, seed=i, adjust=how),
                past,
            )
            for i, (how, past) in enumerate(asked)
        ]
        machine().waits()
        engine.run(BatchPlan(tuple(rows)))
        assert machine().waits() <= 2  # the other one is for the plan of the next step, while this one runs
    engine.close()


@pytest.mark.parametrize("new", [40, 1])
def test_what_a_step_wrote_is_there_when_it_returns(new):
    """When a step returns, the KV that it wrote is in memory, where other processes may read it."""
    spec = attrs.evolve(BASE, vocab=131)
    needs_compiled(spec, "fa2")
    device, weights = machine().device, random_weights(spec, "bfloat16", 3)
    arena = torch.zeros(PAGES + 1, *spec.page_shape(PAGE_TOKENS), dtype=torch.bfloat16, device=device)
    placed = {name: tensor.to(device) for name, tensor in weights.items()}
    engine = CudaEngine(spec, placed, arena, Rehearsed, Graphs(), rows=8, backend="fa2")
    engine.warm_up()
    arena.zero_()
    engine.run(BatchPlan((Row(pack([3] * new), 0, (0, 1, 2), None),)))
    raw = (ctypes.c_uint8 * arena[0].nbytes).from_address(
        arena.data_ptr()
    )  # as another process reads the page
    assert any(raw)
    engine.close()


# ---- captured steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [6, 8])
def test_captured_steps_draw_what_the_model_does(heads):
    """Tokens of captured steps are those of the model, whichever batch the graph was captured with."""
    spec = attrs.evolve(BASE, heads=heads, vocab=131)
    needs_compiled(spec, "fa2")
    weights = random_weights(spec, "bfloat16", 3)
    device = machine().device
    arena = torch.full(
        (PAGES + 1, *spec.page_shape(PAGE_TOKENS)), float("nan"), dtype=torch.bfloat16, device=device
    )
    placed = {name: tensor.to(device) for name, tensor in weights.items()}
    engine = CudaEngine(spec, placed, arena, Rehearsed, Graphs(), rows=8, backend="fa2", max_context=512)
    engine.warm_up()
    exact = Runner(spec, {name: tensor.float() for name, tensor in weights.items()})
    drawn, texts = drive(engine, spec, 1)
    engine.close()
    for how, whole, new in zip(HOWS, texts, drawn, strict=True):
        if not how.greedy:
            continue
        pages, begun = exact.pages(len(whole)), len(whole) - len(new)
        assert begun < len(whole)
        for at in range(begun, len(whole)):
            start = 0 if at == begun else at - 1
            (logits,) = exact.step(Row(pack(whole[start:at]), start, pages, GREEDY))
            if (past := past_of(how, whole[:at], begun, ENDS)) and how.adjust:
                logits = by_definition(logits, how.adjust, past)
            assert float(logits.max() - logits[whole[at]]) < 0.5  # of bfloat16; they lie 12 apart


# ---- memory ------------------------------------------------------------------------------------------------------


def test_a_worker_takes_no_more_than_was_planned_for_it():
    """A worker's peak memory stays within what is planned for it, which is all that torch's allocator may use."""
    spec = attrs.evolve(
        tiny_spec(32, 8, 64),
        layers=1,
        hidden=2048,
        intermediate=8192,
        vocab=128_256,
        max_context=8192,
        rope_theta=5e5,
    )
    needs_compiled(spec, "fa2")
    rows, chunk, device = 64, 1024, machine().device
    weights = {name: tensor.to(device) for name, tensor in random_weights(spec, "bfloat16", 3).items()}
    pages = 2 + pages_for(2 * chunk, PAGE_TOKENS)
    arena = torch.zeros(pages + 1, *spec.page_shape(PAGE_TOKENS), dtype=torch.bfloat16, device=device)
    machine().peak()
    held = machine().peak()
    engine = CudaEngine(spec, weights, arena, Rehearsed, Graphs(), rows=rows, backend="fa2")
    engine.warm_up()
    hot = Sampling(temperature=1.0, top_p=0.9, seed=4)
    prompts = [
        Row(pack([3] * chunk), 0, tuple(range(64)), hot),
        Row(pack([4] * chunk), 0, tuple(range(64, 128)), hot),
    ]
    engine.run(BatchPlan(tuple(prompts)))
    engine.run(BatchPlan(tuple(Row(pack([5]), 0, (i,), hot) for i in range(rows))))
    taken = machine().peak() - held
    planned = worker_bytes(spec, BatchConfig(rows=rows, chunk_tokens=chunk)) - CONTEXT_BYTES
    assert planned / 4 < taken <= planned, f"{taken >> 20} MiB taken, {planned >> 20} MiB planned"
    engine.close()


# ---- models of real sizes ----------------------------------------------------------------------------------------

SIZES = {
    "SmolLM2-135M": (9, 3, 64), "Llama-3.2-1B": (32, 8, 64), "Llama-3.2-3B": (24, 8, 128), "Llama-3-8B": (32, 8, 128),
    "Llama-3-70B": (64, 8, 128), "Qwen2.5-7B": (28, 4, 128), "Qwen3-0.6B": (16, 8, 128), "Qwen2.5-0.5B": (14, 2, 64),
}  # fmt: skip
"""Query heads, KV heads, and head dimension of each model."""


@pytest.fixture
def unrun():
    """Launch kernels without running them."""
    with machine().only_noting():
        yield


def attention_of(name: str, backend: str, most_rows: int) -> FlashInferAttention:
    """The attention of one layer of this model, on an arena of a few pages that are never read."""
    heads, kv_heads, head_dim = SIZES[name]
    needs_compiled(tiny_spec(heads, kv_heads, head_dim), backend)
    arena = torch.zeros(
        4, 1, 2, kv_heads, PAGE_TOKENS, head_dim, dtype=torch.bfloat16, device=machine().device
    )
    return FlashInferAttention(gpu_rehearsal.flashinfer(), arena, heads, backend, most_rows)


def row_of(new: int, before: int) -> Row:
    """A row whose pages are all the first one."""
    return Row(pack([0] * new), before, (0,) * pages_for(before + new, PAGE_TOKENS), Sampling())


@pytest.mark.parametrize("rows", [16, 256, 1024])
@pytest.mark.parametrize("name", SIZES)
def test_captured_batches_of_every_size_find_room(name, rows, unrun):
    """FlashInfer's workspace is large enough for every captured batch, and its plan does not depend on the context."""
    attention = attention_of(name, "fa2", rows)
    for bucket in buckets_up_to(rows):
        captured = attention.captured(bucket, 8192 * rows // PAGE_TOKENS)
        plans = []
        for context in (1, 100, 8191):
            table = Table.of([row_of(1, context)] * (bucket // 2 + 1), PAGE_TOKENS).padded(bucket, 3)
            captured.load(table, np.zeros(bucket, np.int32))
            plans.append(list(captured.plan.decode._plan_info))
        assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("name", SIZES)
def test_steps_of_every_shape_find_room(name, backend, unrun):
    """FlashInfer's workspace is large enough for long prompts and large mixed batches of real models."""
    attention = attention_of(name, backend, 16)
    device, (heads, kv_heads, head_dim) = attention.device, SIZES[name]
    shapes = (
        [(1, 131_071)],
        [(8192, 0)],
        [(512, 130_000)],
        [(2048, 6000)] * 4 + [(1, 9000)] * 200,
        [(1, 3)] * 512,
    )
    for shape in shapes:
        plan = attention.plan(BatchPlan(tuple(row_of(*one) for one in shape)))
        tokens = plan.tokens
        q = torch.empty(tokens, heads, head_dim, dtype=torch.bfloat16, device=device)
        k, v = (
            torch.empty(tokens, kv_heads, head_dim, dtype=torch.bfloat16, device=device) for _ in range(2)
        )
        attention.run(plan, 0, q, k, v, torch.empty_like(q))
    assert machine().launches()


@pytest.mark.parametrize("name", SIZES)
def test_many_rows_that_begin_alike_find_room(name, unrun):
    """FlashInfer's workspace is large enough for a batch whose rows share one long document."""
    attention = attention_of(name, "fa2", 256)
    if not attention.merges:
        pytest.skip("rows of so many heads are never merged")
    heads, kv_heads, head_dim = SIZES[name]
    document = tuple(range(1, 2001))
    rows = [Row(pack([0]), 32_000 + i % 16, (*document, 0, 0), GREEDY) for i in range(256)]
    tables = StepTables.of(BatchPlan(tuple(rows)), PAGE_TOKENS, 1)
    assert tables.common is not None
    plan = attention.plan_tables(tables)
    q = torch.empty(256, heads, head_dim, dtype=torch.bfloat16, device=attention.device)
    k, v = (
        torch.empty(256, kv_heads, head_dim, dtype=torch.bfloat16, device=attention.device) for _ in range(2)
    )
    attention.run(plan, 0, q, k, v, torch.empty_like(q))
    assert any("MergeStateInPlace" in launch.kernel for launch in machine().launches())
