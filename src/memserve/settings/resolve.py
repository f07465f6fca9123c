"""Decides on one machine what a configuration leaves open: pages, threads, paths."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import attrs

from memserve.config import Config, Reason, Resolved
from memserve.engine.checkpoint import read_spec
from memserve.engine.spec import STORED_BYTES, ModelSpec, find_model
from memserve.errors import ConfigError, UserError
from memserve.processes.place import place_path
from memserve.settings.gpu_room import gpu_pages, gpu_problems, worker_bytes
from memserve.settings.gpus import Gpus, find_gpus
from memserve.settings.network import find_network
from memserve.settings.rules import expanded
from memserve.settings.sections import ShardConfig
from memserve.tokens import pages_for


@attrs.frozen(kw_only=True)
class Machine:
    """Properties of a machine that decisions depend on; a test can pass other ones."""

    cores: int
    free_bytes: int
    log_dir: str
    """``[logging] dir``, absolute."""
    runtime_dir: str
    """The directory for sockets and locks; see :func:`memserve.processes.place.place_path`."""
    run: str
    """Name of the run that is to start."""
    gpus: Callable[[], Gpus] = find_gpus
    """Finds GPUs; called only if a shard is on one, because it takes a second."""

    @classmethod
    def here(cls, log_dir: str) -> Machine:
        """This machine at present, within the limits of this process's control groups.

        Raises UserError when there is no usable directory for sockets.
        """
        absolute = expanded(log_dir, "logging.dir").resolve()
        return cls(
            cores=usable_cores(),
            free_bytes=free_memory(),
            log_dir=str(absolute),
            runtime_dir=str(place_path(absolute)),
            run=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        )


# ---- the machine ---------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Cores that this process may use, at least 1: its affinity, or a control group's quota if less."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in control_groups():
        quota, _, period = read_line(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def free_memory() -> int:
    """Bytes that can be allocated without swapping, or that a control group's limit leaves if less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for folder in control_groups():
        limit, used = read_line(folder / "memory.max"), read_line(folder / "memory.current")
        if limit.isdecimal() and used.isdecimal():
            free = min(free, int(limit) - int(used) + reclaimable(folder))
    return max(0, free)


def control_groups() -> Iterator[Path]:
    """The control groups (version 2) of this process, the root first, then from its own upwards."""
    root = Path("/sys/fs/cgroup")
    yield root
    own = next((line[3:] for line in read_lines(Path("/proc/self/cgroup")) if line[:3] == "0::"), "/")
    folder = root / own.strip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent


def reclaimable(folder: Path) -> int:
    """Bytes of a control group's file cache that the kernel gives up first."""
    for line in read_lines(folder / "memory.stat"):
        key, _, value = line.partition(" ")
        if key == "inactive_file":
            return int(value)
    return 0


def read_lines(file: Path) -> list[str]:
    """The lines of a file under /proc or /sys; none if it is absent."""
    with contextlib.suppress(OSError):
        return file.read_text().splitlines()
    return []


def read_line(file: Path) -> str:
    """The first line of a file under /proc or /sys; empty if it is absent."""
    return next(iter(read_lines(file)), "")


# ---- decisions -----------------------------------------------------------------------------------------------


def resolve(config: Config, machine: Machine | None = None) -> Resolved:
    """Decide everything that the configuration leaves open, for this machine unless another is given.

    Raises ConfigError with every problem found, one per line.
    """
    machine = machine or Machine.here(config.logging.dir)
    try:
        model_path = find_model(config.model.path)
        spec = read_spec(model_path)
    except UserError as error:
        others = [*memory_problems(config, 0, machine), *log_problems(machine)]
        if any(shard.on_gpu for shard in config.shard):
            others += gpu_problems(config, None, machine.gpus())
        raise ConfigError("\n".join([str(error), *others])) from error
    page_bytes = spec.page_bytes(config.pool.page_tokens, config.model.dtype)
    weights = weight_bytes(spec, config.model.stored)
    gpus = machine.gpus() if any(shard.on_gpu for shard in config.shard) else Gpus()
    for_worker = worker_bytes(spec, config.batch)
    resolved = Resolved(
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
    problems: list[str] = []
    try:
        resolved = attrs.evolve(resolved, network=find_network(config.cluster))
    except UserError as error:
        problems.append(str(error))
    problems += [
        *gpu_problems(config, spec, gpus, weights, for_worker),
        *context_problems(resolved, gpus),
        *memory_problems(config, weights, machine),
        *log_problems(machine),
        *disk_problems(resolved),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return attrs.evolve(resolved, reasons=tuple(reasons(resolved, weights, machine)))


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
        why = longest(resolved.config, resolved.spec)
        yield f"model.max_context must be at most {why} ({most} tokens), not {asked}"
        return
    page_tokens = resolved.config.pool.page_tokens
    needed = pages_for(asked, page_tokens)
    for i, shard in enumerate(resolved.config.shard):
        pages = resolved.shard_pages[shard.name]
        if pages < needed and not (shard.on_gpu and (gpus.problem or not gpus.found)):
            yield (
                f"shard[{i}].memory must hold one context of {asked} tokens ({size(needed * resolved.page_bytes)}), "
                f"not {size(arena_bytes(resolved, shard))}: raise it, or set model.max_context to at most {pages * page_tokens}"
            )


def memory_problems(config: Config, weights: int, machine: Machine) -> Iterator[str]:
    """All arenas are allocated in full at start, so together with the weights they must fit in memory now."""
    arenas = sum(shard.host_memory + config.pool.host_bytes for shard in config.shard)
    if config.shard and all(shard.on_gpu for shard in config.shard):
        weights = 0  # read once, page by page, into GPU memory
    if arenas + weights > machine.free_bytes:
        with_host = " with pool.host_bytes" if config.pool.host_bytes else ""
        besides = f" besides the weights ({size(weights)})" if weights else ""
        yield (
            f"shard.memory must fit in the machine's free memory ({size(machine.free_bytes)}){besides}, "
            f"not {size(arenas)} in all{with_host}: lower it in one of the shards"
        )


def arena_bytes(resolved: Resolved, shard: ShardConfig) -> int:
    """Intended bytes of the shard's arena: as configured, or as found for it."""
    if shard.on_gpu:
        return shard.memory or resolved.shard_pages[shard.name] * resolved.page_bytes
    return shard.host_memory


def disk_problems(resolved: Resolved) -> Iterator[str]:
    """The files of the disk tier are allocated in full at start, so there must be room for all now."""
    needed = resolved.config.pool.disk_bytes * len(resolved.config.shard)
    if not needed:
        return
    folder = Path(resolved.disk_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield f"pool.disk_path must be a directory that can be written, not {folder}"
    elif (room := shutil.disk_usage(existing).free) < needed:
        yield f"pool.disk_bytes must fit in the {size(room)} that are free in {folder}, not {size(needed)} in all"


def log_problems(machine: Machine) -> Iterator[str]:
    """The log directory must be writable."""
    folder = Path(machine.log_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        yield f"logging.dir must be a directory, not {folder}: {existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"logging.dir must be a directory that can be written, not {folder}: no right to write in {existing}"


# ---- for `memserve check` ------------------------------------------------------------------------------------


def reasons(resolved: Resolved, weights: int, machine: Machine) -> Iterator[Reason]:
    """The reason for each value that the user did not set."""
    config, spec, page_tokens = resolved.config, resolved.spec, resolved.config.pool.page_tokens
    form = "Hugging Face directory" if Path(resolved.model_path).is_dir() else "GGUF file"
    shape = f"{spec.architecture}, {spec.layers} layers, {spec.kv_heads} kv heads"
    yield Reason("model", resolved.model_path, f"{spec.name}: {form}, {shape}")
    where = "once on each GPU, shared by its workers" if resolved.on_gpus else "mapped once for all workers"
    yield Reason("model.weights", size(weights), f"as {config.model.stored}, {where}")
    why = "model.max_context" if config.model.max_context else longest(config, spec)
    yield Reason("model.max_context", f"{resolved.max_context} tokens", why)
    per_token = (
        f"{spec.layers} layers x 2 x {spec.kv_heads} heads x {spec.head_dim} values of {config.model.dtype}"
    )
    yield Reason("pool.page", size(resolved.page_bytes), f"{page_tokens} tokens x {per_token}")
    for shard in config.shard:
        pages = resolved.shard_pages[shard.name]
        contexts = pages * page_tokens / resolved.max_context
        where = f"{size(arena_bytes(resolved, shard))} of {'memory' if not shard.on_gpu else shard.device}"
        why = f"{where}: {pages * page_tokens} tokens, {contexts:.1f} full contexts"
        yield Reason(f"shard.{shard.name}", f"{pages} pages", why)
    for tier, pages, where in (
        ("host", resolved.host_pages, "memory"),
        ("disk", resolved.disk_pages, resolved.disk_dir),
    ):
        if pages:
            why = (
                f"{size(pages * resolved.page_bytes)} in {where} for each shard: {pages * page_tokens} tokens"
            )
            yield Reason(f"pool.{tier}", f"{pages} pages", why)
    for worker in config.worker:
        if resolved.shard(worker.shard).on_gpu:
            room = f"{size(resolved.gpu_worker_bytes)} of {resolved.shard(worker.shard).device}"
            yield Reason(f"worker.{worker.name}", room, "its workspaces, activations and CUDA context")
            continue
        why = threads_why(worker.threads, machine)
        yield Reason(f"worker.{worker.name}.threads", str(resolved.threads[worker.name]), why)
    yield Reason(
        "memory", f"{size(machine.free_bytes)} free", "what the system and control groups leave, before start"
    )
    yield Reason("logging.dir", resolved.log_dir, "a directory for each run")
    yield Reason(
        "runtime directory", resolved.runtime_dir, "from the user and logging.dir; one cluster at a time"
    )
    if network := resolved.network:
        why = (
            f"the scheduler's: {network.head}"
            if network.joins
            else "this host's scheduler, which others join"
        )
        yield Reason("cluster", network.address, why)
    if not config.frontend.api_keys:
        others = ", any web page in a browser included" if "*" in config.frontend.cors_origins else ""
        why = f"whoever reaches the port may use it{others}, and all share one cache"
        yield Reason("frontend.api_keys", "none", why)


def most_context(config: Config, spec: ModelSpec) -> int:
    """The longest context that can be served; on a GPU, where attention is full, the model's sliding window."""
    return spec.full_context if any(shard.on_gpu for shard in config.shard) else spec.max_context


def longest(config: Config, spec: ModelSpec) -> str:
    """What limits a model's context, in words."""
    if most_context(config, spec) == spec.max_context:
        return "what the model was trained for"
    return "the model's sliding window, as attention on a GPU is full"


def threads_why(asked: int | None, machine: Machine) -> str:
    """Why a worker has the number of threads that it has."""
    if asked is None:
        return (
            f"the machine's usable cores ({machine.cores}), shared with the other workers as they fall idle"
        )
    if asked > machine.cores:
        return f"{asked} asked for, but this process may use {machine.cores} cores"
    return "as written"


def size(count: int) -> str:
    """A number of bytes for people to read."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.4g} {unit}"
    return f"{count} bytes"
