"""Speed of the GPU backend beside what the GPU can do: ``make gpu-bench``; the ceilings are measured first.

Prints a table with goals beside figures and writes ``$OUT/gpu-bench.json`` (or ``.gpu/gpu-bench.json``). Random weights in
the shapes of Llama 3.2 1B and Llama 3.1 8B, on pages that this process holds itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memserve.engine.convert import weight_shapes
from memserve.engine.cuda import CudaEngine, CudaGraphs
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.spec import ModelSpec
from memserve.kernels.flashinfer_kit import FlashInferAttention, load_flashinfer, prefill_backend
from memserve.kernels.page_tables import StepTables
from memserve.messages import Sampling
from memserve.tokens import pack, pages_for

DEVICE = torch.device("cuda", 0)
GREEDY = Sampling(temperature=0.0)
SHAPES = {"1b": (16, 2048, 8192, 32, 8, 64, 128256), "8b": (32, 4096, 14336, 32, 8, 128, 128256)}
"""Layers, hidden, intermediate, heads, kv heads, head dim, vocabulary."""
ROUNDS = 5


def spec_of(name: str) -> ModelSpec:
    """A Llama of one of the shapes."""
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocab = SHAPES[name]
    return ModelSpec(
        name=name, architecture="llama", layers=layers, hidden=hidden, intermediate=intermediate, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, vocab=vocab, rope_theta=500_000.0, rms_eps=1e-5, max_context=16384,
        tied_embeddings=name == "1b", bos=None, eos=(0,), chat_template=None,
    )  # fmt: skip


def seconds(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median seconds of ``run`` on the device, after one that does not count."""
    run()
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return statistics.median(found)


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read and written), bfloat16 FLOP/s of a product, bytes a second from pinned memory and back."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    return {
        "copy_bytes_s": 2 * (1 << 30) / seconds(lambda: target.copy_(source)),
        "matrix_flop_s": 2 * 8192**3 / seconds(lambda: a @ b),
        "to_device_bytes_s": (1 << 30) / seconds(lambda: target.copy_(host, non_blocking=True)),
        "to_host_bytes_s": (1 << 30) / seconds(lambda: host.copy_(target, non_blocking=True)),
    }


def decode_attention(roof: dict[str, float], library: Any, dense: bool) -> float:
    """Share of the copy's bandwidth that decode attention reads: 64 rows of 2,048 tokens on scattered pages."""
    rows, context, layers = 64, 2048, 1 if dense else 8
    pages = rows * context // 16
    # Dense: one tensor a layer, eight of them. Strided: eight layers in a page, as the arena has them.
    arenas = [
        torch.randn(pages, layers, 2, 8, 16, 128, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(8 if dense else 1)
    ]
    order = torch.randperm(pages).tolist()
    each = context // 16
    plan = BatchPlan(
        tuple(
            Row(pack([1]), context - 1, tuple(order[i * each : (i + 1) * each]), GREEDY) for i in range(rows)
        )
    )
    q, out = (torch.randn(rows, 32, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    attentions = [FlashInferAttention(library, arena, 32, "fa2") for arena in arenas]
    planned = [one.plan_tables(StepTables.of(plan, 16)) for one in attentions]

    def run() -> None:
        for layer in range(8):
            at, inner = (layer, 0) if dense else (0, layer)
            planned[at].decode.run(q, arenas[at][:, inner], out=out)

    graph = CudaGraphs(DEVICE).capture(run)
    return 8 * rows * context * 2 * 8 * 128 * 2 / seconds(graph, 20) / roof["copy_bytes_s"]


def make_engine(spec: ModelSpec, pages: int, library: Any, rows: int) -> tuple[CudaEngine, int]:
    """An engine on random weights, and the bytes that a decode step reads of them."""
    weights = {
        name: torch.ones(shape, device=DEVICE)
        if len(shape) == 1
        else torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(shape[1] ** -0.5)
        for name, shape in weight_shapes(spec).items()
    }
    read = sum(t.nbytes for name, t in weights.items() if name != "embed" or spec.tied_embeddings)
    arena = torch.zeros(pages + 1, *spec.page_shape(16), device=DEVICE, dtype=torch.bfloat16)
    backend = prefill_backend(torch.cuda.get_device_capability(DEVICE))
    engine = CudaEngine(spec, weights, arena, library, CudaGraphs(DEVICE), rows=rows, backend=backend)
    engine.warm_up()
    return engine, read


def steps(
    engine: CudaEngine, spec: ModelSpec, pages: int, read: int, roof: dict[str, float]
) -> list[dict[str, Any]]:
    """Decode steps and prefills through ``CudaEngine.run``, the host's part included."""
    found: list[dict[str, Any]] = []
    for batch in (1, 8, 64, 256):
        for context in (1024, 8192):
            each = pages_for(context + 40, 16)
            if batch * each > pages:
                continue
            tables = [tuple(range(i * each, (i + 1) * each)) for i in range(batch)]
            times = []
            for step in range(30):
                plan = BatchPlan(tuple(Row(pack([1]), context + step, table, GREEDY) for table in tables))
                began = time.perf_counter()
                engine.run(plan)
                times.append(time.perf_counter() - began)
            took = statistics.median(times[5:])
            least = (read + batch * context * spec.kv_values_per_token * 2) / roof["copy_bytes_s"]
            found.append(
                {
                    "what": f"{spec.name} decode, batch {batch}, context {context}",
                    "ms": took * 1000,
                    "share": least / took,
                    "goal": 0.7 if spec.name == "8b" else None,
                }
            )
    layer_flop = sum(
        shape[0] * shape[1]
        for name, shape in weight_shapes(spec).items()
        if len(shape) == 2 and name not in ("embed", "head")
    )
    for length in (2048, 8192):
        if pages_for(length, 16) > pages:
            continue
        row = Row(pack([1] * length), 0, tuple(range(pages_for(length, 16))), GREEDY)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            engine.run(BatchPlan((row,)))
            times.append(time.perf_counter() - began)
        took = statistics.median(times[1:])
        flop = 2 * length * layer_flop + 2 * length**2 * spec.heads * spec.head_dim * spec.layers
        goal = 0.55 if length == 8192 else None
        found.append(
            {
                "what": f"{spec.name} prefill {length}",
                "ms": took * 1000,
                "share": flop / took / roof["matrix_flop_s"],
                "goal": goal,
            }
        )
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--pages", type=int, default=20000, help="of 16 tokens")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "gpu-bench needs an NVIDIA GPU and a torch built with CUDA; make bench-engine measures CPUs"
        )
    torch.cuda.set_device(DEVICE)
    library = load_flashinfer(torch.cuda.get_device_capability(DEVICE), spec_of("8b"))
    with torch.inference_mode():
        roof = ceilings()
        print(json.dumps(roof), flush=True)
        strided, dense = decode_attention(roof, library, False), decode_attention(roof, library, True)
        rows = [
            {"what": "decode attention, aggregated pages", "ms": None, "share": strided, "goal": 0.8},
            {"what": "aggregated pages against dense", "ms": None, "share": strided / dense, "goal": 0.97},
        ]
        for name in given.shapes.split(","):
            spec = spec_of(name)
            engine, read = make_engine(spec, given.pages, library, 256)
            rows += steps(engine, spec, given.pages, read, roof)
            engine.close()
            del engine
            torch.cuda.empty_cache()
    print("\n| what | ms | share of the ceiling | goal |\n|---|---|---|---|")
    for row in rows:
        ms = "" if row["ms"] is None else f"{row['ms']:.2f}"
        print(f"| {row['what']} | {ms} | {row['share']:.2f} | {row['goal'] or ''} |")
    folder = Path(os.environ.get("OUT") or Path(__file__).parent.parent / ".gpu")
    folder.mkdir(exist_ok=True)
    about = {
        "device": torch.cuda.get_device_name(DEVICE),
        "torch": torch.__version__,
        "ceilings": roof,
        "rows": rows,
    }
    (folder / "gpu-bench.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
