"""What fits on a GPU: pages from the memory that weights and workers leave, and why a shard cannot be there.

Estimates of what a worker takes beside them are stated here and nowhere else; the worker holds its allocator to them.
"""

from __future__ import annotations

from collections.abc import Iterator

from memserve.config import Config
from memserve.engine.spec import ModelSpec
from memserve.settings.gpus import CAPABILITY_MIN, CPU_REMEDY, Gpu, Gpus, device_index
from memserve.settings.sections import BatchConfig, ShardConfig

CONTEXT_BYTES = 768 << 20
"""A CUDA context with the modules of torch and FlashInfer; an estimate, about half a gigabyte on Hopper."""
PLAN_BYTES = 320 << 20
"""FlashInfer's integer workspaces, 8 MiB for every captured batch size and three more, and what it allocates at a first use."""
WORKSPACE_MIN = 128 << 20
"""FlashInfer's float workspace, as its documentation advises; all wrappers share one: they run one after another."""
_ALIGNMENT = 1 << 10
"""Of the two arrays in it."""
PROCESSORS_MAX = 160
"""Multiprocessors of the largest GPU; a smaller one's workspace is smaller."""
SPARE = 0.03
"""Of a GPU's free memory: left for fragmentation and for what is not accounted here."""
HEAD_DIMS = (64, 128, 256)
"""What FlashInfer's fa2 and fa3 kernels are built for."""
DRAW_BYTES = 64
"""What a draw takes for each token of the vocabulary: float64 weights, their sums, and sorted ones with their indices."""
DRAWN_BYTES, DRAWN_LEAST = 256 << 20, 8
"""All draws that are made at once, and rows of them whatever they take."""
SCRATCH_PAGES = 1
"""Beyond the pool's pages: where the padding rows of a captured batch write."""


def workspace_bytes(heads: int, kv_heads: int, head_dim: int, rows: int, processors: int) -> int:
    """Of FlashInfer's float workspace, where kernels that split a row's context leave their parts before they are merged.

    Its plan ends with an error where it is smaller. A captured decode step always splits, in at least as many tiles as
    it has rows; fa2's prefill, of what rows attend to together too, splits into no more tiles than the GPU runs at a time.
    """
    group, at_once = heads // kv_heads, 2 * processors // kv_heads
    decode_tile, prefill_tile = 16 if group <= 16 else 64, 128  # query tokens times ``group``
    tiles = max(at_once, -(-rows * group // decode_tile) + rows - 1)
    most = max(tiles * decode_tile, at_once * prefill_tile)
    return max(WORKSPACE_MIN, most * heads * (head_dim + 1) * 4 + _ALIGNMENT)


def drawn_together(vocab: int) -> int:
    """Rows whose tokens are drawn at once: as many as there is room for, because each lot is launched by itself."""
    return max(DRAWN_LEAST, DRAWN_BYTES // (vocab * DRAW_BYTES))


def worker_bytes(spec: ModelSpec, batch: BatchConfig) -> int:
    """What one worker takes of a GPU beside the shared weights and pages: context, workspaces, a step's activations."""
    tokens = 2 * batch.chunk_tokens + batch.rows
    wide = 3 * spec.intermediate + 6 * spec.hidden + 2 * spec.head_dim * (spec.heads + 2 * spec.kv_heads)
    # Of the logits: bfloat16, float32, and float64 weights and sums of those that are drawn.
    rows = max(16, batch.rows * 3 // 2)  # of the largest captured batch size, at most
    logits = rows * spec.vocab * 6 + drawn_together(spec.vocab) * spec.vocab * DRAW_BYTES
    # Of rows that attend together: bfloat16 values of the common part, and float32 weights of both.
    together = batch.rows * spec.heads * (2 * spec.head_dim + 2 * 4)
    workspace = workspace_bytes(spec.heads, spec.kv_heads, spec.head_dim, rows, PROCESSORS_MAX)
    return CONTEXT_BYTES + PLAN_BYTES + workspace + 2 * tokens * wide + together + logits


def gpu_pages(
    config: Config, shard: ShardConfig, gpus: Gpus, weights: int, for_worker: int, page_bytes: int
) -> int:
    """Pages of a GPU's shard: of the memory written, or of what the GPU has left. 0 when there is no such GPU."""
    if shard.memory is not None:
        return shard.memory // page_bytes
    gpu = gpus.get(device_index(shard.device) or 0)
    return max(0, room(config, shard, gpu, weights, for_worker) // page_bytes - SCRATCH_PAGES) if gpu else 0


def room(config: Config, shard: ShardConfig, gpu: Gpu, weights: int, for_worker: int) -> int:
    """Bytes that the shard's pages may take on the GPU."""
    workers = sum(worker.shard == shard.name for worker in config.worker)
    return int(gpu.free_bytes * (1 - SPARE)) - weights - workers * for_worker - CONTEXT_BYTES


def gpu_problems(
    config: Config, spec: ModelSpec | None, gpus: Gpus, weights: int = 0, for_worker: int = 0
) -> Iterator[str]:
    """Why shards cannot be on the GPUs that they name. ``spec``: None where the model could not be read."""
    taken: dict[int, int] = {}
    for i, shard in enumerate(config.shard):
        index = device_index(shard.device)
        if index is None:
            continue
        if index in taken:
            yield f"shard[{i}].device must be another than shard[{taken[index]}]'s: one shard owns a GPU, {shard.device}"
        elif (why := _unusable(gpus, index, i)) is not None:
            yield why
        elif (
            (gpu := gpus.get(index))
            and shard.memory
            and shard.memory > (left := room(config, shard, gpu, weights, for_worker))
        ):
            yield (
                f"shard[{i}].memory must fit in what weights and workers leave of {shard.device} "
                f"({max(left, 0) >> 20} MiB), not {shard.memory >> 20} MiB: lower it, or leave it out"
            )
        taken.setdefault(index, i)
        yield from _unsuited(config, spec, i, shard.device)
        if gpus.problem:
            return  # one line is enough


def _unusable(gpus: Gpus, index: int, i: int) -> str | None:
    asked = f"shard[{i}].device is cuda:{index}"
    if gpus.problem:
        return f"{asked}, but {gpus.problem}; {CPU_REMEDY}"
    gpu = gpus.get(index)
    if gpu is None:
        known = ", ".join(f"cuda:{one.index}" for one in gpus.found)
        return f"{asked}, but this machine has {known}; {CPU_REMEDY}"
    if gpu.capability < CAPABILITY_MIN:
        need = ".".join(map(str, CAPABILITY_MIN))
        have = ".".join(map(str, gpu.capability))
        return f"{asked}, a {gpu.name} of compute capability {have}: {need} or more is needed; {CPU_REMEDY}"
    return None


def _unsuited(config: Config, spec: ModelSpec | None, i: int, device: str) -> Iterator[str]:
    on = f"with shard[{i}] on {device}"
    if config.model.dtype != "bfloat16":
        yield f"model.dtype must be bfloat16 {on}, not {config.model.dtype}: FlashInfer has no float32 attention"
    if config.model.weights != "dtype":
        yield f"model.weights must be dtype {on}, not {config.model.weights}: int8 is for CPUs"
    if spec is not None and spec.head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        yield f"model.path must name a model with heads of {known} {on}, not of {spec.head_dim}; {CPU_REMEDY}"
