"""What fits on a GPU, and why a shard cannot be on one. Pages get the memory that weights and workers leave.

The estimates of what a worker takes in addition are stated here and nowhere else; the worker limits its
allocator to them.
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
"""FlashInfer's allocations at first use, and 8 MiB of integer workspace per captured batch size plus
three.
"""
WORKSPACE_MIN = 128 << 20
"""Size of FlashInfer's float workspace that its documentation advises.

Wrappers run one after another and share one.
"""
_ALIGNMENT = 1 << 10
"""Bytes for the alignment of the two arrays in the float workspace."""
PROCESSORS_MAX = 160
"""Multiprocessors of the largest GPU; a smaller one needs less workspace."""
SPARE = 0.03
"""Share of a GPU's free memory left for fragmentation and for allocations that are not counted here."""
HEAD_DIMS = (64, 128, 256)
"""Head dimensions that FlashInfer's fa2 and fa3 kernels are built for."""
DRAW_BYTES = 64
"""Bytes of a draw per vocabulary token: float64 weights, their sums, and sorted ones with their indices."""
DRAWN_BYTES, DRAWN_LEAST = 256 << 20, 8
"""Most bytes for all rows that are drawn at once, and the least number of rows, whatever they take."""
SCRATCH_PAGES = 1
"""Pages beyond the pool's, for the padding rows of a captured batch to write to."""


def workspace_bytes(heads: int, kv_heads: int, head_dim: int, rows: int, processors: int) -> int:
    """Size of FlashInfer's float workspace in bytes.

    Kernels that split a row's context keep partial results in it until they are merged. FlashInfer's plan
    fails if it is too small. A captured decode step always splits, into at least as many tiles as it has
    rows. fa2's prefill, and with it the prefix that rows attend to together, splits into at most as many
    tiles as the GPU runs at a time.
    """
    group, at_once = heads // kv_heads, 2 * processors // kv_heads
    decode_tile, prefill_tile = 16 if group <= 16 else 64, 128  # query tokens times ``group``
    tiles = max(at_once, -(-rows * group // decode_tile) + rows - 1)
    most = max(tiles * decode_tile, at_once * prefill_tile)
    return max(WORKSPACE_MIN, most * heads * (head_dim + 1) * 4 + _ALIGNMENT)


def drawn_together(vocab: int) -> int:
    """How many rows' tokens are drawn at once: as many as fit, because each group is a launch of its own."""
    return max(DRAWN_LEAST, DRAWN_BYTES // (vocab * DRAW_BYTES))


def worker_bytes(spec: ModelSpec, batch: BatchConfig) -> int:
    """GPU memory of one worker besides shared weights and pages: context, workspaces and activations."""
    tokens = 2 * batch.chunk_tokens + batch.rows
    wide = 6 * spec.hidden + 2 * spec.head_dim * (spec.heads + 2 * spec.kv_heads)
    wide += _expert_values(spec) if spec.experts else 3 * spec.intermediate
    # The logits in bfloat16 and float32, of captured steps and of others, and the float64 weights and sums of
    # those rows that are drawn at once.
    rows = max(16, batch.rows * 3 // 2)  # of the largest captured batch size, at most
    logits = (rows + batch.rows) * spec.vocab * 6 + drawn_together(spec.vocab) * spec.vocab * DRAW_BYTES
    # Cosines and sines of all positions: torch's table, which biases need, has each of them twice.
    angles = spec.max_context * spec.head_dim * 4 * (2 if spec.qkv_bias else 1)
    # Rows that attend together: bfloat16 values of the common part, and float32 weights of both parts.
    together = batch.rows * spec.heads * (2 * spec.head_dim + 2 * 4)
    workspace = workspace_bytes(spec.heads, spec.kv_heads, spec.head_dim, rows, PROCESSORS_MAX)
    routers = spec.layers * spec.experts * spec.hidden * 4  # each worker's own, in float32
    fixed = CONTEXT_BYTES + PLAN_BYTES + workspace + routers
    return fixed + 2 * tokens * wide + together + logits + angles


def _expert_values(spec: ModelSpec) -> int:
    """Activations of one token in a layer of experts, counted in bfloat16 values.

    For each expert that it runs through: its input, output and the output in its place, in float32 once it is
    weighted; gate, up and their product. Then the router's float32 input and, for all experts, its logits,
    ordered ones and their numbers.
    """
    return spec.experts_used * (3 * spec.intermediate + 5 * spec.hidden) + 2 * spec.hidden + 8 * spec.experts


def gpu_pages(
    config: Config, shard: ShardConfig, gpus: Gpus, weights: int, for_worker: int, page_bytes: int
) -> int:
    """Pages of a GPU's shard, from configured memory or what the GPU has left. 0 if the GPU is missing."""
    if shard.memory is not None:
        return shard.memory // page_bytes
    gpu = gpus.get(device_index(shard.device) or 0)
    return max(0, room(config, shard, gpu, weights, for_worker) // page_bytes - SCRATCH_PAGES) if gpu else 0


def room(config: Config, shard: ShardConfig, gpu: Gpu, weights: int, for_worker: int) -> int:
    """Bytes of the GPU's memory that the shard's pages may take."""
    workers = sum(worker.shard == shard.name for worker in config.worker)
    return int(gpu.free_bytes * (1 - SPARE)) - weights - workers * for_worker - CONTEXT_BYTES


def gpu_problems(
    config: Config, spec: ModelSpec | None, gpus: Gpus, weights: int = 0, for_worker: int = 0
) -> Iterator[str]:
    """Why shards cannot be on the GPUs that they name. ``spec`` is None if the model could not be read."""
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
            return  # it concerns all shards, so one line is enough


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
