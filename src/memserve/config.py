"""A cluster's configuration, before and after it is resolved.

The settings are in :mod:`memserve.settings.sections`. ``Config`` is what the user wrote;
:mod:`memserve.settings.configfile` reads it. ``Resolved`` is what :mod:`memserve.settings.resolve` decides
from it on one machine; actors read it from ``cluster.json``. Both are immutable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import attrs
import msgspec

from memserve.engine.spec import ModelSpec
from memserve.settings.network import HostNetwork
from memserve.settings.sections import (
    DEFAULT_SHARDS,
    DEFAULT_WORKERS,
    BatchConfig,
    CacheConfig,
    ClusterConfig,
    FrontendConfig,
    LoggingConfig,
    ModelConfig,
    PoolConfig,
    SchedulerConfig,
    ShardConfig,
    TransferConfig,
    WorkerConfig,
    setting,
)

# ---- what was written -----------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Config:
    """A whole cluster as configured. Relative paths count from the directory that memserve was started in."""

    model: ModelConfig = setting(help="the model to serve")
    pool: PoolConfig = setting(PoolConfig(), help="how every shard manages its pages")
    shard: tuple[ShardConfig, ...] = setting(DEFAULT_SHARDS, help="memory domains, one table each")
    worker: tuple[WorkerConfig, ...] = setting(DEFAULT_WORKERS, help="worker processes, one table each")
    scheduler: SchedulerConfig = setting(SchedulerConfig(), help="which worker gets a request")
    cache: CacheConfig = setting(CacheConfig(), help="which pages of finished requests stay cached")
    transfer: TransferConfig = setting(TransferConfig(), help="how pages move between shards")
    batch: BatchConfig = setting(BatchConfig(), help="the limits of one model step")
    frontend: FrontendConfig = setting(FrontendConfig(), help="the HTTP server")
    logging: LoggingConfig = setting(LoggingConfig(), help="where each run writes its logs")
    cluster: ClusterConfig = setting(ClusterConfig(), help="the other hosts, if there are any")

    @property
    def scheduler_names(self) -> tuple[str, ...]:
        """Actor names of the GlobalSchedulers, on whichever host they are."""
        return tuple(f"scheduler-{i}" for i in range(self.scheduler.count))

    @property
    def pages_move(self) -> bool:
        """Whether pages can move between any two shards.

        Shards in host memory reach one another, and so do those on the GPUs of one host.
        """
        on_gpus = sum(shard.on_gpu for shard in self.shard)
        on_host = len(self.shard) - on_gpus
        return max(on_gpus, on_host) > 1 or (self.cluster.networked and on_host > 0)

    @property
    def transfer_path(self) -> str:
        """The path that pages take between shards of one host, with auto resolved."""
        fastest = "cuda" if any(shard.on_gpu for shard in self.shard) else "mapped"
        return fastest if self.transfer.path == "auto" else self.transfer.path

    @property
    def far_path(self) -> str:
        """The path that pages take between hosts."""
        return "tcp" if self.transfer.path == "auto" else self.transfer.path


RESERVED_NAME = re.compile(r"frontend(-.*)?|scheduler(-\d+)?|supervisor(-.*)?")
"""Names that shards and workers may not have: other actors' sockets and log files have them."""


def section_types() -> dict[str, type[attrs.AttrsInstance]]:
    """The class of each top-level table, in the order of the file."""
    return {
        "model": ModelConfig,
        "pool": PoolConfig,
        "shard": ShardConfig,
        "worker": WorkerConfig,
        "scheduler": SchedulerConfig,
        "cache": CacheConfig,
        "transfer": TransferConfig,
        "batch": BatchConfig,
        "frontend": FrontendConfig,
        "logging": LoggingConfig,
        "cluster": ClusterConfig,
    }


def settings(config: Config) -> Iterator[tuple[str, Any, attrs.Attribute[Any]]]:
    """Every setting as (path as errors show it, value, field)."""
    for section in section_types():
        value = getattr(config, section)
        labelled = (
            [(f"{section}[{i}]", v) for i, v in enumerate(value)]
            if isinstance(value, tuple)
            else [(section, value)]
        )
        for label, part in labelled:
            for field in attrs.fields(type(part)):
                yield f"{label}.{field.name}", getattr(part, field.name), field


# ---- what was decided ----------------------------------------------------------------------------------------


@attrs.frozen
class Reason:
    """One decision for `memserve check` to print."""

    key: str
    value: str
    why: str


@attrs.frozen(kw_only=True)
class Resolved:
    """A configuration on one machine. All paths are absolute; sizes are in bytes."""

    config: Config
    model_path: str
    """The path of the .gguf file or of the model's directory."""
    spec: ModelSpec
    max_context: int
    """Most tokens of prompt and answer together."""
    page_bytes: int
    shard_pages: dict[str, int]
    """Pages in each shard's arena, by shard name."""
    threads: dict[str, int]
    """Most threads of a step, by worker name."""
    cores: int
    """Cores that this process may use."""
    run: str
    """Name of this run, unique within ``log_dir``."""
    log_dir: str
    """``[logging] dir``; each run has a directory in it."""
    runtime_dir: str
    """The directory of sockets, lock and cluster.json; removed when the cluster ends."""
    reasons: tuple[Reason, ...]
    gpu_worker_bytes: int = 0
    """GPU memory that a worker may take in addition to the weights and pages that it shares."""
    host_pages: int = 0
    """Pages in each shard's host memory, in addition to its arena."""
    disk_pages: int = 0
    """Pages in each shard's file."""
    disk_dir: str = ""
    """The directory of these files."""
    joined: tuple[str, ...] = ()
    """Names of the workers that `memserve join` brought; ``config`` has them like all others."""
    network: HostNetwork | None = None
    """How this host reaches other hosts; None if there are none."""

    def with_worker(self, worker: WorkerConfig, cores: int) -> Resolved:
        """The cluster with one more worker, whose process may use ``cores``."""
        config = attrs.evolve(self.config, worker=(*self.config.worker, worker))
        cores = min(cores, self.cores)
        threads = {**self.threads, worker.name: min(worker.threads or cores, cores)}
        return attrs.evolve(self, config=config, threads=threads, joined=(*self.joined, worker.name))

    def without_worker(self, name: str) -> Resolved:
        """The cluster without a worker that had joined."""
        config = attrs.evolve(
            self.config, worker=tuple(one for one in self.config.worker if one.name != name)
        )
        threads = {one: count for one, count in self.threads.items() if one != name}
        joined = tuple(one for one in self.joined if one != name)
        return attrs.evolve(self, config=config, threads=threads, joined=joined)

    def worker(self, name: str) -> WorkerConfig:
        """The configuration of the worker called ``name``."""
        return next(worker for worker in self.config.worker if worker.name == name)

    def shard(self, name: str) -> ShardConfig:
        """The configuration of the shard called ``name``."""
        return next(shard for shard in self.config.shard if shard.name == name)

    def arena_bytes(self, shard: ShardConfig) -> int:
        """Bytes that the shard's arena is meant to have: as configured, or as found for it."""
        if shard.on_gpu:
            return shard.memory or self.shard_pages[shard.name] * self.page_bytes
        return shard.host_memory

    @property
    def frontend_names(self) -> tuple[str, ...]:
        """Actor names of this host's Frontends."""
        suffix = self.network.suffix if self.network else ""
        return tuple(f"frontend{suffix}-{i}" for i in range(self.config.frontend.count))

    @property
    def scheduler_names(self) -> tuple[str, ...]:
        """Actor names of this host's GlobalSchedulers."""
        return () if self.network and self.network.joins else self.config.scheduler_names

    @property
    def transfer_host(self) -> str:
        """The address at which pages from other shards arrive over TCP."""
        return self.config.transfer.host or (self.network.address if self.network else "127.0.0.1")

    @property
    def on_gpus(self) -> bool:
        """Whether every shard is on a GPU, so that nothing needs the model in the form for CPUs."""
        return all(shard.on_gpu for shard in self.config.shard)

    @property
    def run_dir(self) -> str:
        """The directory of this run's log files."""
        return f"{self.log_dir}/{self.run}"

    def to_json(self) -> bytes:
        """Serialize for ``cluster.json``.

        The result holds API keys and the cluster's key: write it only where no other user can read it.
        """
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Resolved:
        """The inverse of :meth:`to_json`. Raises msgspec.MsgspecError on anything else."""
        return msgspec.json.decode(data, type=cls)
