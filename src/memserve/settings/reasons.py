"""The reason for each value that the user did not set, for `memserve check`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from memserve.config import Config, Reason, Resolved
from memserve.engine.spec import ModelSpec
from memserve.settings.machine import Machine
from memserve.settings.rules import size_text


def reasons(resolved: Resolved, weights: int, machine: Machine) -> Iterator[Reason]:
    """All reasons, in the order in which they are shown. ``weights``: their size in bytes."""
    yield from _of_model(resolved, weights)
    yield from _of_pages(resolved)
    yield from _of_workers(resolved, machine)
    free = f"{size_text(machine.free_bytes)} free"
    yield Reason("memory", free, "what the system and control groups leave, before start")
    yield Reason("logging.dir", resolved.log_dir, "a directory for each run")
    why = "from the user and logging.dir; one cluster at a time"
    yield Reason("runtime directory", resolved.runtime_dir, why)
    yield from _of_access(resolved)


def _of_model(resolved: Resolved, weights: int) -> Iterator[Reason]:
    config, spec = resolved.config, resolved.spec
    form = "Hugging Face directory" if Path(resolved.model_path).is_dir() else "GGUF file"
    shape = f"{spec.architecture}, {spec.layers} layers, {spec.kv_heads} kv heads"
    yield Reason("model", resolved.model_path, f"{spec.name}: {form}, {shape}")
    where = "once on each GPU, shared by its workers" if resolved.on_gpus else "mapped once for all workers"
    yield Reason("model.weights", size_text(weights), f"as {config.model.stored}, {where}")
    why = "model.max_context" if config.model.max_context else context_limit(config, spec)
    yield Reason("model.max_context", f"{resolved.max_context} tokens", why)
    per_token = (
        f"{spec.layers} layers x 2 x {spec.kv_heads} heads x {spec.head_dim} values of {config.model.dtype}"
    )
    page = f"{config.pool.page_tokens} tokens x {per_token}"
    yield Reason("pool.page", size_text(resolved.page_bytes), page)


def _of_pages(resolved: Resolved) -> Iterator[Reason]:
    page_tokens = resolved.config.pool.page_tokens
    for shard in resolved.config.shard:
        pages = resolved.shard_pages[shard.name]
        contexts = pages * page_tokens / resolved.max_context
        memory = shard.device if shard.on_gpu else "memory"
        why = (
            f"{size_text(resolved.arena_bytes(shard))} of {memory}: {pages * page_tokens} tokens,"
            f" {contexts:.1f} full contexts"
        )
        yield Reason(f"shard.{shard.name}", f"{pages} pages", why)
    for tier, pages, where in (
        ("host", resolved.host_pages, "memory"),
        ("disk", resolved.disk_pages, resolved.disk_dir),
    ):
        if pages:
            nbytes = size_text(pages * resolved.page_bytes)
            why = f"{nbytes} in {where} for each shard: {pages * page_tokens} tokens"
            yield Reason(f"pool.{tier}", f"{pages} pages", why)


def _of_workers(resolved: Resolved, machine: Machine) -> Iterator[Reason]:
    for worker in resolved.config.worker:
        shard = resolved.shard(worker.shard)
        if shard.on_gpu:
            room = f"{size_text(resolved.gpu_worker_bytes)} of {shard.device}"
            yield Reason(f"worker.{worker.name}", room, "its workspaces, activations and CUDA context")
        else:
            why = _threads_why(worker.threads, machine)
            yield Reason(f"worker.{worker.name}.threads", str(resolved.threads[worker.name]), why)


def _of_access(resolved: Resolved) -> Iterator[Reason]:
    if network := resolved.network:
        why = (
            f"the scheduler's: {network.head}"
            if network.joins
            else "this host's scheduler, which others join"
        )
        yield Reason("cluster", network.address, why)
    frontend = resolved.config.frontend
    if not frontend.api_keys:
        others = ", any web page in a browser included" if "*" in frontend.cors_origins else ""
        why = f"whoever reaches the port may use it{others}, and all share one cache"
        yield Reason("frontend.api_keys", "none", why)


def most_context(config: Config, spec: ModelSpec) -> int:
    """The longest context that can be served; on a GPU, where attention is full, the model's sliding window."""
    return spec.full_context if any(shard.on_gpu for shard in config.shard) else spec.max_context


def context_limit(config: Config, spec: ModelSpec) -> str:
    """What limits a model's context, in words."""
    if most_context(config, spec) == spec.max_context:
        return "what the model was trained for"
    return "the model's sliding window, as attention on a GPU is full"


def _threads_why(asked: int | None, machine: Machine) -> str:
    if asked is None:
        return (
            f"the machine's usable cores ({machine.cores}), shared with the other workers as they fall idle"
        )
    if asked > machine.cores:
        return f"{asked} asked for, but this process may use {machine.cores} cores"
    return "as written"
