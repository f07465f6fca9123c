"""Sections of ``bench/gpu.py`` that compute: decode attention, whole steps, prefill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gpu_parts import (
    DEVICE,
    GREEDY,
    PAGE_TOKENS,
    Ceilings,
    Figure,
    decode_s,
    device_s,
    engine_on,
    host_s,
    pages_that_fit,
    private_pages,
    prompt_rows,
    some_ids,
    spec_of,
    tables_of,
    tried,
    weights_for,
)
from memserve.engine.convert import weight_shapes
from memserve.engine.cuda import CudaEngine, CudaGraphs
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.spec import ModelSpec
from memserve.kernels.flashinfer_kit import FlashInferAttention, load_flashinfer
from memserve.kernels.page_tables import GRAPH_BYTES, Sharing, StepTables
from memserve.tokens import pack, pages_for

LAYERS = 8
"""Layers of the attention runs: their KV is larger than the GPU's caches."""
ATTENDED = ((8, 8192), (64, 2048), (256, 1024))
"""Rows and context tokens for which attention is timed alone."""
BATCHES, CONTEXTS = (1, 8, 64, 256), (1024, 8192)
PROMPTS = (2048, 8192)
ALIKE = ((64, 8192), (64, 2048), (8, 2048))
"""Rows and tokens of their common prefix; each row has ``OWN`` more tokens."""
OWN = 256
STEPS = 30


def ceilings(roof: Ceilings) -> Iterator[Figure]:
    """The ceilings themselves, with which the other sections are compared."""
    yield Figure("copy in the GPU's memory, read and written", roof.copy / 1e9, "GB/s")
    yield Figure("product of bfloat16 matrices, 8192 x 8192", roof.matrix / 1e12, "TFLOP/s")
    yield Figure("pinned host memory to the GPU", roof.to_device / 1e9, "GB/s")
    yield Figure("the GPU to pinned host memory", roof.to_host / 1e9, "GB/s")


def attention(roof: Ceilings) -> Iterator[Figure]:
    """Decode attention of an 8B model's layers on scattered pages, aggregated or in one tensor per layer."""
    spec = spec_of("8b")
    library = load_flashinfer(torch.cuda.get_device_capability(DEVICE), spec)
    for rows, context in ATTENDED:
        what = f"decode attention, {rows} rows of {context} tokens"
        yield tried(what, "of the copy's bandwidth", _attended, roof, library, spec, rows, context)
    rows, context = ATTENDED[1]
    what = f"aggregated pages, {rows} rows of {context} tokens"
    yield tried(what, "of a dense tensor a layer", _aggregated, library, spec, rows, context)


def _attended(
    what: str, unit: str, roof: Ceilings, library: Any, spec: ModelSpec, rows: int, context: int
) -> Figure:
    rate = _attention_rate(library, spec, rows, context, dense=False)
    return Figure(what, rate / roof.copy, unit, 0.8, note=f"{rate / 1e9:.0f} GB/s")


def _aggregated(what: str, unit: str, library: Any, spec: ModelSpec, rows: int, context: int) -> Figure:
    pairs = [[_attention_rate(library, spec, rows, context, one) for one in (False, True)] for _ in range(3)]
    strided, dense = map(max, zip(*pairs, strict=True))
    note = f"{strided / 1e9:.0f} against {dense / 1e9:.0f} GB/s, the better of 3 each, in turn"
    return Figure(what, strided / dense, unit, 0.97, note=note)


def _attention_rate(library: Any, spec: ModelSpec, rows: int, context: int, dense: bool) -> float:
    """Bytes of KV that attention reads per second. ``dense``: one tensor per layer."""
    each, page = context // PAGE_TOKENS, spec.page_shape(PAGE_TOKENS)[1:]
    # Dense: one tensor per layer. Strided: each page holds all layers, as in the arena.
    arenas = [
        torch.randn(rows * each, 1 if dense else LAYERS, *page, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(LAYERS if dense else 1)
    ]
    order = torch.randperm(rows * each).tolist()
    tables = [tuple(order[i * each : (i + 1) * each]) for i in range(rows)]
    plan = BatchPlan(tuple(Row(pack([1]), context - 1, table, GREEDY) for table in tables))
    q, out = (
        torch.randn(rows, spec.heads, spec.head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
    )
    attentions = [FlashInferAttention(library, arena, spec.heads, "fa2") for arena in arenas]
    planned = [one.plan_tables(StepTables.of(plan, PAGE_TOKENS)) for one in attentions]

    def run() -> None:
        for layer in range(LAYERS):
            at, inner = (layer, 0) if dense else (0, layer)
            planned[at].decode.run(q, arenas[at][:, inner], out=out)

    graph = CudaGraphs(DEVICE).capture(run)
    return LAYERS * rows * context * 2 * spec.kv_heads * spec.head_dim * 2 / device_s(graph, 20)


def steps(name: str, roof: Ceilings) -> Iterator[Figure]:
    """Decode steps and prefills of a whole model through ``CudaEngine``, host time included."""
    spec = spec_of(name)
    weights = weights_for(spec)
    read = sum(t.nbytes for key, t in weights.items() if key != "embed" or spec.tied_embeddings)
    pages = pages_that_fit(spec, max(BATCHES) * pages_for(max(CONTEXTS) + STEPS, PAGE_TOKENS))
    engine = engine_on(spec, weights, private_pages(spec, pages), max(BATCHES), max(CONTEXTS) + STEPS)
    for context in CONTEXTS:
        for batch in BATCHES:
            what = f"{spec.name} decode step, {batch} rows of {context} tokens"
            unit = "of the bandwidth's roofline"
            yield tried(what, unit, _decode, engine, spec, read, roof, batch, context, pages)
    for length in PROMPTS:
        what = f"{spec.name} prefill of {length} tokens"
        yield tried(what, "of the measured matrix rate", _prefill, engine, spec, roof, length)
    engine.close()


def _decode(
    what: str, unit: str, engine: CudaEngine, spec: ModelSpec, read: int, roof: Ceilings, batch: int, context: int,
    pages: int,
) -> Figure:  # fmt: skip
    need = batch * pages_for(context + STEPS, PAGE_TOKENS)
    if need > pages:
        return Figure(what, None, unit, note=f"does not fit: {need} pages, {pages} are there")
    took, alone = (decode_s(engine, batch, context, STEPS, overlap=overlap) for overlap in (True, False))
    least = (read + batch * context * spec.kv_values_per_token * 2) / roof.copy
    goal = 0.7 if spec.name == "8b" else None
    note = f"{took * 1e3:.2f} ms, {batch / took:.0f} tokens/s; {alone * 1e3:.2f} ms if steps do not overlap"
    return Figure(what, least / took, unit, goal, note=note)


def alike(roof: Ceilings) -> Iterator[Figure]:
    """Rows with a common prefix: the speedup of attending to it together, in attention and whole steps."""
    spec = spec_of("8b")
    library = load_flashinfer(torch.cuda.get_device_capability(DEVICE), spec)
    for rows, common in ALIKE:
        what = f"decode attention, {rows} rows after {common} common tokens"
        yield tried(what, "times as fast as each for itself", _alike_attention, library, spec, rows, common)
    most = max(tables_of(rows, common + OWN + STEPS, common)[-1][-1] for rows, common in ALIKE) + 1
    engine = engine_on(
        spec, weights_for(spec), private_pages(spec, most), max(rows for rows, _ in ALIKE),
        max(common for _, common in ALIKE) + OWN + STEPS,
    )  # fmt: skip
    for rows, common in ALIKE:
        what = f"{spec.name} decode step, {rows} rows after {common} common tokens"
        unit = "times as fast as each for itself in a CUDA graph"
        yield tried(what, unit, _alike_step, engine, spec, rows, common)
    engine.close()


def _alike_attention(what: str, unit: str, library: Any, spec: ModelSpec, rows: int, common: int) -> Figure:
    apart, together = (_alike_attention_s(library, spec, rows, common, least) for least in (None, 1))
    note = f"{together * 1e3:.2f} against {apart * 1e3:.2f} ms of {LAYERS} layers, both in a CUDA graph"
    return Figure(what, apart / together, unit, note=note)


def _alike_attention_s(library: Any, spec: ModelSpec, rows: int, common: int, least: int | None) -> float:
    tables = tables_of(rows, common + OWN, common)
    page = spec.page_shape(PAGE_TOKENS)[1:]
    arena = torch.randn(tables[-1][-1] + 1, LAYERS, *page, device=DEVICE, dtype=torch.bfloat16)
    order = torch.randperm(len(arena)).tolist()
    plan = BatchPlan(
        tuple(Row(pack([1]), common + OWN - 1, tuple(order[i] for i in table), GREEDY) for table in tables)
    )
    attention = FlashInferAttention(library, arena, spec.heads, "fa2", rows)
    planned = attention.plan_tables(StepTables.of(plan, PAGE_TOKENS, least))
    q, out = (
        torch.randn(rows, spec.heads, spec.head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
    )
    k, v = (
        torch.randn(rows, spec.kv_heads, spec.head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
    )

    def run() -> None:
        for layer in range(LAYERS):
            attention.run(planned, layer, q, k, v, out)

    return device_s(CudaGraphs(DEVICE).capture(run), 20)


def _alike_step(what: str, unit: str, engine: CudaEngine, spec: ModelSpec, rows: int, common: int) -> Figure:
    took = []
    for sharing in (Sharing(None, None), Sharing(1, 1)):
        engine.sharing = sharing
        took.append(decode_s(engine, rows, common + OWN, STEPS, common))
    spared = (rows - 1) * common * spec.kv_heads * spec.head_dim * 2 * 2  # bytes per layer
    used = spared >= GRAPH_BYTES
    return Figure(
        what, took[0] / took[1], unit, 1.0 if used else None,
        note=f"{took[1] * 1e3:.2f} against {took[0] * 1e3:.2f} ms; {'used' if used else 'not used'}, {spared >> 20} MiB a layer are spared",
    )  # fmt: skip


def _prefill(
    what: str, unit: str, engine: CudaEngine, spec: ModelSpec, roof: Ceilings, length: int
) -> Figure:
    (plan,) = prompt_rows(
        some_ids(length, 1, spec.vocab), tuple(range(pages_for(length, PAGE_TOKENS))), length
    )
    took = host_s(lambda: engine.run(plan), 4)
    layers = sum(
        shape[0] * shape[1]
        for key, shape in weight_shapes(spec).items()
        if len(shape) == 2 and key not in ("embed", "head")
    )
    flop = 2 * length * layers + 2 * length**2 * spec.heads * spec.head_dim * spec.layers
    goal = 0.55 if (spec.name, length) == ("8b", 8192) else None
    return Figure(what, flop / took / roof.matrix, unit, goal, note=f"{took * 1e3:.1f} ms")
