"""Decides on one machine what a configuration leaves open: pages, threads, paths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs

from memserve.config import Config, Resolved
from memserve.engine.checkpoint import read_spec
from memserve.engine.spec import STORED_BYTES, ModelSpec, find_model
from memserve.errors import ConfigError, UserError
from memserve.settings.gpu_room import gpu_pages, gpu_problems, worker_bytes
from memserve.settings.gpus import Gpus
from memserve.settings.machine import Machine
from memserve.settings.network import find_network
from memserve.settings.reasons import context_limit, most_context, reasons
from memserve.settings.rules import expanded, size_text
from memserve.tokens import pages_for


def resolve(config: Config, machine: Machine | None = None) -> Resolved:
    """Decide everything that the configuration leaves open, for this machine unless another is given.

    Raises ConfigError with every problem found, one per line.
    """
    machine = machine or Machine.here(config.logging.dir)
    gpus = machine.gpus() if any(shard.on_gpu for shard in config.shard) else Gpus()
    try:
        model_path = find_model(config.model.path)
        spec = read_spec(model_path)
    except UserError as error:
        others = [
            *memory_problems(config, 0, machine),
            *log_problems(machine),
            *gpu_problems(config, None, gpus),
        ]
        raise ConfigError("\n".join([str(error), *others])) from error
    weights = weight_bytes(spec, config.model.stored)
    resolved = decide(config, machine, model_path, spec, weights, gpus)
    problems: list[str] = []
    try:
        resolved = attrs.evolve(resolved, network=find_network(config.cluster))
    except UserError as error:
        problems.append(str(error))
    problems += [
        *gpu_problems(config, spec, gpus, weights, resolved.gpu_worker_bytes),
        *context_problems(resolved, gpus),
        *memory_problems(config, weights, machine),
        *log_problems(machine),
        *disk_problems(resolved),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return attrs.evolve(resolved, reasons=tuple(reasons(resolved, weights, machine)))


def decide(
    config: Config, machine: Machine, model_path: Path, spec: ModelSpec, weights: int, gpus: Gpus
) -> Resolved:
    """The decisions, unchecked and without their reasons. ``weights``: their size in bytes."""
    page_bytes = spec.page_bytes(config.pool.page_tokens, config.model.dtype)
    for_worker = worker_bytes(spec, config.batch)
    return Resolved(
        config=config,
        model_path=str(model_path),
        spec=spec,
        max_context=config.model.max_context or most_context(config, spec),
        page_bytes=page_bytes,
        shard_pages={
            shard.name: gpu_pages(config, shard, gpus, weights, for_worker, page_bytes)
            if shard.on_gpu
            else shard.host_memory // page_bytes
            for shard in config.shard
        },
        gpu_worker_bytes=for_worker,
        threads={
            worker.name: min(worker.threads or machine.cores, machine.cores) for worker in config.worker
        },
        cores=machine.cores,
        run=machine.run,
        log_dir=machine.log_dir,
        runtime_dir=machine.runtime_dir,
        reasons=(),
        host_pages=config.pool.host_bytes // page_bytes,
        disk_pages=config.pool.disk_bytes // page_bytes,
        disk_dir=str(expanded(config.pool.disk_path or machine.log_dir, "pool.disk_path").resolve()),
    )


def weight_bytes(spec: ModelSpec, stored: str) -> int:
    """Bytes of the weights, which all workers of a host map once."""
    attention = 2 * spec.hidden * spec.head_dim * (spec.heads + spec.kv_heads)
    mlp_rows = spec.mlps * (2 * spec.intermediate + spec.hidden)
    rows = spec.head_dim * (spec.heads + 2 * spec.kv_heads) + spec.hidden + mlp_rows
    tables = 1 if spec.tied_embeddings else 2
    matrices = tables * spec.vocab * spec.hidden + spec.layers * (
        attention + spec.mlps * 3 * spec.hidden * spec.intermediate
    )
    routers = spec.layers * spec.experts * spec.hidden
    float32s = (2 * spec.layers + 1) * spec.hidden
    if stored == "int8":
        float32s += tables * spec.vocab + spec.layers * rows  # the scales
    router_bytes = STORED_BYTES["bfloat16" if stored == "int8" else stored]
    return matrices * STORED_BYTES[stored] + routers * router_bytes + float32s * STORED_BYTES["float32"]


def context_problems(resolved: Resolved, gpus: Gpus) -> Iterator[str]:
    """The longest possible request must be within the model's limit and fit in every shard.

    A shard whose GPU was not found has no size and is skipped.
    """
    asked, most = resolved.max_context, most_context(resolved.config, resolved.spec)
    if asked > most:
        why = context_limit(resolved.config, resolved.spec)
        yield f"model.max_context must be at most {why} ({most} tokens), not {asked}"
        return
    page_tokens = resolved.config.pool.page_tokens
    needed = pages_for(asked, page_tokens)
    for i, shard in enumerate(resolved.config.shard):
        pages = resolved.shard_pages[shard.name]
        if pages < needed and not (shard.on_gpu and (gpus.problem or not gpus.found)):
            yield (
                f"shard[{i}].memory must hold one context of {asked} tokens ({size_text(needed * resolved.page_bytes)}), "
                f"not {size_text(resolved.arena_bytes(shard))}: raise it, or set model.max_context to at most {pages * page_tokens}"
            )


def memory_problems(config: Config, weights: int, machine: Machine) -> Iterator[str]:
    """All arenas are allocated in full at start, so together with the weights they must fit in memory now."""
    arenas = sum(shard.host_memory + config.pool.host_bytes for shard in config.shard)
    if config.shard and all(shard.on_gpu for shard in config.shard):
        weights = 0  # read once, page by page, into GPU memory
    if arenas + weights > machine.free_bytes:
        with_host = " with pool.host_bytes" if config.pool.host_bytes else ""
        besides = f" besides the weights ({size_text(weights)})" if weights else ""
        yield (
            f"shard.memory must fit in the machine's free memory ({size_text(machine.free_bytes)}){besides}, "
            f"not {size_text(arenas)} in all{with_host}: lower it in one of the shards"
        )


def disk_problems(resolved: Resolved) -> Iterator[str]:
    """The files of the disk tier are allocated in full at start, so there must be room for all now."""
    needed = resolved.config.pool.disk_bytes * len(resolved.config.shard)
    if not needed:
        return
    folder = Path(resolved.disk_dir)
    existing = existing_part(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield f"pool.disk_path must be a directory that can be written, not {folder}"
    elif (room := shutil.disk_usage(existing).free) < needed:
        yield f"pool.disk_bytes must fit in the {size_text(room)} that are free in {folder}, not {size_text(needed)} in all"


def log_problems(machine: Machine) -> Iterator[str]:
    """The log directory must be writable."""
    folder = Path(machine.log_dir)
    existing = existing_part(folder)
    if not existing.is_dir():
        yield f"logging.dir must be a directory, not {folder}: {existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"logging.dir must be a directory that can be written, not {folder}: no right to write in {existing}"


def existing_part(folder: Path) -> Path:
    """The longest part of an absolute path that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
